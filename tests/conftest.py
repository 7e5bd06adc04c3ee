"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Command
from hypothesis import settings

# Tests assert no times: on a busy machine any example may take long.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models run faster on one thread than on many, much faster on a busy machine; the real one does not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.node.get_closest_marker("real") else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "run"
