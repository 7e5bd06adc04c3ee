"""Repairs that are killed at random moments carry on and end like one that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import save_model, write_suite, write_text

from secateur.cli import main
from secateur.evaluation import evaluator
from secateur.files import MEASURED

# Attribution measures few masks one after another; annealing many, and learns from every one; attention-pruning all of
# its own before it learns.
KILLS = {"attribution": 4, "annealing": 8, "attention-pruning": 8}
SETTINGS = {
    "attribution": (),
    "annealing": ("evaluations=40", "rounds=3", "steps=100", "chains=16", "markers=2", "windows=1"),
    "attention-pruning": ("evaluations=40", "chains=20", "steps=50", "markers=2", "windows=1"),
}
IN_FLIGHT = 1  # evaluations are made one after the other
SAME = ("units", "test", "utility", "verdict", "explanation", "candidates")


def run(directory: str, output: str, method: str, log: str) -> None:
    """One call of the command, in a process of its own, that writes a byte for every figure that it has measured."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    note = os.open(log, os.O_WRONLY | os.O_APPEND)

    def noted(measure: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*given: Any) -> Any:
            found = measure(*given)
            os.write(note, b".")  # is there after a kill, too, and before anything can be in the store
            return found

        return measured

    for name in ("measure_y", "negative_log_likelihood"):
        setattr(evaluator, name, noted(getattr(evaluator, name)))
    inputs = ["-m", f"{directory}/model", "-s", f"{directory}/small.yaml", "--utility-text", f"{directory}/neutral.txt"]
    limits = ["--max-perplexity-increase", "5", "--control-suite", "none", "--random-draws", "3", "--device", "cpu"]
    chosen = ["--method", method]
    for pair in SETTINGS[method]:
        chosen += ["--set", pair]
    sys.argv = ["secateur", "repair", *inputs, *limits, *chosen, "-o", output]
    main()


def stored(directory: Path) -> int:
    """Figures of either kind in the store of a run; 0 where it has not come to that."""
    if not (directory / MEASURED).exists():
        return 0
    with contextlib.closing(sqlite3.connect(directory / MEASURED)) as connection:
        try:
            return int(connection.execute("SELECT COUNT(*) FROM measured WHERE name IN ('y', 'nll')").fetchone()[0])
        except sqlite3.OperationalError:  # killed before the store was laid out
            return 0


def wait(process: multiprocessing.process.BaseProcess, log: Path, figures: int, seconds: float) -> None:
    """Let a process measure so many figures, and go on for a moment more; the end of the process ends it.

    Most of a short run is its start, so a moment by the clock would hardly ever come while it measures.
    """
    goal = log.stat().st_size + figures
    while process.is_alive() and log.stat().st_size < goal:
        time.sleep(0.001)
    process.join(timeout=seconds)


@pytest.mark.parametrize("method", KILLS)
def test_a_repair_survives_kills_at_random_moments(tmp_path: Path, method: str) -> None:
    save_model(tmp_path / "model", seed=2)
    write_suite(tmp_path)
    write_text(tmp_path)
    # A fresh process for every call, without the seconds that imports take: a fork of one that has imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kill"])

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        log_of(output).touch()
        given = (str(tmp_path), str(output), method, str(log_of(output)))
        process = context.Process(target=run, args=given)
        process.start()
        return process

    def log_of(output: Path) -> Path:
        return output.with_name(output.name + ".log")

    def lost(output: Path) -> int:
        """Figures that were measured and are not in the store."""
        there = output if output.exists() else output.with_name(output.name + ".partial")
        return log_of(output).stat().st_size - stored(there)

    whole = tmp_path / "whole"
    began = time.perf_counter()
    first = start(whole)
    first.join()
    assert first.exitcode in (0, 3)
    assert lost(whole) == 0
    lasts, figures = time.perf_counter() - began, log_of(whole).stat().st_size
    rng, kills, found = random.Random(0), 0, []
    while kills < KILLS[method]:
        output = tmp_path / f"killed-{len(found)}"
        before = 0
        while not output.exists():
            process = start(output)
            if kills < KILLS[method]:
                wait(process, log_of(output), rng.randint(0, figures // 3), rng.uniform(0.0, lasts / figures))
            else:
                process.join()
            is_killed = process.is_alive()
            if is_killed:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            now = lost(output)
            assert 0 <= now - before <= (IN_FLIGHT if is_killed else 0)
            before = now
        found.append(output)
    expected = json.loads((whole / "result.json").read_text())
    for output in found:
        result = json.loads((output / "result.json").read_text())
        assert {key: result[key] for key in SAME} == {key: expected[key] for key in SAME}
        assert (output / "mask.safetensors").read_bytes() == (whole / "mask.safetensors").read_bytes()
