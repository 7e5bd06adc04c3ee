"""Run the command on small inputs, here or in another process: a suite, a neutral text and a saved tiny model."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from tiny import tiny_model

from secateur import cli

Document = dict[str, Any]
COLOURS = ("red", "blue", "green", "grey", "brown", "white", "black", "amber")
NOUNS = ("boat", "lamp", "kettle", "ladder", "basket", "garden", "window", "bridge", "harbour", "clock", "drum")
REPAIR = ("--set", "max_heads=1", "--set", "max_neurons=4", "--random-draws", "2", "--control-suite", "none")


@dataclass(frozen=True)
class Outcome:
    """What one call of the command left: its status and both streams, ``out`` with white space made even."""

    status: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of an error that the user can mend."""
        assert self.status == 2, self.err
        assert self.err.startswith("Error: ")
        assert len(self.err.strip().splitlines()) == 1, self.err
        assert "Traceback" not in self.err + self.out
        return self.err.strip().removeprefix("Error: ")


class Command:
    """Call ``secateur`` in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *arguments: str | Path) -> Outcome:
        self.capfd.readouterr()
        status = 0
        words = ["secateur", *(str(argument) for argument in arguments)]
        cli.console.width = cli.errors.width = 400
        with patch.object(sys, "argv", words):
            try:
                cli.main()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = self.capfd.readouterr()
        return Outcome(status, " ".join(out.split()), err)


def in_another_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A started process, without the seconds that imports take: a fork of one that has imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "secateur.api", "secateur.cli", "secateur.reports.terminal"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


@contextmanager
def waiting_process(function: Callable[..., None], *arguments: Any, says: str) -> Iterator[BaseProcess]:
    """A process that says a word when it has come so far, and hears of the end of the context by its pipe's end."""
    child, parent = multiprocessing.Pipe()
    process = in_another_process(function, *arguments, parent)
    parent.close()
    try:
        assert child.recv() == says
        yield process
    finally:
        child.close()
        process.join()


def small_suite(**changes: Any) -> Document:
    """Two groups of eight markers, three scenarios of three paraphrases; one of each measure."""
    document: Document = {
        "name": "small",
        "title": "A small suite",
        "attribute": "thing",
        "groups": {"boats": [f"a {c} boat" for c in COLOURS], "lamps": [f"{c} lamps" for c in COLOURS]},
        "scenarios": [
            {
                "id": "like",
                "measure": {"kind": "preference", "a": [" yes"], "b": [" no"]},
                "paraphrases": ["I see {marker}.", "Here: {marker}.", "There is {marker}."],
            },
            {
                "id": "price",
                "measure": {"kind": "quantity", "values": [1, 5, 9]},
                "paraphrases": ["Price of {marker}: ", "{marker} costs ", "For {marker} pay "],
            },
            {
                "id": "end",
                "measure": {"kind": "likelihood-pair", "more": " sinks", "less": " floats"},
                "paraphrases": ["Then {marker}", "So {marker}", "Now {marker}"],
            },
        ],
    }
    return {**document, **changes}


def write_suite(directory: Path, document: Document | None = None, name: str = "small") -> Path:
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document or small_suite(), sort_keys=False), encoding="utf-8")
    return path


def write_text(directory: Path, words: int = 420) -> Path:
    """A made-up text in passages of 60 words."""
    text = [f"{NOUNS[i % 11]} {NOUNS[(i * i + i // 7) % 11]}" for i in range(words // 2)]
    passages = [" ".join(text[i : i + 30]) for i in range(0, len(text), 30)]
    path = directory / "neutral.txt"
    path.write_text("\n\n".join(passages), encoding="utf-8")
    return path


def save_model(directory: Path, seed: int = 0) -> Path:
    tiny_model("llama", seed=seed).save_pretrained(directory)
    return directory
