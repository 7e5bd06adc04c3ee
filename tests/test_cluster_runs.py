"""Repairs on Ray clusters of different sizes: on this machine, and on one that is given by its address."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command, save_model, write_suite, write_text

START_SECONDS = 120
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # else a cluster asks for one if this machine has ever made one


INPUTS = ("-m", "model", "-s", "small.yaml", "--utility-text", "neutral.txt", "--device", "cpu")
SEARCH = ("--method", "attention-pruning", "--set", "evaluations=12", "--set", "chains=20", "--set", "steps=50")
LIMITS = ("--max-perplexity-increase", "5", "--control-suite", "none", "--random-draws", "2")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with all that a repair reads."""
    save_model(tmp_path / "model", seed=2)
    write_suite(tmp_path)
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def repair(call: Command, name: str, *options: str) -> dict[str, Any]:
    outcome = call("repair", *INPUTS, *SEARCH, *LIMITS, "-o", name, *options)
    assert outcome.status in (0, 3), outcome.err
    return result(name)


def result(name: str) -> dict[str, Any]:
    return dict(json.loads(Path(name, "result.json").read_text()))


@pytest.mark.usefixtures("inputs")
def test_the_result_does_not_depend_on_the_number_of_actors(call: Command) -> None:
    results = [repair(call, f"with-{count}", "--ray", f"local:{count}") for count in (1, 2)]
    same = ("units", "test", "utility", "candidates", "notes")
    assert {key: results[0][key] for key in same} == {key: results[1][key] for key in same}
    alone = repair(call, "alone")
    assert alone["units"] == results[0]["units"]


@contextmanager
def head() -> Iterator[str]:
    """The address of a cluster of one machine with two cores, whose processes work in a directory of their own."""
    ports = free_ports(2)
    options = {
        "port": ports[0],
        "dashboard-agent-listen-port": ports[1],
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "memory": 4_000_000_000,
        "object-store-memory": 100_000_000,
        "include-dashboard": "false",
    }
    # The paths of Ray's sockets are too long in the usual directory of a test.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        told = [f"--{name}={value}" for name, value in options.items()]
        words = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", *told]
        log = Path(directory, "log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *words, f"--temp-dir={directory}"],
                cwd=directory,
                env=os.environ | NO_TOKEN,
                stdout=stream,
                stderr=stream,
            )
        try:
            end = time.monotonic() + START_SECONDS
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield f"127.0.0.1:{ports[0]}"
        finally:
            process.terminate()  # which ends what it has started, too
            process.wait(timeout=START_SECONDS)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_a_cluster_elsewhere_gives_what_is_measured_here(inputs: Path, call: Command) -> None:
    with head() as address:
        # In a process of its own: what Ray has been told of tokens it keeps for the life of a process.
        words = ("-m", "secateur.cli", "repair", *INPUTS, *SEARCH, *LIMITS, "-o", "there", "--ray", address)
        told = {"cwd": inputs, "env": os.environ | NO_TOKEN, "capture_output": True, "text": True}
        outcome = subprocess.run([sys.executable, *words], check=False, **told)  # type: ignore[call-overload]
    assert outcome.returncode in (0, 3), outcome.stderr
    assert "The first of 2 actors is ready" in outcome.stdout
    there, here = result("there"), repair(call, "here")
    assert there["units"] == here["units"]
    for part in ("test", "utility"):
        np.testing.assert_allclose(numbers(there[part]), numbers(here[part]), rtol=1e-3, atol=1e-5)


def numbers(content: Any) -> list[float]:
    """All numbers in plain data."""
    if isinstance(content, dict | list):
        inner = content.values() if isinstance(content, dict) else content
        return [number for item in inner for number in numbers(item)]
    return [content] if isinstance(content, float) else []
