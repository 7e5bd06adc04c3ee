"""Listing runs and carrying on the interrupted ones."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Command, save_model, waiting_process, write_suite, write_text

import secateur
from secateur.cli import main
from secateur.errors import DataError, NumericalError, OutputError
from secateur.evaluation import Evaluator
from secateur.evaluation.store import Store
from secateur.files import MEASURED, STATE, OutputDirectory
from secateur.models import LanguageModel, precision
from secateur.reports.terminal import READERS
from secateur.studies import record
from secateur.studies.runs import RESULTS, interrupted_run, list_runs, read_run

PASSING = 2


def arguments(directory: Path, output: Path, command: str = "repair") -> list[str | Path]:
    inputs = ["-m", directory / "model", "-s", directory / "small.yaml", "--utility-text", directory / "neutral.txt"]
    limits = ["--max-perplexity-increase", "5", "--control-suite", "none", "--random-draws", "2", "--device", "cpu"]
    return [command, *inputs, *limits, "-o", output]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", PASSING)
    write_suite(tmp_path)
    write_text(tmp_path)
    return tmp_path


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    evaluate, seen = Evaluator.evaluate, []

    def stop(self: Evaluator, *arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > count:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(Evaluator, "evaluate", stop)


def test_an_interrupted_repair_is_listed_and_carried_on(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = output.with_name("whole")
    assert call(*arguments(inputs, whole)).status in (0, 3)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        assert call(*arguments(inputs, output)).status == 130
    listed = call("runs", output.parent)
    assert "interrupted," in listed.out
    assert "measurements" in listed.out
    assert "bias" in listed.out, "the finished run beside it"
    resumed = call("runs", "--resume", output)
    assert resumed.status in (0, 3)
    assert "Carrying on an interrupted run" in resumed.out
    assert not output.with_name(output.name + ".partial").exists()
    one, other = (json.loads((place / "result.json").read_text()) for place in (whole, output))
    assert one["candidates"] == other["candidates"]
    assert one["test"] == other["test"]
    assert [run.finished for run in list_runs(output.parent)] == [True, True]


@pytest.mark.parametrize("ray", [(), ("--ray", "local:1")])
def test_an_interrupted_localisation_is_listed_and_carried_on(
    ray: tuple[str, ...], inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = ("-m", inputs / "model", "-s", inputs / "small.yaml", "--utility-text", inputs / "neutral.txt")
    asked = ("localise", *sources, "--method", "fasp", "--set", "seeds=2", "--device", "cpu")
    whole = output.with_name("whole")
    assert call(*asked, "-o", whole).status == 0
    stopped = 5
    with monkeypatch.context() as patch:
        interrupt_after(patch, stopped)
        assert call(*asked, "-o", output).status == 130
    left = f"interrupted, {stopped} measurements"
    assert left in call("runs", output.parent).out
    assert "Interrupted localisation of suite small." in call("show", output).out
    resumed = call(*asked, *ray, "-o", output) if ray else call("runs", "--resume", output)
    assert resumed.status == 0, resumed.err
    assert "Carrying on an interrupted run" in resumed.out
    assert ("Starting Ray actors (local:1)" in resumed.out) is bool(ray)
    one, other = (json.loads((place / "localise.json").read_text()) for place in (whole, output))
    spent = [sum(step["tokens_forward"] for step in found["run"]["steps"]) for found in (one, other)]
    assert spent[1] < spent[0], "what was measured is not measured again"
    if not ray:
        assert one["top"] == other["top"]
    assert not (output / STATE).exists()
    assert [run.finished for run in list_runs(output.parent)] == [True, True]


def test_ctrl_c_says_how_to_carry_on_where_there_is_something_to_carry_on(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        stopped = call(*arguments(inputs, output))
        for command in ("repair", "compare"):
            named = output.with_name(f"a {command}")
            told = f"carries on with what was measured; secateur show '{named}' tells what it has found so far."
            assert call(*arguments(inputs, named, command)).err == f"Interrupted. The same command {told}\n"
        audit = call("audit", "-m", inputs / "model", "-s", inputs / "small.yaml", "-o", output.with_name("audit"))
        patch.setattr("secateur.load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        begun = call(*arguments(inputs, output.with_name("begun")))
    assert (stopped.status, audit.status, begun.status) == (130, 130, 130)
    assert f"secateur show {output} tells" in stopped.err
    assert (audit.err, begun.err) == ("Interrupted.\n", "Interrupted.\n")
    for name in ("audit", "begun"):
        assert not partial_of(output.with_name(name)).exists()


@pytest.mark.parametrize("command", ["repair", "compare"])
def test_the_cost_of_a_run_is_that_of_all_its_sittings(
    command: str, inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch) as models:
        # The first time before there are candidates.
        for count in (1, 6, 3):
            with monkeypatch.context() as patch:
                interrupt_after(patch, count)
                assert call(*arguments(inputs, output, command), *methods_of(command)).status == 130
        change(partial_of(output) / STATE, later=lambda state: add_a_day(state["costs"]))
        done = call(*arguments(inputs, output, command), *methods_of(command))
    assert done.status in (0, 3)
    assert "in 4 sittings: the run was carried on" in done.out
    result = json.loads((output / f"{'result' if command == 'repair' else command}.json").read_text())
    cost = result if command == "repair" else result["run"]
    assert len(models) == 4
    assert cost["carried_on"] == 3
    # What is spent between two steps is noted at the next one, which a run that is stopped does not come to.
    spent = sum(model.usage.forward for model in models)
    assert 0.98 * spent < cost["tokens_forward"] <= spent
    assert cost["tokens_backward"] == sum(model.usage.backward for model in models)
    assert cost["seconds"] > DAY
    for found in result.get("methods", []):
        assert found["tokens_forward"] >= found["localise_tokens"]
    assert "sittings</th><td>4: the run was carried on" in "".join((output / "report.html").read_text().split("\n"))
    assert "in 4 sittings" in call("show", output).out or command == "compare"


DAY = 86_400.0


def add_a_day(costs: dict[str, Any]) -> None:
    """To what the part of a run has cost that it is at."""
    part = [name for name in costs if not name.endswith("to find the units")][-1]
    costs[part]["seconds"] += DAY


def methods_of(command: str) -> tuple[str, ...]:
    return ("--methods", "attribution,random") if command == "compare" else ()


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LanguageModel]]:
    """The models that are loaded while the context lasts; they count the tokens that go through them."""
    load, models = secateur.load, list[LanguageModel]()

    def loading(*given: Any, **told: Any) -> LanguageModel:
        models.append(load(*given, **told))
        return models[-1]

    with monkeypatch.context() as patch:
        patch.setattr(secateur, "load", loading)
        yield models


def test_a_kill_loses_little_of_the_cost(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noted while steps go on, and not only by what stops a run."""
    monkeypatch.setattr("secateur.api.COST_EVERY", 0.0)
    told = []
    evaluate = Evaluator.evaluate

    def look(self: Evaluator, *given: Any, **options: Any) -> Any:
        found = evaluate(self, *given, **options)
        told.append((read_state(output)["costs"], self.model.usage.forward))
        return found

    monkeypatch.setattr(Evaluator, "evaluate", look)
    assert call(*arguments(inputs, output)).status in (0, 3)
    assert any(costs and costs[""]["tokens_forward"] == spent for costs, spent in told)


def read_state(output: Path) -> dict[str, Any]:
    return dict(json.loads((partial_of(output) / STATE).read_text()))


def test_a_run_is_carried_on_from_anywhere_and_keeps_its_start(
    inputs: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inputs / "elsewhere").mkdir()
    monkeypatch.chdir(inputs)
    times = (f"2031-05-0{day}T00:00:00+00:00" for day in range(1, 10))
    with monkeypatch.context() as patch:
        patch.setattr("secateur.api.now", lambda: next(times))
        interrupt_after(patch, 6)
        assert call(*arguments(Path(), Path("out/run"))).status == 130
        monkeypatch.chdir(inputs / "elsewhere")
        assert call("runs", "--resume", "../out/run").status == 130
    monkeypatch.setattr(record, "now", lambda: "2031-06-01T00:00:00+00:00")
    resumed = call("runs", "--resume", "../out/run")
    assert resumed.status in (0, 3)
    assert f"in {inputs}: secateur repair -m model" in resumed.out
    assert "Carrying on an interrupted run" in resumed.out
    assert Path.cwd() == inputs / "elsewhere"
    told = json.loads((inputs / "out" / "run" / "run.json").read_text())
    assert (told["started"], told["finished"]) == ("2031-05-01T00:00:00+00:00", "2031-06-01T00:00:00+00:00")


def test_a_run_whose_state_names_no_directory_is_carried_on_here(
    inputs: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    left = leave(Path(), Path("run"), call, monkeypatch)
    state = json.loads((left / STATE).read_text())
    del state["directory"], state["started"]
    (left / STATE).write_text(json.dumps(state))
    resumed = call("runs", "--resume", "run")
    assert resumed.status in (0, 3)
    assert "Carrying on an interrupted run" in resumed.out


def test_a_run_whose_directory_is_gone_says_how_to_go_on(tmp_path: Path, call: Command) -> None:
    left = interrupted(tmp_path / "run.partial", ("repair", "-o", "run"))
    change(left.with_name(STATE), directory=str(tmp_path / "gone"))
    refusal = call("runs", "--resume", tmp_path / "run").refusal
    assert f"begun in '{tmp_path / 'gone'}', which is not there any more; give its command again" in refusal
    assert refusal.endswith("secateur repair -o run")


def test_a_run_from_python_is_carried_on_from_python(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = secateur.load(inputs / "model", device="cpu")
    given: dict[str, Any] = {"suite": inputs / "small.yaml", "utility_text": inputs / "neutral.txt", "output": output}
    given |= {"max_perplexity_increase": 5, "control_suite": None, "random_draws": 2}
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["/venv/ipykernel_launcher.py", "-f", "kernel.json"])
        interrupt_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            secateur.repair(model, **given)
    assert "measurements; carried on from Python" in call("runs", output.parent).out
    assert "was begun from Python; call secateur.repair with the same" in call("runs", "--resume", output).refusal
    assert "carry it on from Python, as it was begun, name" in call(*arguments(inputs, output), "--seed", "1").refusal
    secateur.repair(model, **given)
    assert [run.finished for run in list_runs(output.parent)] == [True]


def test_a_run_carries_on_in_the_precision_that_was_measured_at_its_start(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(inputs / "cache"))
    monkeypatch.setattr(precision, "CLOSE", 100.0)
    asked = [*arguments(inputs, output), "--matmul-precision", "auto"]
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the command says it in its own way
        patch.setattr(precision, "FASTER", 0.0)
        interrupt_after(patch, 6)
        stopped = call(*asked)
    assert stopped.status == 130
    assert "Matrix products in medium precision" in stopped.out
    monkeypatch.setattr(precision, "FASTER", 1e9)  # measured now, it would be another
    resumed = call(*asked)
    assert resumed.status in (0, 3)
    assert "Carrying on an interrupted run" in resumed.out
    model = json.loads((output / "run.json").read_text())["model"]
    assert model["matmul_precision"] == model["precision_trial"]["chosen"] == "medium"


def test_every_kind_of_run_has_its_summary(tmp_path: Path, call: Command) -> None:
    interval = {"value": 0.4, "low": 0, "high": 1}
    contents: dict[str, dict[str, Any]] = {
        "result.json": {"suite": "s", "model": "m", "verdict": "verified", "test": {"reduction": interval}},
        "compare.json": {
            "suite": "s",
            "methods": [{"name": "a", "reduction": None}, {"name": "b", "reduction": interval}],
        },
        "audit.json": {"suite": "s", "bias": interval},
        "localise.json": {"suite": "s", "method": "magnitude"},
        "slim.json": {
            "suite": "s",
            "parameters": [100, 80],
            "decode": {"ratio": {"value": 1.25}},
            "test": {"reduction": interval},
            "run": {"started": "2031-05-01T12:34:56+00:00"},
        },
    }
    for name, content in contents.items():
        directory = tmp_path / name.removesuffix(".json")
        directory.mkdir()
        (directory / name).write_text(json.dumps(content))
    (tmp_path / "result" / "run.json").write_text('{"started": "2031-05-02T12:34:56+00:00"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("{")
    (tmp_path / "a file").write_text("")
    summaries = {run.study: run.summary for run in list_runs(tmp_path)}
    assert summaries == {
        "repair": "verified: bias -40%",
        "compare": "best: b, bias -40%",
        "audit": "bias B 0.40",
        "localise": "scores of magnitude",
        "slim": "20% fewer parameters, 1.25 times the speed, bias -40%",
    }
    listed = call("runs", tmp_path).out
    assert "repair s m 2031-05-02 12:34 verified: bias -40%" in listed
    assert "slim s 2031-05-01 12:34 20% fewer" in listed


def test_every_kind_of_result_can_be_shown() -> None:
    assert set(RESULTS.values()) == set(READERS)


def test_what_cannot_be_listed_or_carried_on_is_said(tmp_path: Path, call: Command) -> None:
    assert "There is no folder" in call("runs", tmp_path / "none").refusal
    assert "holds no interrupted run" in call("runs", "--resume", tmp_path / "none").refusal
    with pytest.raises(DataError):
        interrupted_run(tmp_path)
    assert read_run(tmp_path) is None


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_directory_by_a_path_without_its_name(
    place: str, tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert f"'{place}' holds no result of Secateur" in call("show", place).refusal
    assert f"'{place}' holds no interrupted run" in call("runs", "--resume", place).refusal


@pytest.mark.parametrize("where", ["run", "run.partial"])
def test_the_run_of_the_current_directory(
    where: str, tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run.partial", ("suites", "show", "occupations"))
    (tmp_path / where).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / where)
    assert "Interrupted repair" in call("show", ".").out
    assert "occupations (version" in call("runs", "--resume", ".").out


def begin(arguments: list[str], parent: Connection) -> None:
    """A run of the command that stops before its sixth measurement until it is told to go on."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    evaluate, seen = Evaluator.evaluate, []

    def wait(self: Evaluator, *given: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 6:
            parent.send("waits")
            with contextlib.suppress(EOFError):
                parent.recv()
        return evaluate(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", wait)
        patch.setattr(sys, "argv", ["secateur", *arguments])
        main()


@contextlib.contextmanager
def running(arguments: list[str | Path]) -> Iterator[BaseProcess]:
    """Another process that runs the command, and that goes on when the context ends."""
    with waiting_process(begin, [str(argument) for argument in arguments], says="waits") as process:
        yield process


@pytest.mark.parametrize("ends", ["by itself", "by a kill"])
def test_a_run_under_way_is_shown_and_left_alone(ends: str, inputs: Path, output: Path, call: Command) -> None:
    given = arguments(inputs, output)
    with running(given) as process:
        who = f"is being written by another process (PID {process.pid} on "
        shutil.move(inputs / "model", inputs / "moved")  # is said before any model is loaded
        for again in (given, [*given, "--seed", "1", "--overwrite"], ["runs", "--resume", output]):
            assert who in call(*again).refusal
        shutil.move(inputs / "moved", inputs / "model")
        model = secateur.load(inputs / "model", device="cpu")
        with pytest.raises(OutputError, match="being written by another process"):
            secateur.audit(model, inputs / "small.yaml", output=output, overwrite=True)
        (run,) = list_runs(output.parent)
        assert (run.finished, run.study, run.holder is None) == (False, "repair", False)
        listed = call("runs", output.parent).out
        assert f"running (PID {process.pid} on " in listed
        assert "interrupted" not in listed
        shown = call("show", output).out
        assert "Running repair of suite small" in shown
        assert "carries on" not in shown
        if ends == "by a kill":
            process.kill()
    if ends == "by itself":
        assert process.exitcode in (0, 3)
        assert [run.finished for run in list_runs(output.parent)] == [True]
    else:
        assert "interrupted, " in call("runs", output.parent).out
        assert "Carrying on an interrupted run" in call(*given).out
    assert [path.name for path in output.parent.iterdir()] == ["run"]


def test_a_run_under_way_that_cannot_be_carried_on_is_shown(tmp_path: Path, call: Command) -> None:
    with contextlib.closing(OutputDirectory.open(tmp_path / "audit")):
        assert f"running (PID {os.getpid()} on " in call("runs", tmp_path).out
        assert "Another process is writing it (PID" in call("show", tmp_path / "audit").out
        assert "is being written by another process" in call("runs", "--resume", tmp_path / "audit").refusal
    assert list_runs(tmp_path) == []


def test_a_refused_command_leaves_nothing_locked(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = secateur.load(inputs / "model", device="cpu")
    leave(inputs, output, call, monkeypatch)
    told: dict[str, Any] = {"utility_text": inputs / "neutral.txt", "control_suite": None, "output": output}
    refusals = []  # errors keep alive what they have come through
    for _ in range(2):
        with pytest.raises(OutputError, match="interrupted run with other settings") as refused:
            secateur.repair(model, inputs / "small.yaml", seed=5, **told)
        refusals.append(refused)
    assert "Carrying on an interrupted run" in call(*arguments(inputs, output)).out


def test_too_little_memory_is_said_and_loses_nothing(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, seen = Evaluator.evaluate, []

    def full(self: Evaluator, *arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > 6:
            raise torch.OutOfMemoryError("no room")
        return evaluate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", full)
        failed = call(*arguments(inputs, output))
    assert failed.status == 2
    assert "lower --batch-size or --masks-at-once" in failed.err
    assert "Traceback" not in failed.err
    resumed = call(*arguments(inputs, output), "--masks-at-once", "2", "--kept-mib", "0")
    assert resumed.status in (0, 3)
    assert "Carrying on an interrupted run" in resumed.out


def interrupted(directory: Path, command: tuple[str, ...] = ("repair",)) -> Path:
    """An interrupted run as it lies in a folder; its store."""
    directory.mkdir(parents=True)
    state = {"key": {"study": "repair", "model": "m"}, "suite": "s", "source": "here", "command": command}
    (directory / STATE).write_text(json.dumps(state))
    with Store(directory / MEASURED, "m") as store:
        store.put("select", b"mask", {"y": np.ones(2)})
    return directory / MEASURED


def damage(store: Path) -> None:
    store.write_bytes(b"no database at all, but long enough to be looked at" * 9)


def make_older(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE about SET value = '0' WHERE name = 'schema'")


def give_away(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE about SET value = 'other' WHERE name = 'model'")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(damage, "is damaged"), (make_older, "schema version 0"), (give_away, "belongs to another model")],
)
def test_a_store_that_cannot_be_read_hides_no_other_run(
    spoil: Callable[[Path], None], said: str, tmp_path: Path, call: Command
) -> None:
    interrupted(tmp_path / "good.partial")
    store = interrupted(tmp_path / "spoilt.partial", ("suites", "show", "occupations"))
    spoil(store)
    before = store.read_bytes()
    listed = call("runs", tmp_path)
    assert listed.status == 0
    assert "interrupted, 1 measurements" in listed.out
    assert said in {run.path.name: run.summary for run in list_runs(tmp_path)}["spoilt"]
    assert call("runs", "--resume", tmp_path / "spoilt").status == 0
    assert store.read_bytes() == before


def test_a_locked_store_hides_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.studies.runs.LISTING_WAIT", 0.05)
    interrupted(tmp_path / "good.partial")
    with contextlib.closing(sqlite3.connect(interrupted(tmp_path / "held.partial"), isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        summaries = {run.path.name: run.summary for run in list_runs(tmp_path)}
    assert summaries["good"] == "interrupted, 1 measurements"
    assert "is locked by another process" in summaries["held"]


def test_a_state_of_another_shape_is_no_run(tmp_path: Path) -> None:
    for number, state in enumerate(("{}", '{"key": 1}', "[]", "{")):
        (tmp_path / f"{number}.partial").mkdir()
        (tmp_path / f"{number}.partial" / STATE).write_text(state)
    assert list_runs(tmp_path) == []


def partial_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def leave(inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch, command: str = "repair") -> Path:
    """What an interrupted run leaves in its directory."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        assert call(*arguments(inputs, output, command)).status == 130
    return partial_of(output)


def change(state: Path, later: Callable[[dict[str, Any]], None] = lambda _: None, **fields: Any) -> None:
    content = json.loads(state.read_text())
    later(content)
    content["key"].update(fields.pop("key", {}))
    state.write_text(json.dumps({**content, **fields}))


def test_a_run_of_another_version_is_named_as_such(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave(inputs, output, call, monkeypatch)
    change(left / STATE, key={"version": "0.0.1"})
    measured = (left / MEASURED).read_bytes()
    for again in (arguments(inputs, output), ["runs", "--resume", output]):
        refusal = call(*again).refusal
        assert "that was made by version 0.0.1 of Secateur: name another directory, or add --overwrite" in refusal
        assert "--resume" not in refusal
    assert (left / MEASURED).read_bytes() == measured
    assert call(*arguments(inputs, output), "--overwrite").status in (0, 3)


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("repair", {"format": 99}),
        ("repair", {"costs": {"": {"colour": "red"}}}),
        ("compare", {"methods": [{"name": "attribution", "colour": "red"}]}),
        ("compare", {"methods": None}),
    ],
)
def test_a_state_in_another_form_is_refused_in_a_sentence(
    command: str,
    fields: dict[str, Any],
    inputs: Path,
    output: Path,
    call: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = leave(inputs, output, call, monkeypatch, command)
    change(left / STATE, **fields)
    assert (
        "in a form that this version of Secateur cannot carry on" in call(*arguments(inputs, output, command)).refusal
    )
    assert (left / MEASURED).is_file()


@pytest.mark.parametrize("state", ["", "{", "[]", None])
@pytest.mark.parametrize("command", ["repair", "compare", "audit"])
def test_a_state_that_cannot_be_read_costs_no_measurement(
    state: str | None, command: str, inputs: Path, output: Path, call: Command
) -> None:
    store = interrupted(partial_of(output))
    if state is None:
        (store.parent / STATE).unlink()
    else:
        (store.parent / STATE).write_text(state)
    before = store.read_bytes()
    given = arguments(inputs, output, command)
    if command == "audit":
        given = ["audit", "-m", inputs / "model", "-s", inputs / "small.yaml", "-o", output]
    assert "holds files, and no run that can be carried on from them" in call(*given).refusal
    assert store.read_bytes() == before
    if command == "audit":
        assert call(*given, "--overwrite").status == 0
        assert not store.exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(damage, "is damaged"), (make_older, "schema version 0"), (give_away, "belongs to another model")],
)
def test_a_run_does_not_carry_on_with_a_store_that_is_not_its_own(
    spoil: Callable[[Path], None],
    said: str,
    inputs: Path,
    output: Path,
    call: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = leave(inputs, output, call, monkeypatch) / MEASURED
    spoil(store)
    before = store.read_bytes()
    for again in (arguments(inputs, output), ["runs", "--resume", output]):
        refusal = call(*again).refusal
        assert said in refusal
        assert "remove it, name another output directory, or add --overwrite to start afresh" in refusal
        assert store.read_bytes() == before
    afresh = call(*arguments(inputs, output), "--overwrite")
    assert afresh.status in (0, 3)
    assert "Carrying on" not in afresh.out


def test_overwrite_carries_on_with_a_store_that_can_be_read(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(inputs, output, call, monkeypatch)
    assert "Carrying on an interrupted run" in call(*arguments(inputs, output), "--overwrite").out


def test_a_run_goes_on_without_the_store_that_was_removed(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = leave(inputs, output, call, monkeypatch) / MEASURED
    damage(store)
    store.unlink()
    assert call(*arguments(inputs, output)).status in (0, 3)


def test_a_run_does_not_carry_on_with_a_locked_store(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store.__init__, "__defaults__", (0.05,))
    store = leave(inputs, output, call, monkeypatch) / MEASURED
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        before = store.read_bytes()
        for options in ((), ("--overwrite",)):
            assert "is locked by another process" in call(*arguments(inputs, output), *options).refusal
        assert store.read_bytes() == before
    assert call(*arguments(inputs, output)).status in (0, 3)


def test_an_error_in_the_middle_of_a_run_keeps_what_was_measured(
    inputs: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NumericalError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr("secateur.studies.repair.judge", fail)
        assert call(*arguments(inputs, output)).refusal == "not finite"
    assert (partial_of(output) / MEASURED).is_file()
    resumed = call(*arguments(inputs, output))
    assert resumed.status in (0, 3)
    assert "Carrying on an interrupted run" in resumed.out
