"""Bad input to the command: one clear sentence, a status, and nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import REPAIR, Command, Outcome, save_model, small_suite, write_suite, write_text
from rich.console import Console
from tiny import tiny_model

import secateur
from secateur.reports.terminal import suites_table
from secateur.suites import load_suite, suite_names


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def assert_nothing(output: Path) -> None:
    """Neither the output directory nor a partial or hidden one beside it."""
    assert not output.exists()
    assert not output.parent.is_dir() or not list(output.parent.iterdir())


# The model


def file_that_is_no_model(directory: Path) -> Path:
    path = directory / "notes.txt"
    path.write_text("no model")
    return path


def directory_without_config(directory: Path) -> Path:
    (directory / "empty").mkdir()
    return directory / "empty"


def damaged_config(directory: Path) -> Path:
    (directory / "config.json").write_text("{ this is not JSON")
    return directory


def foreign_config(directory: Path) -> Path:
    (directory / "config.json").write_text("[1, 2]")
    return directory


def unsupported_family(directory: Path) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return directory


def damaged_weights(directory: Path) -> Path:
    broken = save_model(directory / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    return broken


def no_tokenizer(directory: Path) -> Path:
    bare = directory / "bare"
    tiny_model().model.save_pretrained(bare)
    return bare


def missing_gguf(directory: Path) -> Path:
    return directory / "none.gguf"


def damaged_gguf(directory: Path) -> Path:
    path = directory / "broken.gguf"
    path.write_bytes(b"GGUF but no more")
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda directory: directory / "missing", "neither an existing directory"),
        (file_that_is_no_model, "is a file"),
        (directory_without_config, "holds no config.json"),
        (damaged_config, "cannot be loaded"),
        (foreign_config, "cannot be loaded"),
        (unsupported_family, "bert"),
        (damaged_weights, "cannot be loaded"),
        (no_tokenizer, "cannot be loaded"),
        (missing_gguf, "no GGUF file"),
        (damaged_gguf, "cannot be loaded"),
    ],
)
def test_unknown_model(
    tmp_path: Path,
    output: Path,
    call: Command,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], Path],
    said: str,
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    message = call("audit", "--model", make(tmp_path), "--suite", write_suite(tmp_path), "-o", output).refusal
    assert said in message
    assert_nothing(output)


def test_hub_model_without_a_network(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = call("audit", "--model", "nobody/nothing-here", "--suite", write_suite(tmp_path), "-o", output).refusal
    assert "'nobody/nothing-here' cannot be loaded; check the name, the path or the network" in message
    assert_nothing(output)


@pytest.mark.parametrize("command", ["audit", "repair"])
def test_model_that_returns_nan(tmp_path: Path, output: Path, call: Command, command: str) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.mlp_outputs[0].weight[0, 0] = float("nan")  # type: ignore[index, operator]
    broken.save_pretrained(tmp_path / "nan")
    extra = ("--utility-text", write_text(tmp_path), *REPAIR) if command == "repair" else ()
    message = call(command, "-m", tmp_path / "nan", "-s", write_suite(tmp_path), "-o", output, *extra).refusal
    assert "not finite" in message
    assert_nothing(output)


# Settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "tea-leaves"), "tea-leaves"),
        (("--device", "toaster"), "Device 'toaster' is unknown"),
        (("--device", "cuda:99"), "Device 'cuda:99' is unknown or not available"),
        (("--dtype", "float12"), "Unknown dtype 'float12'; choose one of: auto, float32"),
        (("--matmul-precision", "low"), "Unknown matmul precision 'low'; choose one of: highest, high, medium"),
        (("--chat", "shout"), "Unknown chat mode 'shout'; choose auto, chat or plain"),
        (("--chat", "chat"), "has no chat template"),
        (("--ablation", "half"), "Unknown ablation 'half'; choose zero or mean"),
        (("--max-perplexity-increase", "0"), "between 0 and 10"),
        (("--max-perplexity-increase", "-0.1"), "between 0 and 10"),
        (("--max-perplexity-increase", "nan"), "between 0 and 10"),
        (("--random-draws", "0"), "random_draws must be at least 1"),
        (("--batch-size", "0"), "batch_size must be at least 1"),
        (("--max-markers", "1"), "max_markers must be at least 2"),
        (("--utility-tokens", "5"), "utility_tokens must be at least 512"),
        (("--set", "max_heads=0", "--set", "max_neurons=0", "--set", "rounds=0"), "no candidate"),
        (("--device-map", "sideways"), "cannot be loaded"),
        (("--device-map", "auto", "--device", "cpu"), "not both"),
        (("--control-suite", "control-color"), "Did you mean: control-colour"),
    ],
)
def test_setting(tmp_path: Path, model: Path, output: Path, call: Command, options: tuple[str, ...], said: str) -> None:
    text = write_text(tmp_path)
    outcome = call(
        "repair", "-m", model, "-s", write_suite(tmp_path), "--utility-text", text, "-o", output, *REPAIR, *options
    )
    assert said in outcome.refusal
    assert_nothing(output)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--chat", "shout"), "Unknown chat mode"),
        (("--batch-size", "0"), "batch size must be at least 1"),
        (("--device", "toaster"), "Device 'toaster'"),
        (("--dtype", "int8"), "Unknown dtype 'int8'"),
    ],
)
def test_setting_of_audit(
    tmp_path: Path, model: Path, output: Path, call: Command, options: tuple[str, ...], said: str
) -> None:
    assert said in call("audit", "-m", model, "-s", write_suite(tmp_path), "-o", output, *options).refusal
    assert_nothing(output)


# The suite and the neutral text


def without_slot(document: dict[str, Any]) -> None:
    document["scenarios"][0]["paraphrases"][1] = "nobody here"


def with_group(markers: list[str]) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["groups"]["lamps"] = markers

    return change


def without_scenarios(document: dict[str, Any]) -> None:
    document["scenarios"] = []


@pytest.mark.parametrize("command", ["audit", "repair"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_slot, "(scenario 'like'): paraphrase 2 has no {marker} slot"),
        (with_group([]), "group 'lamps' is empty"),
        (with_group(["a lamp"]), "group 'lamps' has one marker"),
        (with_group(["a lamp", "a lamp"]), "marker 'a lamp' is listed twice"),
        (without_scenarios, "'scenarios'"),
    ],
)
def test_faulty_suite(
    tmp_path: Path,
    model: Path,
    output: Path,
    call: Command,
    command: str,
    change: Callable[[dict[str, Any]], None],
    said: str,
) -> None:
    document = small_suite()
    change(document)
    path = write_suite(tmp_path, document)
    message = call(command, "-m", model, "-s", path, "-o", output).refusal
    assert said in message
    assert str(path) in message
    assert_nothing(output)


@pytest.mark.parametrize("command", [("audit", "-s"), ("repair", "-s"), ("suites", "show")])
def test_unknown_suite(call: Command, output: Path, command: tuple[str, str]) -> None:
    where = () if command[0] == "suites" else ("-o", output)
    message = call(*command, "ocupations", *where).refusal
    assert message.startswith("There is no suite 'ocupations'. Did you mean: occupations")
    assert_nothing(output)


def test_suite_file_that_is_missing(call: Command, tmp_path: Path, output: Path) -> None:
    assert "There is no suite file" in call("audit", "-s", tmp_path / "none.yaml", "-o", output).refusal
    assert_nothing(output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_group(["a lamp", "two lamps"]), "group 'lamps' has 2 markers; a repair needs at least 6"),
        (lambda d: d["scenarios"][1]["paraphrases"].pop(), "scenario 'price' has 2 paraphrase(s)"),
    ],
)
def test_suite_too_small_for_a_repair(
    tmp_path: Path,
    model: Path,
    output: Path,
    call: Command,
    change: Callable[[dict[str, Any]], None],
    said: str,
) -> None:
    document = small_suite()
    change(document)
    assert said in call("repair", "-m", model, "-s", write_suite(tmp_path, document), "-o", output).refusal
    assert_nothing(output)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 word(s); at least 300"),
        (b"word", "has 1 word(s); at least 300"),
        (b"\xff\xfe\x00 word" * 400, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_faulty_utility_text(
    tmp_path: Path, model: Path, output: Path, call: Command, content: bytes | None, said: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    outcome = call("repair", "-m", model, "-s", write_suite(tmp_path), "-o", output, "--utility-text", text, *REPAIR)
    assert said in outcome.refusal
    assert_nothing(output)


class AskedError(Exception):
    """In place of a study: what it was asked for."""


@pytest.mark.parametrize(
    "written",
    [
        ("--suites", "hiring-race", "lending-race", "housing-race"),
        ("--suites", "hiring-race,lending-race,housing-race"),
        ("-s", "hiring-race", "-s", "lending-race", "-s", "housing-race"),
        ("--suites", "hiring-race, lending-race", "housing-race"),
    ],
)
@pytest.mark.parametrize("where", [("-o", "{output}", "*"), ("*", "-o", "{output}")])
def test_suites_may_be_separated_in_every_way(
    written: tuple[str, ...], where: tuple[str, ...], output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_: object, suites: list[Any], **__: object) -> None:
        raise AskedError([suite.name for suite in suites])

    monkeypatch.setattr("secateur.cli._load", lambda *_: None)
    monkeypatch.setattr("secateur.generalise", ask)
    words = [word for one in where for word in (written if one == "*" else (one.format(output=output),))]
    with pytest.raises(AskedError) as asked:
        call("generalise", *words)
    assert asked.value.args == (["hiring-race", "lending-race", "housing-race"],)


def test_a_suite_that_stands_alone_is_checked(call: Command, output: Path) -> None:
    assert "There is no suite 'hiring-rase'" in call("generalise", "-s", "hiring-race", "hiring-rase").refusal
    shown = call("generalise", "--help").out
    assert "--suites" in shown
    assert "More suites" in shown
    assert_nothing(output)


@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        ("compare", ("annealing.evaluations=0",), "evaluations"),
        ("compare", ("attention-pruning.evaluations=0",), "evaluations"),
        ("compare", ("annealing.rounds=0",), "rounds"),
        ("repair", ("evaluations=0", "--method", "annealing"), "evaluations"),
        ("repair", ("evaluations=0", "--method", "attention-pruning"), "evaluations"),
    ],
)
def test_a_search_without_evaluations_is_refused(
    command: str, settings: tuple[str, ...], said: str, model: Path, tmp_path: Path, output: Path, call: Command
) -> None:
    given = (command, "-m", model, "-s", write_suite(tmp_path), "-o", output, "--device", "cpu", "--set", *settings)
    assert said in call(*given).refusal
    assert_nothing(output)


@pytest.mark.parametrize("method", ["attribution", "fasp"])
def test_soft_is_refused_for_methods_without_gates(
    method: str, model: Path, tmp_path: Path, output: Path, call: Command
) -> None:
    given = ("repair", "-m", model, "-s", write_suite(tmp_path), "-o", output, "--method", method, "--soft")
    said = f"The method '{method}' has no gates that --soft could keep between 0 and 1; use --method gates."
    assert call(*given).refusal == said
    assert_nothing(output)


def test_ray_that_is_not_installed(
    model: Path, tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    given = ("repair", "-m", model, "-s", write_suite(tmp_path), "-o", output, "--ray", "auto")
    assert call(*given).refusal == "Ray is not installed; run: pip install 'secateur[ray]'."
    assert_nothing(output)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_ray_address_that_does_not_answer(
    scheme: str, model: Path, tmp_path: Path, output: Path, call: Command
) -> None:
    with socket.socket() as unheard:  # bound, and nobody listens
        unheard.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{unheard.getsockname()[1]}"
        given = ("repair", "-m", model, "-s", write_suite(tmp_path), "-o", output, "--ray", address)
        assert f"The Ray cluster '{address}' does not answer; check the address" in call(*given).refusal
    assert_nothing(output)


# The output directory


def arguments(command: str, tmp_path: Path, model: Path, output: Path) -> list[str | Path]:
    """A whole, valid call of one command that writes a directory."""
    if command == "apply":
        mask = secateur.Mask.removing(secateur.load(model, device="cpu"), [0, 20])
        secateur.Plan(mask, {}).save(tmp_path / "plan")
        return ["apply", tmp_path / "plan", "-m", model, "-o", output, "--device", "cpu"]
    given: list[str | Path] = [command, "-m", model, "-s", write_suite(tmp_path), "-o", output, "--device", "cpu"]
    if command == "repair":
        settings = ("--set", "rounds=2", "--max-perplexity-increase", "5")
        given += ["--utility-text", write_text(tmp_path), *REPAIR, *settings]
    return given


@pytest.fixture
def passing_model(tmp_path: Path) -> Path:
    """A model in which a repair of the small suite finds something to write."""
    return save_model(tmp_path / "passing", seed=2)


COMMANDS = pytest.mark.parametrize("command", ["audit", "repair", "apply"])


@COMMANDS
def test_existing_output_is_refused_and_untouched(
    tmp_path: Path, passing_model: Path, output: Path, call: Command, command: str
) -> None:
    output.mkdir(parents=True)
    (output / "mine.txt").write_text("keep me")
    given = arguments(command, tmp_path, passing_model, output)
    assert "exists; name another directory or add --overwrite" in call(*given).refusal
    assert [path.name for path in output.parent.iterdir()] == ["run"]
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [("mine.txt", "keep me")]
    assert call(*given, "--overwrite").status in (0, 3)
    assert [path.name for path in output.parent.iterdir()] == ["run"]
    assert not (output / "mine.txt").exists()
    assert list(output.iterdir())


@COMMANDS
def test_failure_leaves_an_existing_output_untouched(
    tmp_path: Path,
    passing_model: Path,
    output: Path,
    call: Command,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output.mkdir(parents=True)
    (output / "mine.txt").write_text("keep me")
    given = arguments(command, tmp_path, passing_model, output)
    fail_to_write(monkeypatch)
    assert "No space left on device" in call(*given, "--overwrite").refusal
    kept = {"run.partial"} if command == "repair" else set()  # what was measured, to be carried on
    assert {path.name for path in output.parent.iterdir()} == {"run"} | kept
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [("mine.txt", "keep me")]


@COMMANDS
@pytest.mark.parametrize("below", ["run", "deeper/run"])
def test_output_under_a_file(tmp_path: Path, passing_model: Path, call: Command, command: str, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("keep me")
    given = arguments(command, tmp_path, passing_model, file / below)
    assert "cannot be written" in call(*given).refusal
    assert file.read_text() == "keep me"
    assert not list(tmp_path.glob("*.partial"))


@COMMANDS
def test_output_is_a_file(tmp_path: Path, passing_model: Path, call: Command, command: str) -> None:
    file = tmp_path / "file"
    file.write_text("keep me")
    given = arguments(command, tmp_path, passing_model, file)
    assert "is a file, not a directory" in call(*given, "--overwrite").refusal
    assert file.read_text() == "keep me"


@COMMANDS
def test_full_disk_at_the_door(
    tmp_path: Path,
    passing_model: Path,
    output: Path,
    call: Command,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(command, tmp_path, passing_model, output)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=0))
    assert "has 0.0 GB free, but about 0.1 GB are needed" in call(*given).refusal
    assert_nothing(output)


def fail_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last thing that each command writes find the disk full."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("secateur.api.write_permanently", full)
    monkeypatch.setattr("secateur.api.render_audit", full)


@COMMANDS
def test_disk_that_fills_up_while_writing(
    tmp_path: Path,
    passing_model: Path,
    output: Path,
    call: Command,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(command, tmp_path, passing_model, output)
    fail_to_write(monkeypatch)
    assert call(*given).refusal == f"'{output}' cannot be written: No space left on device."
    if command != "repair":
        assert_nothing(output)
        return
    assert [path.name for path in output.parent.iterdir()] == ["run.partial"]
    monkeypatch.undo()
    resumed = call(*given)
    assert resumed.status in (0, 3)
    assert "Carrying on an interrupted run" in resumed.out
    assert [path.name for path in output.parent.iterdir()] == ["run"]


# Plans


def test_plan_for_another_model(tmp_path: Path, model: Path, output: Path, call: Command) -> None:
    given = arguments("apply", tmp_path, save_model(tmp_path / "other", seed=7), output)
    given[given.index("-m") + 1] = model
    assert "made for another model" in call(*given).refusal
    assert_nothing(output)


def cut_plan(plan: Path) -> None:
    text = (plan / "plan.json").read_text()
    (plan / "plan.json").write_text(text[: len(text) // 2])


def foreign_plan(plan: Path) -> None:
    (plan / "plan.json").write_text("[1, 2]")


def leaving_plan(plan: Path) -> None:
    content = json.loads((plan / "plan.json").read_text())
    (plan / "plan.json").write_text(json.dumps({**content, "mask": "../mask.safetensors"}))


def no_plan(plan: Path) -> None:
    (plan / "plan.json").unlink()


def no_mask(plan: Path) -> None:
    (plan / "mask.safetensors").unlink()


def damaged_mask(plan: Path) -> None:
    (plan / "mask.safetensors").write_bytes(b"\x00" * 20)


def binary_plan(plan: Path) -> None:
    (plan / "plan.json").write_bytes(b"\xff\x00\xfe")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_plan, "cannot be read"),
        (binary_plan, "cannot be read"),
        (foreign_plan, "is not a Secateur plan"),
        (leaving_plan, "outside its own directory"),
        (no_plan, "There is no plan"),
        (no_mask, "cannot be read"),
        (damaged_mask, "cannot be read"),
    ],
)
def test_damaged_plan(
    tmp_path: Path, model: Path, output: Path, call: Command, damage: Callable[[Path], None], said: str
) -> None:
    given = arguments("apply", tmp_path, model, output)
    damage(tmp_path / "plan")
    assert said in call(*given).refusal
    assert_nothing(output)


# Show, suites and version


@pytest.mark.parametrize("content", [None, "{ cut", "[]", "{}", b"\xff\xfe"])
def test_show_without_a_result(tmp_path: Path, call: Command, content: str | bytes | None) -> None:
    if content is not None:
        (tmp_path / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = call("show", tmp_path).refusal
    assert ("holds no result" if content is None else "is damaged") in message


def test_suites(call: Command) -> None:
    outcome = call("suites")
    assert (outcome.status, outcome.err) == (0, "")
    for name in suite_names():
        assert name in outcome.out
    assert "(control)" in outcome.out


@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_names_of_suites_are_whole_at_any_width(width: str) -> None:
    table = suites_table([load_suite(name) for name in suite_names()])
    page = io.StringIO()
    Console(file=page, width=int(width)).print(table)
    assert all(f" {name} " in page.getvalue() for name in suite_names())


def test_suites_show(call: Command) -> None:
    outcome = call("suites", "show", "occupations", "--examples", "2")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("occupations (version ")
    assert outcome.out.count("group ") >= 2
    assert "source: " in outcome.out
    assert outcome.out.count(" user: ") + outcome.out.count(" assistant: ") >= 2
    assert "{marker}" not in outcome.out


def test_version(call: Command) -> None:
    assert call("--version") == Outcome(0, f"secateur {secateur.__version__}", "")


def test_help_names_every_command(call: Command) -> None:
    outcome = call("--help")
    assert outcome.status == 0
    for name in ("audit", "repair", "apply", "show", "suites"):
        assert name in outcome.out
