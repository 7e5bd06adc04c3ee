"""Repairs on local Ray clusters of different sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command import Command, save_model, write_suite, write_text


def repair(call: Command, directory: Path, name: str, *options: str) -> dict[str, Any]:
    inputs = ("-m", directory / "model", "-s", directory / "small.yaml", "--utility-text", directory / "neutral.txt")
    search = ("--method", "attention-pruning", "--set", "evaluations=12", "--set", "chains=20", "--set", "steps=50")
    limits = ("--max-perplexity-increase", "5", "--control-suite", "none", "--random-draws", "2", "--device", "cpu")
    outcome = call("repair", *inputs, *search, *limits, "-o", directory / name, *options)
    assert outcome.status in (0, 3), outcome.err
    return dict(json.loads((directory / name / "result.json").read_text()))


def test_the_result_does_not_depend_on_the_number_of_actors(tmp_path: Path, call: Command) -> None:
    save_model(tmp_path / "model", seed=2)
    write_suite(tmp_path)
    write_text(tmp_path)
    results = [repair(call, tmp_path, f"with-{count}", "--ray", f"local:{count}") for count in (1, 2)]
    same = ("units", "test", "utility", "candidates", "notes")
    assert {key: results[0][key] for key in same} == {key: results[1][key] for key in same}
    alone = repair(call, tmp_path, "alone")
    assert alone["units"] == results[0]["units"]
