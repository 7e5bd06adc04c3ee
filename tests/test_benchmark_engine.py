"""The benchmark of the engine runs through on a tiny model, and what it compares agrees."""

from __future__ import annotations

import importlib
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from command import save_model, write_suite

from secateur.measures.utility import split_text

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("brief", [True, False])
def test_every_technique_has_its_line_and_agrees_with_the_naive_way(
    brief: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    engine = importlib.import_module("engine")
    monkeypatch.setattr(engine, "split_text", partial(split_text, max_tokens=600))
    asked = ["--model", str(save_model(tmp_path / "model")), "--suite", str(write_suite(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["engine.py", *asked, "--masks", "4", "--naive", "1", *["--brief"] * brief])
    engine.main()
    told = capsys.readouterr().out
    differences = [float(found) for found in re.findall(r"largest difference (\d\S*)", told)]
    assert len(differences) == (2 if brief else 8), "random masks and the walk are both compared"
    assert max(differences) < 1e-4
    assert told.index("peak memory with several") < told.index("naive ")
    for share in () if brief else ("order and restarts", "shared prefixes", "head where read", "oneDNN", "restarts"):
        assert re.search(rf"^    {share}: \d+\.\d\d x$", told, re.MULTILINE), share
