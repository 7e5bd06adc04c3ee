"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Command


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models run faster on one thread than on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "run"
