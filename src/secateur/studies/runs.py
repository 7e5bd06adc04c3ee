"""The runs in a folder: what is finished, running or interrupted, and the command that carries it on."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import DataError, StoreError
from secateur.evaluation.store import Store
from secateur.files import LOCK, MEASURED, PARTIAL_SUFFIX, STATE, TEMPORARY, staging_of
from secateur.locking import holder_of
from secateur.studies.reach import GENERALISE_FORMAT

LISTING_WAIT = 1.0  # seconds for a store that another process has locked
# The file that every study writes its result into.
RESULTS = {
    "result.json": "repair",
    "compare.json": "compare",
    "generalise.json": "generalise",
    "audit.json": "audit",
    "localise.json": "localise",
    "verify.json": "verify",
    "slim.json": "slim",
}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes
    ----------
    path: its directory, under the name that it was asked for.
    study: "repair", "compare", "generalise", "audit", "localise", "verify" or "slim".
    suite, model: as in its result; empty, like ``study``, where a run that is not finished does not say.
    finished: whether the result is there. holder: the process that is writing it, in words, if one is.
    summary: the verdict, the best method, or what a run has measured that is not finished.
    started: the first time, UTC in ISO format; empty where the run does not say.
    command: the arguments that an interrupted run was begun with; none where it was begun from Python.
    begun_in: the directory in which they were given; empty where the run does not say.
    """

    path: Path
    study: str
    suite: str
    model: str
    finished: bool
    summary: str
    started: str = ""
    command: tuple[str, ...] = ()
    begun_in: str = ""
    holder: str | None = None


def list_runs(folder: Path) -> list[Run]:
    """The runs in a folder, by name; what is no run is left out.

    Raises
    ------
    DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder '{folder}'; name the one that holds your runs.")
    places = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(TEMPORARY)]
    found = [read_run(path) for path in places]
    return [run for run in found if run is not None]


def read_run(directory: Path) -> Run | None:
    """The run in a directory, finished or not; None where there is none."""
    if directory.name.endswith(PARTIAL_SUFFIX):
        return _unfinished(directory)
    for name, study in RESULTS.items():
        content = _read(directory / name)
        if content is not None:
            suite, model = _suites(content), str(content.get("model", ""))
            try:
                summary = _summary(study, content)
            except (KeyError, TypeError, ValueError):
                summary = "written by another version of Secateur, or damaged"
            run = content.get("run") or _read(directory / "run.json") or {}
            return Run(directory, study, suite, model, True, summary, str(run.get("started", "")))
    return None


def interrupted_run(directory: Path) -> Run:
    """The interrupted run that a command carries on, from its directory or that with ``.partial``.

    Raises
    ------
    DataError: there is no run there that is not finished, it is running, it was begun from Python, or where it was
        begun is gone.
    """
    place = staging_of(directory)
    run = read_run(place) if place.name.endswith(PARTIAL_SUFFIX) else None
    if run is not None and run.holder is not None:
        raise DataError(f"'{directory}' is being written by another process ({run.holder}); wait until it is done.")
    if run is None:
        raise DataError(f"'{directory}' holds no interrupted run; 'secateur runs' lists those that there are.")
    if not run.command:
        raise DataError(
            f"'{directory}' was begun from Python; call secateur.{run.study} with the same settings and output again."
        )
    if run.begun_in and not Path(run.begun_in).is_dir():
        raise DataError(
            f"'{directory}' was begun in '{run.begun_in}', which is not there any more; give its command again: "
            f"secateur {shlex.join(run.command)}"
        )
    return run


def _unfinished(directory: Path) -> Run | None:
    state, holder = _read(directory / STATE), holder_of(directory / LOCK)
    path = directory.with_name(directory.name.removesuffix(PARTIAL_SUFFIX))
    how = "interrupted" if holder is None else f"running ({holder})"
    if state is None or not isinstance(state.get("key"), dict):
        return None if holder is None else Run(path, "", "", "", False, how, holder=holder)
    key = state["key"]
    done = [str(found["name"]) for found in state.get("methods", [])]
    done += [f"{fit['method']} on {fit['source']}" for fit in state.get("fits", [])]
    summary = how + _measured(directory / MEASURED, key) + (f"; finished: {', '.join(done)}" if done else "")
    summary += "; carried on from Python" if state.get("command") == [] and holder is None else ""
    return Run(
        path,
        str(key.get("study", "")),
        str(state.get("suite", "")),
        str(state.get("source", "")),
        False,
        summary,
        str(state.get("started", "")),
        tuple(map(str, state.get("command", ()))),
        str(state.get("directory", "")),
        holder,
    )


def _measured(file: Path, key: dict[str, Any]) -> str:
    """How much a run has measured; one store that cannot be read must not hide the other runs."""
    if not file.is_file():
        return ", 0 measurements"
    try:
        with Store(file, str(key.get("model", "")), LISTING_WAIT) as store:
            return f", {len(store)} measurements"
    except StoreError as error:
        return f". {error}"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _suites(content: dict[str, Any]) -> str:
    return ", ".join(map(str, content["suites"])) if "suites" in content else str(content.get("suite", ""))


def _summary(study: str, content: dict[str, Any]) -> str:
    if study == "repair" and content.get("test"):
        reduction = content["test"]["reduction"]["value"]
        return f"{content['verdict']}: bias {-reduction:+.0%}"
    if study == "repair":
        return "nothing passed"
    if study == "compare":
        best = next((found for found in content["methods"] if found["reduction"]), None)
        if best is None:
            return "no method passed"
        doubt = " (not proven)" if best.get("faults") else ""
        return f"best: {best['name']}, bias {-best['reduction']['value']:+.0%}{doubt}"
    if study == "generalise":
        if content["format"] != GENERALISE_FORMAT:
            raise ValueError(content["format"])
        return "; ".join(f"{one['method']}, {one['family']}: {one['choice']}" for one in content["advice"])
    if study == "audit":
        return f"bias B {content['bias']['value']:.2f}"
    if study == "verify":
        worse = "" if content.get("guard") is None else f", {len(content['guard']['rose'])} worse by the classifier"
        return f"{len(content['open']) + len(content['mentions'])} continuations{worse}"
    if study == "slim":
        before, after = content["parameters"]
        speed, reduction = content["decode"]["ratio"]["value"], content["test"]["reduction"]["value"]
        return f"{1 - after / before:.0%} fewer parameters, {speed:.2f} times the speed, bias {-reduction:+.0%}"
    return f"scores of {content.get('method', '')}"
