"""Repairs that are killed carry on and end like one that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from command import in_another_process, save_model, write_suite, write_text

from secateur import api
from secateur.cli import main
from secateur.evaluation import evaluator
from secateur.files import MEASURED, OutputDirectory

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
# Where a run is killed that has measured all: by the name of what it calls, and before which of its calls.
WRITING = {
    "before a result is written": (OutputDirectory, "write_json", "result.json"),
    "when a result is written": (OutputDirectory, "write_json", "run.json"),
    "while a checkpoint is written": (api, "render_card", None),
    "before all is published": (OutputDirectory, "publish", None),
    "in the middle of a replacement": (Path, "rename", "run.partial"),
    "when all is published": (Path, "unlink", "partial.json"),
}


def die_before(moment: str) -> None:
    """Let this process be killed at one of the moments."""
    owner, name, of = WRITING[moment]
    call = getattr(owner, name)

    def dying(*given: Any, **told: Any) -> Any:
        # The directory's or the file's own name, or that of the file that is written into it.
        if of is None or of in (given[0].name if isinstance(given[0], Path) else None, *given[1:2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **told)

    setattr(owner, name, dying)


def run(directory: str, output: str, method: str, log: str, *options: str, moment: str | None = None) -> None:
    """One call of the command, in a process of its own, that writes a byte for every figure that it has measured."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if moment is not None:
        die_before(moment)
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
    sys.argv = ["secateur", "repair", *inputs, *limits, *chosen, *options, "-o", output]
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


def wait(process: BaseProcess, log: Path, figures: int, seconds: float) -> None:
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

    def start(output: Path) -> BaseProcess:
        log_of(output).touch()
        return in_another_process(run, str(tmp_path), str(output), method, str(log_of(output)))

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
    for output in found:
        assert_same(output, whole)


def assert_same(output: Path, whole: Path) -> None:
    """A run has found the same as another one."""
    result, expected = (json.loads((place / "result.json").read_text()) for place in (output, whole))
    assert {key: result[key] for key in SAME} == {key: expected[key] for key in SAME}
    assert (output / "mask.safetensors").read_bytes() == (whole / "mask.safetensors").read_bytes()


def test_a_repair_survives_kills_while_it_writes(tmp_path: Path) -> None:
    """In the place of an older run, which is there until the new one is."""
    save_model(tmp_path / "model", seed=2)
    write_suite(tmp_path)
    write_text(tmp_path)
    log = tmp_path / "log"
    log.touch()
    output, whole = tmp_path / "runs" / "run", tmp_path / "whole"

    def repair(output: Path, moment: str | None = None) -> int | None:
        options = (str(tmp_path), str(output), "attribution", str(log), "--overwrite")
        process = in_another_process(partial(run, moment=moment), *options)
        process.join()
        return process.exitcode

    assert repair(whole) in (0, 3)
    for moment in WRITING:
        output.mkdir(parents=True)
        (output / "older.txt").write_text("older")
        assert repair(output, moment) == -signal.SIGKILL
        older = output if moment != "in the middle of a replacement" else output.with_name(".secateur-old-run")
        assert (older / "older.txt").exists() == (moment != "when all is published"), moment
        before = log.stat().st_size
        assert repair(output) in (0, 3)
        again = log.stat().st_size - before
        assert (again > 0) == (moment == "when all is published"), f"{moment}: {again} figures were measured again"
        assert_same(output, whole)
        assert not (output / "older.txt").exists()
        assert [path.name for path in output.parent.iterdir()] == ["run"]
        assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
        shutil.rmtree(output)
