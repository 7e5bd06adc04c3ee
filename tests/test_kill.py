"""Repairs that are killed at random moments carry on and end like one that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from command import save_model, write_suite, write_text

from secateur.cli import main
from secateur.evaluation.store import Store

# Attribution measures few masks one after another, annealing many, and learns from every one.
KILLS = {"attribution": 20, "annealing": 6}
ANNEALING = ("evaluations=40", "rounds=3", "steps=100", "chains=16", "markers=2", "windows=1")
SAME = ("units", "test", "utility", "verdict", "explanation", "candidates")


def run(directory: str, output: str, method: str) -> None:
    """One call of the command, in a process of its own."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    inputs = ["-m", f"{directory}/model", "-s", f"{directory}/small.yaml", "--utility-text", f"{directory}/neutral.txt"]
    limits = ["--max-perplexity-increase", "5", "--control-suite", "none", "--random-draws", "3", "--device", "cpu"]
    chosen = ["--method", method]
    for pair in ANNEALING if method == "annealing" else ():
        chosen += ["--set", pair]
    sys.argv = ["secateur", "repair", *inputs, *limits, *chosen, "-o", output]
    main()


def measured(output: Path) -> int:
    """Masks in the store of a run that is under way."""
    file = output.with_name(output.name + ".partial") / "measured.sqlite"
    fingerprint = json.loads((file.parent / "partial.json").read_text())["key"]["model"]
    with Store(file, fingerprint) as store:
        return len(store)


@pytest.mark.parametrize("method", KILLS)
def test_a_repair_survives_kills_at_random_moments(tmp_path: Path, method: str) -> None:
    save_model(tmp_path / "model", seed=2)
    write_suite(tmp_path)
    write_text(tmp_path)
    # A fresh process for every call, without the seconds that imports take: a fork of one that has imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kill"])

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run, args=(str(tmp_path), str(output), method))
        process.start()
        return process

    whole = tmp_path / "whole"
    began = time.perf_counter()
    first = start(whole)
    first.join()
    assert first.exitcode in (0, 3)
    lasts = time.perf_counter() - began
    rng, kills, found = random.Random(0), 0, []
    while kills < KILLS[method]:
        output = tmp_path / f"killed-{len(found)}"
        known = 0
        while not output.exists():
            process = start(output)
            process.join(timeout=rng.uniform(0.1, 0.7) * lasts if kills < KILLS[method] else None)
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            with contextlib.suppress(FileNotFoundError):
                assert measured(output) >= known, "what was measured is not lost"
                known = measured(output)
        found.append(output)
    expected = json.loads((whole / "result.json").read_text())
    for output in found:
        result = json.loads((output / "result.json").read_text())
        assert {key: result[key] for key in SAME} == {key: expected[key] for key in SAME}
        assert (output / "mask.safetensors").read_bytes() == (whole / "mask.safetensors").read_bytes()
