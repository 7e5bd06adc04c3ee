"""Where repairs hold: pairs of suites, joint fits, single scenarios, overlap of units, and what follows from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import Command, Outcome, save_model, small_suite, write_suite, write_text
from hypothesis import given
from hypothesis import strategies as st
from test_runs import counted, interrupt_after
from tiny import tiny_model

import secateur
from secateur.errors import NumericalError, SettingError, SuiteError
from secateur.evaluation.evaluator import Evaluator
from secateur.measures.disparity import Comparison, Interval, Table, compare, p_value, statistics
from secateur.measures.overlap import overlap
from secateur.measures.splits import split
from secateur.scoring.attribution import Attribution
from secateur.search.combining import RULES, ranks
from secateur.search.methods import methods_of
from secateur.studies import leave_one_out as singles
from secateur.studies import verdict
from secateur.studies.advice import Use, advise
from secateur.studies.agreement import per_layer
from secateur.studies.candidates import Candidates
from secateur.studies.fitting import Fitting
from secateur.studies.generalise import GeneraliseSettings, generalise, notes
from secateur.studies.judging import Judging, with_holm
from secateur.studies.parts import Parts
from secateur.studies.reach import FOREIGN_TEXT, Cell, Summary
from secateur.studies.record import Recorder
from secateur.studies.relations import differences, joint_sources, relation
from secateur.studies.runs import list_runs
from secateur.studies.summary import Squares, summarise, verdict_of
from secateur.studies.summary import with_holm as with_holm_of_rows
from secateur.suites import Suite, load_suite
from secateur.suites.joining import joined, spaced
from secateur.units import Mask, UnitSpace

PASSING = 2
COUNTS = ("--set", "attribution.max_heads=1", "--set", "attribution.max_neurons=4", "--set", "attribution.rounds=1")
OTHER_THINGS = {
    "cups": [f"a {c} cup" for c in ("red", "blue", "green", "grey", "brown", "white", "black", "amber")],
    "hats": [f"a {c} hat" for c in ("red", "blue", "green", "grey", "brown", "white", "black", "amber")],
}


def document(name: str, words: str = "", **changes: Any) -> dict[str, Any]:
    """The small suite under another name, its prompts begun with some words."""
    suite = small_suite(name=name, domain=name, **changes)
    for scenario in suite["scenarios"]:
        scenario["paraphrases"] = [f"{words}{text}" for text in scenario["paraphrases"]]
    return suite


def suites(directory: Path) -> list[str]:
    """Three suites of one family, and one of another attribute."""
    made = [document("one"), document("two", "Well. "), document("three", "Oh. ")]
    made.append(document("four", attribute="ware", groups=OTHER_THINGS))
    return [str(write_suite(directory, one, one["name"])) for one in made]


def run(call: Command, directory: Path, output: Path, *options: str, count: int = 4) -> Outcome:
    inputs = ("-m", save_model(directory / "model", PASSING), "--suites", ",".join(suites(directory)[:count]))
    text = ("--utility-text", write_text(directory), "--control-suite", "none", "--random-draws", "1")
    return call(
        "generalise",
        *inputs,
        *text,
        *COUNTS,
        "--max-perplexity-increase",
        "5",
        "--device",
        "cpu",
        "-o",
        output,
        *options,
    )


def test_every_pair_is_judged_and_written(tmp_path: Path, output: Path, call: Command) -> None:
    outcome = run(call, tmp_path, output, "--modes", "all", "--scenarios-left-out", "2")
    assert (outcome.status, outcome.err) == (0, "")
    files = {
        "generalise.csv",
        "generalise.json",
        "measured.sqlite",
        "overlap.csv",
        "plans",
        "report.html",
        "summary.csv",
        "within.csv",
    }
    assert {path.name for path in output.iterdir()} == files
    result = json.loads((output / "generalise.json").read_text())
    chosen = {fit["source"] for fit in result["fits"] if fit["status"] == "chosen"}
    joint = {f"all but {name}" for name in ("one", "two", "three")} | {"all thing-en"}
    assert {fit["source"] for fit in result["fits"]} == {"one", "two", "three", "four"} | joint
    assert chosen
    pairs = {(cell["source"], cell["target"]): cell["relation"] for cell in result["cells"]}
    names = ("one", "two", "three", "four")
    expected = {(source, target) for source in names for target in names}  # with a repair or without
    expected |= {(f"all but {name}", name) for name in names[:3]} | {("all thing-en", name) for name in names[:3]}
    expected |= {("random masks", name) for name in names}  # also where a use has no repair of its own
    assert set(pairs) == expected
    for cell in result["cells"]:
        assert cell["repaired"] == (cell["relation"] == "random" or cell["source"] in chosen)
        if not cell["repaired"]:
            assert (cell["faults"], cell["reduction"]["value"]) == (["no repair found"], 0)
            assert (cell["after"], cell["p_holm"]) == (cell["before"], 1)
    for (source, target), how in pairs.items():
        if source in names and target in names:
            assert how == ("own" if source == target else "attributes" if "four" in (source, target) else "across")
    assert {(one["suite"], one["mode"], one["rule"]) for one in result["left_out"]} == {
        (name, mode, rule) for name in names for mode, rule in [("specific", ""), *(("within", rule) for rule in RULES)]
    }
    rows = list(csv.DictReader((output / "generalise.csv").open()))
    assert len(rows) == len(result["cells"])
    for row, cell in zip(rows, result["cells"], strict=True):
        assert row["interval"] == ("smallest and largest draw" if cell["relation"] == "random" else "95 %")
        assert float(row["change_percent_low"]) == pytest.approx(-100 * cell["reduction"]["high"])
        assert row["faults"] == "; ".join(cell["faults"])
        assert cell["proven"] == (not cell["faults"] and cell["relation"] != "random")
    assert [one["family"] for one in result["advice"]] == ["thing (en)", "ware (en)"]
    judged = {cell["relation"] for cell in result["cells"]}
    assert {row["relation"] for row in result["summary"]} == judged >= {"own", "across", "attributes", "random"}
    for row in result["summary"]:
        of = [cell for cell in result["cells"] if cell["relation"] == row["relation"]]
        assert row["pairs"] + row["set_aside"] == len(of)
    biased = sum(cell["p_before"] < 0.05 for cell in result["cells"] if cell["relation"] != "random")
    assert sum(row["biased"] for row in result["summary"] if row["relation"] != "random") == biased
    assert biased == 0
    assert result["verdict"].startswith("In none of 16 pairs of a fitted and a judged use could a bias ")
    assert result["verdict"].endswith("More markers to judge by may show more.")
    check_tables(output, result)
    assert "mean 0." in outcome.out  # the overlap
    page = (output / "report.html").read_text()
    assert "Where repairs hold" in page
    for words in (
        result["verdict"],
        "for other attributes",
        "no: no bias shown",
        "(draws)",
        "<td>random masks a target</td><td>1</td>",
        "thing (en)",
    ):
        assert words in page
    for source in chosen:
        assert f"<td>{source}</td>" in page
    shown = call("show", output)
    assert "change of B, held out" in shown.out
    assert result["verdict"] in shown.out
    assert result["verdict"] in outcome.out
    assert "%] (not proven: no bias shown" in " ".join(shown.out.split())
    assert "generalise" in call("runs", output.parent).out


def check_tables(output: Path, result: dict[str, Any]) -> None:
    """The tables hold the figures of the JSON."""
    overlaps = list(csv.DictReader((output / "overlap.csv").open()))
    for pair in result["agreements"]:
        rows = [row for row in overlaps if (row["one"], row["other"]) == (pair["one"], pair["other"])]
        whole, layers = rows[0], rows[1:]
        assert (whole["layer"], float(whole["by_chance"])) == ("all", pytest.approx(pair["found"]["by_chance"]))
        for name in ("shared", "union"):
            assert sum(int(row[name]) for row in layers) == int(whole[name]) == pair["found"][name]
    within = list(csv.DictReader((output / "within.csv").open()))
    for one in result["left_out"]:
        rows = [
            row
            for row in within
            if [row[key] for key in ("suite", "mode", "rule")] == [one[key] for key in ("suite", "mode", "rule")]
        ]
        assert [row["scenario"] for row in rows] == ["all", *(each["id"] for each in one["scenarios"])]
        assert float(rows[0]["reduction_value"]) == pytest.approx(one["comparison"]["reduction"]["value"])
        for row, each in zip(rows[1:], one["scenarios"], strict=True):
            assert float(row["smd_after"]) == pytest.approx(each["smd_after"])
            assert float(row["perplexity_increase_low"]) == pytest.approx(each["perplexity_increase"]["low"])


def test_a_cell_is_what_the_plan_does_on_the_target_part(tmp_path: Path, output: Path, call: Command) -> None:
    run(call, tmp_path, output, count=2)
    result = json.loads((output / "generalise.json").read_text())
    model = secateur.load(tmp_path / "model", device="cpu")
    settings = GeneraliseSettings(utility_text=tmp_path / "neutral.txt", control_suite=None)
    checked = 0
    for cell in result["cells"]:
        if cell["relation"] == "random":
            continue
        plan = secateur.load_plan(output / "plans" / "attribution" / cell["source"])
        test = Parts.prepare(model, load_suite(tmp_path / f"{cell['target']}.yaml"), settings).test
        with plan.applied(model):
            after = Table(test.prompts.table(test.on(test.prompts, None).y()), test.prompts.groups)
        expected = compare(test.evaluate().table, after)
        assert cell["after"]["value"] == pytest.approx(expected.after.value, abs=1e-4)
        assert cell["reduction"]["low"] == pytest.approx(expected.reduction.low, abs=1e-3)
        checked += 1
    assert checked >= 2


def test_an_interrupted_run_carries_on(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(call, tmp_path, tmp_path / "whole", "--modes", "across,joint", count=3)
    whole = json.loads((tmp_path / "whole" / "generalise.json").read_text())
    with interrupted_at(monkeypatch, 3):
        assert run(call, tmp_path, output, "--modes", "across,joint", count=3).status == 130
    assert "finished: attribution on one, attribution on two" in call("show", output).out
    assert "attribution on two" in call("runs", output.parent).out
    outcome = run(call, tmp_path, output, "--modes", "across,joint", count=3)
    assert "repairs that are there: 2" in outcome.out
    carried = json.loads((output / "generalise.json").read_text())
    for key in ("cells", "agreements", "layers", "advice"):
        assert carried[key] == whole[key]


@contextmanager
def interrupted_at(monkeypatch: pytest.MonkeyPatch, fit_number: int) -> Iterator[None]:
    """Let studies be interrupted when they come to a fit, while the context lasts."""
    fit, calls = Fitting._fit, iter(range(1, 100))

    def interrupted(self: Any, *arguments: Any, **options: Any) -> None:
        if next(calls) == fit_number:
            raise KeyboardInterrupt
        fit(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Fitting, "_fit", interrupted)
        yield


def test_the_cost_of_an_interrupted_run_is_that_of_all_its_sittings(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch) as models:
        for count in (2, 7, 9):  # while the unpruned model is measured, and in the middle of repairs
            with monkeypatch.context() as patch:
                interrupt_after(patch, count)
                assert run(call, tmp_path, output, count=2).status == 130
        outcome = run(call, tmp_path, output, count=2)
    assert "in 4 sittings: the run was carried on" in outcome.out
    result = json.loads((output / "generalise.json").read_text())
    spent = sum(model.usage.forward for model in models)
    assert 0.98 * spent < result["run"]["tokens_forward"] <= spent
    assert result["run"]["carried_on"] == 3
    assert result["run"]["tokens_backward"] == sum(model.usage.backward for model in models)
    assert 0 < sum(fit["tokens_forward"] for fit in result["fits"]) < result["run"]["tokens_forward"]
    assert 0 < sum(fit["seconds"] for fit in result["fits"]) < result["run"]["seconds"]


def test_mean_ablation_carries_on_with_the_same_random_masks(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(call, tmp_path, tmp_path / "whole", "--ablation", "mean", count=2)
    with interrupted_at(monkeypatch, 2):
        assert run(call, tmp_path, output, "--ablation", "mean", count=2).status == 130
    assert "repairs that are there: 1" in run(call, tmp_path, output, "--ablation", "mean", count=2).out
    whole, carried = (json.loads((path / "generalise.json").read_text()) for path in (tmp_path / "whole", output))
    assert any(cell["relation"] == "random" for cell in whole["cells"])
    assert carried["cells"] == whole["cells"]


def test_another_command_leaves_an_interrupted_run_alone(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_at(monkeypatch, 2):
        run(call, tmp_path, output, count=2)
    assert "interrupted run with other settings" in run(call, tmp_path, output, "--seed", "1", count=2).refusal
    wrong = ("--methods", "attribution,random", "--set", "random.heads=9999")
    assert "'heads' cannot be 9,999" in run(call, tmp_path, output, *wrong, count=2).refusal
    more = run(call, tmp_path, output, "--methods", "attribution,random", "--set", "random.heads=1", count=2)
    assert (more.status, "repairs that are there: 1" in more.out) == (0, True)
    methods = {fit["method"] for fit in json.loads((output / "generalise.json").read_text())["fits"]}
    assert methods == {"attribution", "random"}


def test_a_fit_with_other_settings_of_its_method_is_made_again(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_at(monkeypatch, 2):
        run(call, tmp_path, output, count=2)
    assert run(call, tmp_path, output, "--set", "attribution.max_heads=2", count=2).status == 0
    fits = json.loads((output / "generalise.json").read_text())["fits"]
    assert [fit["settings"]["max_heads"] for fit in fits] == [2, 2]


def study(directory: Path, **told: Any) -> tuple[Any, list[Suite], GeneraliseSettings]:
    """A tiny model, two suites and settings for a study of them."""
    made = [document("one"), document("two", "Well. ")]
    settings = GeneraliseSettings(
        utility_text=write_text(directory),
        control_suite=None,
        max_perplexity_increase=5,
        random_draws=0,
        options={"attribution": {"max_heads": 1, "max_neurons": 4, "rounds": 1}},
        **told,
    )
    model = secateur.load(save_model(directory / "model", PASSING), device="cpu")
    return model, [load_suite(write_suite(directory, told, told["name"])) for told in made], settings


def test_only_fits_that_were_taken_over_add_their_cost(tmp_path: Path) -> None:
    model, suites, settings = study(tmp_path)
    fresh = generalise(model, suites, settings)
    known = {(fit.method, fit.source): (replace(fit, tokens_forward=10**9), None) for fit in fresh.fits}
    assert generalise(model, suites, settings, remembered=known).run["tokens_forward"] >= 2 * 10**9
    stale = {key: (replace(fit, settings={}), None) for key, (fit, _) in known.items()}
    again = generalise(model, suites, settings, remembered=stale)
    assert again.run["tokens_forward"] == fresh.run["tokens_forward"]


@pytest.mark.usefixtures("chosen_anyway")
def test_answers_that_are_not_finite_at_home_leave_one_repair_out(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine = verdict.examine

    def failing(parts: Parts, *rest: Any) -> Any:
        if parts.test.prompts.suite.name == "one":
            raise NumericalError("The model's output is not finite.")
        return examine(parts, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(verdict, "examine", failing)
        with interrupted_at(monkeypatch, 2):
            run(call, tmp_path, output, count=2)
    outcome = run(call, tmp_path, output, count=2)
    assert (outcome.status, "repairs that are there: 1" in outcome.out) == (0, True)
    result = json.loads((output / "generalise.json").read_text())
    assert [fit["status"] for fit in result["fits"]] == ["not finite on test", "chosen"]
    assert result["fits"][0]["neurons"] + result["fits"][0]["heads"] > 0
    assert any("under the repair for one, answers on its own test part" in note for note in result["notes"])
    unrepaired = {cell["source"] for cell in result["cells"] if not cell["repaired"]}
    assert (unrepaired, {cell["source"] for cell in result["cells"]}) == ({"one"}, {"one", "two", "random masks"})
    assert not (output / "plans" / "attribution" / "one").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SettingError("No prompt has tokens after its marker; use another method."), "does not apply"),
        (NumericalError("The model gives no finite answers under a mask."), "not finite"),
    ],
)
@pytest.mark.usefixtures("chosen_anyway")
def test_what_shows_while_a_method_searches_leaves_one_repair_out(
    error: Exception, status: str, tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, failed = Attribution.score, list[str]()

    def failing(self: Attribution, fit: Evaluator, *rest: Any, **told: Any) -> Any:
        if fit.prompts.suite.name == "one":
            failed.append("one")
            raise error
        return score(self, fit, *rest, **told)

    monkeypatch.setattr(Attribution, "score", failing)
    modes = ("--modes", "across,specific")
    with interrupted_at(monkeypatch, 2):
        assert run(call, tmp_path, output, *modes, count=2).status == 130
    outcome = run(call, tmp_path, output, *modes, count=2)
    assert (outcome.status, "repairs that are there: 1" in outcome.out) == (0, True)
    assert len(failed) == 2, "once for a repair, once for single scenarios"
    result = json.loads((output / "generalise.json").read_text())
    assert [(fit["status"], fit["reason"]) for fit in result["fits"]] == [(status, str(error)), ("chosen", "")]
    assert {cell["source"] for cell in result["cells"] if cell["repaired"]} == {"two", "random masks"}
    assert {one["suite"] for one in result["left_out"]} == {"two"}
    for said in (f"attribution: no repair for one. {error}", f"attribution: no single scenarios of one. {error}"):
        assert said in result["notes"]
        assert said in outcome.out
        assert said in (output / "report.html").read_text()


def test_kl_is_not_measured_where_nothing_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("nothing of this study shows KL")

    monkeypatch.setattr("secateur.evaluation.evaluator.kl_divergence", refused)
    model, suites, settings = study(tmp_path)
    assert "chosen" in {fit.status for fit in generalise(model, suites, settings).fits}


def test_a_study_without_any_repair_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise SettingError("No prompt has tokens after its marker; use another method.")

    monkeypatch.setattr(Attribution, "score", failing)
    model, suites, settings = study(tmp_path)
    result = secateur.generalise(model, suites, output=tmp_path / "run", **told(settings))
    assert result.verdict == "No repair was found that could be judged."
    assert {fit.status for fit in result.fits} == {"does not apply"}


def told(settings: GeneraliseSettings) -> dict[str, Any]:
    """Settings as the Python API takes them."""
    return {one.name: getattr(settings, one.name) for one in fields(settings)}


def test_single_scenarios_are_carried_on(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = ("--modes", "across,specific,within")
    run(call, tmp_path, tmp_path / "whole", *modes, count=2)
    leave_out, asked = singles.leave_one_out, list[str]()

    def interrupted(parts: Parts, *rest: Any) -> Any:
        asked.append(parts.fit.prompts.suite.name)
        if asked == ["one", "two"]:
            raise KeyboardInterrupt
        return leave_out(parts, *rest)

    monkeypatch.setattr(singles, "leave_one_out", interrupted)
    assert run(call, tmp_path, output, *modes, count=2).status == 130
    assert run(call, tmp_path, output, *modes, count=2).status == 0
    assert asked == ["one", "two", "two"]
    whole, carried = (json.loads((path / "generalise.json").read_text()) for path in (tmp_path / "whole", output))
    assert carried["left_out"] == whole["left_out"]


def test_single_scenarios_that_were_asked_otherwise_are_done_again(tmp_path: Path) -> None:
    model, suites, settings = study(tmp_path, modes=("specific",))
    kept = dict[tuple[str, str], singles.OneByOne]()

    def remember(found: singles.OneByOne) -> None:
        kept[found.method, found.suite] = found

    fresh = generalise(model, suites, settings, remember_singles=remember)
    known = {key: replace(one, found=[], reason="known") for key, one in kept.items()}
    assert generalise(model, suites, settings, remembered_singles=known).left_out == []
    for other in ({"modes": ("specific", "within")}, {"scenarios_left_out": 2}):
        assert generalise(model, suites, replace(settings, **other), remembered_singles=known).left_out
    assert len(fresh.left_out) == len(suites)


@pytest.mark.usefixtures("chosen_anyway")
def test_joint_plans_can_be_verified_and_exported(tmp_path: Path, output: Path, call: Command) -> None:
    assert run(call, tmp_path, output, "--modes", "joint", count=3).status == 0
    plans = output / "plans" / "attribution"
    told = ("-m", tmp_path / "model", "--runs", "2", "--classifier", "none", "--device", "cpu")
    refusal = call("verify", plans / "all-but-one", *told, "-o", tmp_path / "v0").refusal
    assert "suite 'one' is not a built-in one; name its file" in refusal
    refusal = call("verify", plans / "all-thing-en", *told, "-o", tmp_path / "v0").refusal
    assert "made for several suites; name the one to test on (--suite): one, two, three" in refusal
    for number, (plan, suite) in enumerate([("all-but-one", "one"), ("all-thing-en", "two")]):
        verified = call("verify", plans / plan, *told, "-s", tmp_path / f"{suite}.yaml", "-o", tmp_path / f"v{number}")
        assert (verified.status, verified.err) == (0, "")
    exported = call("export", plans / "all-but-one", "-m", tmp_path / "model", "-f", "peft", "-o", tmp_path / "adapter")
    assert exported.status == 0, exported.err
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| perplexity on neutral text |" in card
    assert "Measured on the test part of the neutral text" in card
    assert "Verdict: **measured**" in card


def test_a_joint_plan_is_tested_on_the_suite_that_was_left_out() -> None:
    family = [load_suite(f"{domain}-gender") for domain in ("hiring", "lending", "housing")]
    suite = joined(family[1:], "all-but-hiring-gender")
    mask = Mask.removing(tiny_model("llama"), [20])
    splits = split(suite, dealing="by text").describe(suite)
    record = {"suite": suite.name, "splits": splits, "settings": {"dealing": "by text", "seed": 0}}
    names = [one.name for one in family]
    plan = secateur.Plan(mask, {**record, "sources": names[1:], "target": "hiring-gender"})
    asked, _ = plan.held_out(None, {})
    assert asked.name == "hiring-gender"
    assert plan.seen(asked).markers
    with pytest.raises(SettingError, match="hiring-gender, lending-gender, housing-gender"):
        secateur.Plan(mask, {**record, "sources": names, "target": None}).held_out(None, {})


def test_answers_that_are_not_finite_count_as_no_repair(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, fit = Evaluator.evaluate, Fitting._fit

    def failing(self: Evaluator, mask: Any = None, *rest: Any, **options: Any) -> Any:
        if (getattr(mask, "fitted_on", None), self.prompts.suite.name) == ("one", "two"):
            raise NumericalError("The model's output is not finite.")
        return measure(self, mask, *rest, **options)

    def marking(self: Any, chosen: Any, source: str, *rest: Any, **options: Any) -> None:
        fit(self, chosen, source, *rest, **options)
        if (chosen.name, source) in self.masks:
            object.__setattr__(self.masks[chosen.name, source], "fitted_on", source)

    monkeypatch.setattr(Evaluator, "evaluate", failing)
    monkeypatch.setattr(Fitting, "_fit", marking)
    outcome = run(call, tmp_path, output, count=2)
    assert outcome.status == 0
    result = json.loads((output / "generalise.json").read_text())
    faults = {(cell["source"], cell["target"]): cell["faults"] for cell in result["cells"]}
    assert faults["one", "two"] == ["answers are not finite"]
    (summary,) = (row for row in result["summary"] if row["relation"] == "across")
    assert (summary["pairs"], summary["without_repair"] >= 1) == (2, True)


@pytest.fixture
def chosen_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate of every fit is its repair, though it may not lower the bias."""

    def choose_first(self: Candidates) -> Any:
        if self.failure is not None:
            return None
        mask, record = self.measured[0]
        self.measured[0] = mask, replace(record, chosen=True)
        return mask

    monkeypatch.setattr(Candidates, "choose", choose_first)


@pytest.mark.usefixtures("chosen_anyway")
def test_markers_that_a_source_has_seen_are_left_out(tmp_path: Path) -> None:
    """Two suites share markers, but deal them into other parts."""
    groups = {"boats": [*OTHER_THINGS["cups"][::-1], "a tin cup", "a tall cup"], "lamps": OTHER_THINGS["hats"]}
    paths = [
        write_suite(tmp_path, document("one", groups=OTHER_THINGS), "one"),
        write_suite(tmp_path, document("two", groups=groups), "two"),
    ]
    one, two = (load_suite(path) for path in paths)
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    result = secateur.generalise(
        model,
        [one, two],
        utility_text=write_text(tmp_path),
        control_suite=None,
        max_perplexity_increase=5,
        random_draws=0,
        options={"attribution": {"max_heads": 1, "max_neurons": 4, "rounds": 1}},
    )

    def words(suite: Suite, part: str) -> set[str]:
        every = [marker for markers in suite.groups.values() for marker in markers]
        return {every[number] for number in getattr(split(suite, dealing="by text"), part).markers}

    assert len(result.cells) >= 2
    for cell in result.cells:
        source, target = (one if name == "one" else two for name in (cell.source, cell.target))
        unseen = words(target, "test") - words(source, "fit") - words(source, "select")
        assert cell.markers == len(unseen)
        assert cell.largest_random is None
        assert not cell.proven


@pytest.mark.usefixtures("chosen_anyway")
def test_random_masks_are_compared_on_what_the_cell_is_judged_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random mask is the repair of "one" itself: with the same scenarios and markers, its reduction is the cell's.

    There is no repair for "two", and random masks are judged there all the same; of its scenarios, "one" has seen two.
    """
    fit, unseen = Fitting._fit, Judging._unseen

    def only_one(self: Any, chosen: Any, source: str, *rest: Any, **options: Any) -> None:
        fit(self, chosen, source, *rest, **options)
        if source == "two":
            self.masks.pop((chosen.name, source), None)

    def fewer(self: Any, source: str, target: Suite) -> tuple[list[int], np.ndarray]:
        rows, keep = unseen(self, source, target)
        return (rows if source == target.name else rows[2:]), keep

    monkeypatch.setattr(Fitting, "_fit", only_one)
    monkeypatch.setattr(Judging, "_unseen", fewer)
    monkeypatch.setattr(Judging, "_random_masks", lambda _, masks: masks[:1])
    made = [document("one"), document("two", "Well. ")]
    result = secateur.generalise(
        secateur.load(save_model(tmp_path / "model", PASSING), device="cpu"),
        [write_suite(tmp_path, told, told["name"]) for told in made],
        utility_text=write_text(tmp_path),
        control_suite=None,
        max_perplexity_increase=5,
        options={"attribution": {"max_heads": 1, "max_neurons": 4, "rounds": 1}},
    )
    cells = {(cell.source, cell.target): cell for cell in result.cells}
    one, whole = cells["one", "two"], cells["random masks", "two"]
    assert one.scenarios < whole.scenarios
    assert one.reduction.value != pytest.approx(whole.reduction.value)
    for target in ("one", "two"):
        assert cells["one", target].largest_random == pytest.approx(cells["one", target].reduction.value)
        assert "random masks do as well" in cells["one", target].faults


def test_random_masks_have_the_size_of_the_largest_repair_that_is_judged() -> None:
    space = UnitSpace(heads=(2, 2), kv_heads=(1, 1), neurons=(5, 5), head_dim=4)

    def mask(*removed: int) -> Mask:
        return Mask(space, ~np.isin(np.arange(len(space)), removed), "model")

    asked = SimpleNamespace(random_draws=2, _seed=0)
    drawn = Judging._random_masks(asked, [mask(4), mask(1, 5, 6), mask(6, 7, 8, 9)])
    assert [(one.heads_removed, one.neurons_removed) for one in drawn] == [(1, 2)] * 2  # a head is more than a neuron
    assert Judging._random_masks(asked, []) == []


# Parts of it


def test_relations() -> None:
    suite = load_suite("hiring-race")
    assert relation(suite, suite) == "own"
    assert relation(suite, load_suite("lending-race")) == "across"
    assert relation(suite, load_suite("hiring-gender")) == "attributes"
    assert relation(suite, load_suite("hiring-race-es")) == "languages"
    assert differences(suite, suite) == ()
    assert differences(suite, load_suite("lending-gender")) == ("attribute", "domain")
    assert differences(suite, load_suite("hiring-race-es")) == ("language",)
    assert differences(load_suite("hiring-gender"), load_suite("religion")) == ("attribute",)  # of no one domain


def test_joined_suites_are_no_larger_than_one() -> None:
    others = [load_suite(f"{domain}-race") for domain in ("hiring", "lending", "housing")]
    suite = joined(others, "all-but-x")
    assert len(suite.scenarios) == max(len(one.scenarios) for one in others)
    assert suite.groups == others[0].groups
    by_suite = [sum(scenario.id.startswith(one.name) for scenario in suite.scenarios) for one in others]
    assert max(by_suite) - min(by_suite) <= 1
    assert {scenario.measure.kind for scenario in suite.scenarios} == {"quantity", "preference"}
    assert [len(joined(others, "x", size).scenarios) for size in (3, 7, 99)] == [3, 7, len(suite.scenarios)]
    assert split(suite, 3).fit.markers == split(others[0], 3).fit.markers  # so that joint fits hold the same ones out
    turned = others[1].model_copy(update={"groups": dict(reversed(others[1].groups.items()))})
    for other in (load_suite("hiring-gender"), turned):
        with pytest.raises(SuiteError, match="cannot be joined"):
            joined([others[0], other], "x")


def test_what_joint_repairs_are_fitted_and_judged_on() -> None:
    names = ("hiring-race", "lending-race", "housing-race", "hiring-gender", "lending-gender")
    found = {one.source: one for one in joint_sources([load_suite(name) for name in names])}
    assert list(found) == [*(f"all but {name}" for name in names[:3]), "all race-en"]
    left, together = found["all but lending-race"], found["all race-en"]
    assert [suite.name for suite in left.suites] == ["hiring-race", "housing-race"]
    assert [suite.name for suite in left.targets] == ["lending-race"]
    assert [suite.name for suite in together.targets] == [*names[:3]]
    assert (left.relation, together.relation) == ("joint", "together")


def test_names_of_joint_repairs_are_safe_and_differ() -> None:
    one = load_suite("hiring-race").model_copy(update={"attribute": "../Race & Ethnicity"})
    other = one.model_copy(update={"groups": dict(reversed(one.groups.items()))})
    family = [suite.model_copy(update={"name": f"use-{n}"}) for suite in (one, other) for n in range(3)]
    sources = [joint.source for joint in joint_sources(family) if joint.target is None]
    assert sources == ["all race-ethnicity-en", "all race-ethnicity-en-2"]


def test_overlap_by_simulation() -> None:
    rng = np.random.default_rng(0)
    heads, neurons = 12, 60
    one, other = (np.arange(4), np.arange(20)), (np.arange(2, 5), np.arange(15, 40))
    found = overlap(one, other, (heads, neurons))
    assert (found.shared, found.union) == (2 + 5, 5 + 40)
    assert found.jaccard == pytest.approx(7 / 45)
    drawn = np.array(
        [
            sum(
                len(np.intersect1d(rng.permutation(n)[: len(a)], rng.permutation(n)[: len(b)]))
                for n, a, b in zip((heads, neurons), one, other, strict=True)
            )
            for _ in range(4000)
        ]
    )
    total = 4 + 3 + 20 + 25
    assert found.by_chance == pytest.approx((drawn / (total - drawn)).mean(), abs=0.01)
    assert found.p_value == pytest.approx((drawn >= 7).mean(), abs=0.03)


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_overlap_is_a_share_and_symmetric(one: set[int], other: set[int]) -> None:
    a, b = (np.array(sorted(units), dtype=int) for units in (one, other))
    found, back = overlap([a], [b], [31]), overlap([b], [a], [31])
    assert (found.shared, found.union, found.jaccard) == (back.shared, back.union, back.jaccard)
    assert found.p_value == pytest.approx(back.p_value)
    assert 0 <= found.jaccard <= 1
    assert 0 < found.p_value <= 1
    if one == other and one:
        assert found.jaccard == 1


def test_combining_by_hand() -> None:
    scores = np.array([[3.0, 2.0, 1.0, -np.inf], [2.0, 9.0, 3.0, -np.inf]])
    assert ranks(scores).tolist() == [[0, 1, 2, 3], [2, 0, 1, 3]]
    assert RULES["intersection"](scores, 2).tolist() == [1, 0]
    assert RULES["mean score"](scores, 2).tolist() == [1, 0]
    assert RULES["mean rank"](scores, 2).tolist() == [1, 0]


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 25), st.randoms(use_true_random=False))
def test_combining_keeps_to_the_count(scenarios: int, units: int, count: int, random: Any) -> None:
    scores = np.array([[random.choice([-1.0, 0.0, 0.5, 2.0]) for _ in range(units)] for _ in range(scenarios)])
    for rule in RULES.values():
        chosen = rule(scores, count)
        assert len(set(chosen.tolist())) == len(chosen) == min(count, units)


@given(st.integers(2, 4), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_the_intersection_is_taken_as_deep_as_it_takes(scenarios: int, units: int, count: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(scenarios, units))

    def shared(depth: int) -> set[int]:
        """Units among the first so many of every scenario."""
        return set.intersection(*(set(np.argsort(-row)[:depth].tolist()) for row in scores))

    depth = next(depth for depth in range(units + 1) if len(shared(depth)) >= min(count, units))
    chosen = set(RULES["intersection"](scores, count).tolist())
    assert shared(depth - 1) <= chosen <= shared(depth)


def test_per_layer_counts_every_unit_once() -> None:
    space = UnitSpace(heads=(2, 2), kv_heads=(1, 1), neurons=(5, 5), head_dim=4)
    assert per_layer(space, np.array([0, 3, 4, 8, 9])) == [3, 2]


def table(gap: float, seed: int, scenarios: int = 6, markers: int = 16) -> Table:
    rng = np.random.default_rng(seed)
    groups = np.repeat([0, 1], markers)
    return Table(rng.normal(size=(scenarios, 2 * markers)) + gap * (groups == 0), groups)


def use(number: int, before: float, own: Table | None, shared: list[Table | None], together: str = "") -> Use:
    """A use with markers of its own; what was fitted on all others does as shared masks do."""
    asked = table(before, number)
    markers = tuple(f"{number}: {marker}" for marker in range(len(asked.groups)))
    return Use(
        name=f"use {number}",
        markers=markers,
        before=asked,
        p_before=0.001 if before else 0.5,
        own=own,
        shared=shared,
        random=[asked],
        together=together,
        left_out=shared[0] if together else None,
    )


@pytest.mark.parametrize(
    ("own", "shared", "choice"),
    [
        (0.1, 2.0, "one repair per use"),
        (0.3, 0.3, "repairs can be shared"),
        (2.0, 2.0, "leave as it is"),
    ],
)
def test_advice_follows_the_figures(own: float, shared: float, choice: str) -> None:
    uses = [use(n, 2.0, table(own, n), [table(shared, n), table(shared, n)]) for n in range(5)]
    if choice == "leave as it is":
        uses = [replace(one, own=one.before, shared=[one.before]) for one in uses]
    advice = advise("attribution", "gender (en)", uses)
    assert (advice.choice, advice.family) == (choice, "gender (en)")
    assert advice.difference is not None
    assert advice.difference.low <= advice.difference.value <= advice.difference.high


def test_advice_where_there_is_nothing_to_repair() -> None:
    assert advise("attribution", "x", [use(1, 0.0, table(0.0, 2), [table(0.0, 3)])]).choice == "leave as it is"
    assert "No use could be judged" in advise("attribution", "x", []).explanation


def test_advice_is_not_given_where_no_repair_from_elsewhere_was_judged() -> None:
    advice = advise("attribution", "x", [use(1, 2.0, table(0.1, 1), [])])
    assert advice.choice == "not decided"
    assert "bias on the test part of use 1" in advice.explanation


def test_a_repair_per_use_is_only_advised_where_own_repairs_help() -> None:
    advice = advise("attribution", "x", [use(n, 1.0, table(1.0, n + 50), [table(1.6, n)]) for n in range(5)])
    assert advice.difference is not None
    assert advice.difference.low > 0
    assert advice.choice == "not decided"


@pytest.mark.parametrize("shared", [0.3, 2.0])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"random": []}, "no random masks were judged"),
        ({"foreign_text": True}, "for text in another language alone"),
        ({"random": [table(2.0, 9), table(0.05, 9)]}, "random masks of their size do as well"),
    ],
)
def test_repairs_that_random_masks_or_another_text_leave_open_are_not_advised(
    shared: float, changes: dict[str, Any], words: str
) -> None:
    uses = [use(n, 2.0, table(0.3, n), [table(shared, n)]) for n in range(5)]
    assert advise("attribution", "x", uses).choice in ("one repair per use", "repairs can be shared")
    advice = advise("attribution", "x", [replace(one, **changes) for one in uses])
    assert advice.choice == "not decided"
    assert words in advice.explanation
    if len(changes.get("random", ())) == 2:  # the best of the draws
        assert advice.most_random is not None
        assert advice.most_random > 0.9
        assert f"The best random mask of their size changes it by {0 - advice.most_random:+.0%}." in advice.explanation


def test_a_repair_that_is_not_there_leaves_a_use_as_it_is_wherever_it_comes_from() -> None:
    own = advise("attribution", "x", [use(1, 2.0, None, [table(0.1, 1)])])
    shared = advise("attribution", "x", [use(1, 2.0, table(0.1, 1), [None])])
    assert own.own == shared.shared
    assert own.own is not None
    assert own.own.value == 0
    assert "On one use " in own.explanation


@pytest.mark.parametrize(
    ("together", "words"),
    [
        (("", ""), "stands for the mean over the repairs for each other use; the masks are under plans/gates"),
        (("", ""), "--modes joint would fit one repair for all uses"),
        (("gates/all-x", ""), "the one repair for all uses of the same groups for use 0, and else the mean over"),
    ],
)
def test_advice_says_which_repairs_are_shared(together: tuple[str, str], words: str) -> None:
    uses = [use(n, 2.0, table(0.1, n), [table(0.1, n)], one) for n, one in enumerate(together)]
    advice = advise("gates", "x", uses)
    assert words in advice.explanation
    assert (advice.choice, advice.unseen, advice.plan) == ("repairs can be shared", None, "")


@pytest.mark.parametrize(("after", "choice"), [(0.3, "one repair for all"), (2.0, "one repair per use")])
def test_one_repair_for_all_is_set_beside_repairs_of_their_own(after: float, choice: str) -> None:
    uses = [use(n, 2.0, table(0.3, n), [table(after, n)], "gates/all-x") for n in range(5)]
    uses = [replace(one, left_out=table(1.0, n)) for n, one in enumerate(uses)]
    advice = advise("gates", "x", uses)
    assert advice.choice == choice
    assert ("plans/gates/all-x" in advice.explanation) == (advice.plan == "plans/gates/all-x") == (after < 1)
    without = advise("gates", "x", [replace(one, together="", left_out=None) for one in uses])
    assert (advice.own, advice.shared, advice.difference) == (without.own, without.shared, without.difference)
    elsewhere = advise("gates", "x", [replace(one, shared=[one.left_out], together="") for one in uses])
    assert advice.unseen == elsewhere.shared
    assert "For a use not yet seen, what repairs for all other uses together do" in advice.explanation


def test_advice_is_given_by_family() -> None:
    """Repairs carry over among the uses of gender, and not among those of race."""
    names = [f"{domain}-{attribute}" for domain in ("hiring", "lending", "housing") for attribute in ("race", "gender")]
    asked = [load_suite(name) for name in names]
    number = {name: at for at, name in enumerate(names)}

    def judged(_: str, target: Suite) -> Use:
        shared = 2.0 if target.attribute == "race" else 0.1
        at = number[target.name]
        return replace(use(at, 2.0, table(0.1, at), [table(shared, at)] * 2), name=target.name)

    known = SimpleNamespace(fitted=SimpleNamespace(suites=asked), _seed=0, notes=[], _use=judged)
    advice = {one.family: one for one in Judging.advice(known, "attribution")}
    assert {name: one.choice for name, one in advice.items()} == {
        "race (en)": "one repair per use",
        "gender (en)": "repairs can be shared",
    }
    assert advice["race (en)"].uses == ("hiring-race", "lending-race", "housing-race")


def test_scenarios_are_drawn_for_every_use_by_itself() -> None:
    """Uses with the same figures and markers but scenarios of their own: an average over them is better known."""
    rng = np.random.default_rng(0)
    gaps, groups = rng.uniform(1.0, 3.0, size=(6, 1)), np.repeat([0, 1], 200)
    noise = rng.normal(size=(6, 400))
    before, after = (Table(noise + size * gaps**power * (groups == 0), groups) for size, power in ((1, 1), (0.3, 2)))
    markers = tuple(map(str, range(400)))
    uses = [Use(f"use {number}", markers, before, 0.001, after, [after], [before]) for number in range(4)]
    one, four = (advise("attribution", "x", uses[:count]).own for count in (1, 4))
    assert one is not None
    assert four is not None
    assert four.standard_error < 0.75 * one.standard_error  # half, but for the markers, which are the same


# What is proven


def cell(**changes: Any) -> Cell:
    """A cell that is proven, but for the changes."""
    proven = Cell(
        method="attribution",
        source="one",
        target="two",
        relation="across",
        differs=("domain",),
        markers=20,
        scenarios=6,
        p_before=0.001,
        before=Interval(1.0, 0.6, 1.4),
        after=Interval(0.4, 0.1, 0.7),
        reduction=Interval(0.6, 0.3, 0.9),
        change=Interval(-0.6, -0.9, -0.3),
        fall=Interval(0.84, 0.4, 1.2),
        fall_if_closed=Interval(1.0, 0.5, 1.5),
        mean_abs_smd=(1.1, 0.5),
        mean_abs_gap=(0.8, 0.4),
        largest_random=0.1,
        p_holm=0.01,
        p_if_closed=0.001,
    )
    return replace(proven, **changes)


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"largest_random": None}, ["no random masks judged"]),
        ({"largest_random": 0.6}, ["random masks do as well"]),
        ({"p_before": 0.05}, ["no bias shown"]),
        ({"before": Interval(1.0, 0.0, 1.4)}, []),
        ({"p_holm": 0.06}, ["may be chance"]),
        ({"reduction": Interval(0.6, -0.1, 0.9)}, ["may be chance"]),
        ({"p_holm": 0.06, "p_if_closed": 0.06},
         ["may be chance (the test part is too small to show even a full repair)"]),
        ({"p_holm": 0.06, "p_before": 0.5}, ["no bias shown", "may be chance"]),
        ({"p_if_closed": 0.06}, []),
        ({"change": Interval(0.6, 0.3, 0.9), "reduction": Interval(-0.6, -0.9, -0.3), "largest_random": -1.0},
         ["did not fall"]),
        ({"over_limit": True, "largest_random": None}, ["no random masks judged", "over the limit"]),
        ({"foreign_text": True}, ["perplexity is of a text in another language"]),
        ({"unusable": "no repair found", "largest_random": None}, ["no repair found"]),
    ],
)  # fmt: skip
def test_what_keeps_a_cell_from_being_proven(changes: dict[str, Any], faults: list[str]) -> None:
    found = cell(**changes)
    assert found.faults == faults
    assert found.proven == (not faults)


@pytest.mark.parametrize(
    ("languages", "text", "foreign"),
    [(("en", "en"), None, False), (("es", "es"), None, True), (("en", "es"), None, True), (("es", "en"), None, True),
     (("es", "es"), "texto.txt", False)],
)  # fmt: skip
def test_a_text_in_another_language_proves_nothing(languages: tuple[str, str], text: str | None, foreign: bool) -> None:
    home, target = (load_suite("hiring-race").model_copy(update={"language": language}) for language in languages)
    asked = SimpleNamespace(fitted=SimpleNamespace(settings=GeneraliseSettings(utility_text=text)))
    assert Judging._foreign_text(asked, home, target) == foreign


def test_cells_of_spanish_repairs_say_what_text_was_read(tmp_path: Path) -> None:
    model, (one, two), settings = study(tmp_path)
    settings = replace(settings, utility_text=None, utility_tokens=512, modes=("languages",))
    result = generalise(model, [one, two.model_copy(update={"language": "es"})], settings)
    faults = {(cell.source, cell.target): FOREIGN_TEXT in cell.faults for cell in result.cells}
    assert len(faults) >= 2
    assert all(said == ("two" in pair) for pair, said in faults.items())


NOTHING = Interval(0.0, 0.0, 0.3)
RISEN = {"fall": Interval(-0.6, -0.9, -0.3), "after": Interval(1.6, 1.3, 1.9), "reduction": Interval(-0.6, -0.9, -0.3)}


@pytest.mark.parametrize(
    ("changes", "label"),
    [({}, "-60*"), ({"p_before": 0.5}, "(-60)"), ({"over_limit": True}, "-60!"), (RISEN, "+60▲"),
     (RISEN | {"over_limit": True, "p_before": 0.5}, "(+60▲!)"), ({"unusable": "no repair found"}, "none"),
     ({"before": NOTHING, "after": NOTHING, "p_before": 0.5}, "(=)"),
     ({"before": NOTHING, "reduction": Interval(-1.0, -1.0, 1.0)}, "+100")],
)  # fmt: skip
def test_labels_of_cells(changes: dict[str, Any], label: str) -> None:
    assert cell(**changes).label == label


@pytest.mark.parametrize(
    ("changes", "rose"),
    [({}, True), ({"p_before": 0.5}, True), ({"p_holm": 0.06}, False), ({"relation": "random"}, False),
     ({"fall": Interval(-0.6, -0.9, 0.1)}, False), ({"before": NOTHING, "after": NOTHING}, False)],
)  # fmt: skip
def test_a_bias_that_rose_is_named(changes: dict[str, Any], rose: bool) -> None:
    risen = cell(fall=Interval(-0.6, -0.9, -0.3), after=Interval(1.6, 1.3, 1.9), reduction=Interval(-0.6, -0.9, -0.3))
    assert replace(risen, **changes).rose == rose
    assert not cell().rose


def test_p_values_are_corrected_within_a_question() -> None:
    """Seven pairs in other domains, one that differs in more, and those of another method: three families."""
    kinds: list[dict[str, Any]] = [{}] * 7
    kinds += [{"differs": ("attribute", "domain")}, {"method": "gates"}, {"method": "gates"}]
    aside = [cell(relation="random", p_holm=1.0), cell(unusable="no repair found", p_holm=1.0)]
    found = with_holm([*(cell(**kind) for kind in kinds), *aside])
    p = p_value(cell().fall)
    assert [one.p_holm for one in found] == pytest.approx([*[7 * p] * 7, p, 2 * p, 2 * p, 1.0, 1.0])


def test_a_reduction_as_a_change() -> None:
    assert Interval(0.6, -0.3, 0.9).as_change == Interval(-60, -90, 30)
    assert str(Interval(0.0, 0.0, 0.0).as_change.value) == "0.0"


# What it all comes to


def pairs(relation: Any, proven: int, biased: int, method: str = "attribution", **changes: Any) -> list[Cell]:
    """Cells of one relation, the first so many of which are proven; the last has no bias."""
    found = [
        cell(
            method=method,
            relation=relation,
            source=f"source {number}",
            target=f"target {number}",
            p_holm=0.01 if number < proven else 0.5,
            reduction=Interval(0.1 * (number + 1), 0.05, 0.9),
            largest_random=0.0,
            perplexity_increase=Interval(0.001 * number, 0.0, 0.1),
            **changes,
        )
        for number in range(biased)
    ]
    return [*found, replace(cell(method=method, relation=relation, **changes), p_before=0.3)]


def squares_of(cells: list[Cell]) -> dict[tuple[str, str], Squares]:
    """Made-up squares of every pair."""
    rng = np.random.default_rng(0)
    return {
        (one.source, one.target): Squares(
            rng.normal(0.5, 0.3, 2), rng.normal(0.5, 0.3, (2, 1000)), rng.normal(0.5, 0.3, 3)
        )
        for one in cells
    }


def test_a_summary_counts_pairs_and_takes_all_of_them_as_one_suite() -> None:
    cells = [*pairs("across", 1, 3), cell(relation="attributes", differs=("attribute", "domain"))]
    squares = squares_of(cells)
    across, attributes = summarise("attribution", cells, squares, {})
    assert (across.pairs, across.set_aside, across.biased, across.proven) == (4, 0, 3, 1)
    assert (across.without_repair, across.rose) == (0, 0)
    counted = [squares[one.source, one.target] for one in cells[:4]]
    before, after = np.sqrt(np.maximum(0, sum(one.value for one in counted) / 4))
    drawn = np.sqrt(np.maximum(0, sum(one.replicates for one in counted) / 4))
    assert across.pooled is not None
    assert (across.pooled.before.value, across.pooled.after.value) == pytest.approx((before, after))
    assert across.pooled.reduction.value == pytest.approx(1 - after / before)
    assert across.pooled.change.low == pytest.approx(np.percentile(drawn[1] - drawn[0], 2.5))
    assert across.perplexity_increase == pytest.approx(0.001)
    assert (attributes.pairs, attributes.set_aside, attributes.pooled) == (0, 1, None)


def test_random_masks_are_summed_up_by_their_smallest_and_largest_draw() -> None:
    cells = [cell(relation="random", differs=(), target=str(number)) for number in range(2)]
    squares = {"0": np.array([1.0, 0.64, 1.0, 0.3]), "1": np.array([1.0, 0.64, 0.62])}  # the last draw is not finite
    (row,) = summarise("attribution", cells, {}, squares)
    assert row.pooled is not None
    assert row.pooled.reduction == Interval(pytest.approx(0.15), pytest.approx(0.1), pytest.approx(0.2))
    assert row.pooled.before == Interval(1.0, 1.0, 1.0)
    assert (row.interval, row.perplexity_increase) == ("smallest and largest draw", None)


def summed_up(*cells: Cell) -> str:
    methods = {one.method: [each for each in cells if each.method == one.method] for one in cells}
    rows = [row for name, of in methods.items() for row in summarise(name, of, squares_of(of), {})]
    return verdict_of(rows, compared=True)


def test_the_verdict_says_where_repairs_help() -> None:
    home = [*pairs("own", 2, 3, differs=()), *pairs("own", 1, 2, "gates", differs=())]
    away = [*pairs("across", 0, 3), *pairs("across", 1, 2, "gates"), *pairs("joint", 0, 0)]
    said = (
        "Of 10 pairs of a fitted and a judged use with a bias, repairs are proven to lower it at home in 3 of 5, "
        "in other domains in 1 of 5."
    )
    assert summed_up(*home, *away) == f"{said} The most carried over: gates (1 of 2)."
    assert summed_up(*pairs("across", 0, 1)).endswith(
        "in 0 of 1. None is proven to carry over to a use that it was not fitted on."
    )
    assert summed_up(*pairs("own", 0, 0)).startswith("In none of one pair of a fitted and a judged use could a")
    alone = pairs("own", 0, 1)
    rows = summarise("attribution", alone, squares_of(alone), {})
    assert "without random masks to compare with nothing is proven" in verdict_of(rows, compared=False)
    assert verdict_of([], compared=True) == "No repair was found that could be judged."
    risen = {
        "fall": Interval(-0.6, -0.9, -0.3),
        "after": Interval(1.6, 1.3, 1.9),
        "reduction": Interval(-0.6, -0.9, -0.3),
    }
    away = [*pairs("across", 1, 2), cell(target="3", **risen), cell(target="4", unusable="no repair found")]
    assert summed_up(*away) == (
        "Of 4 pairs of a fitted and a judged use with a bias, repairs are proven to lower it in other domains in 1 of "
        "4. For 1 of all 5 pairs no repair was found. In 1 of all 5 pairs the bias is shown to have risen."
    )
    small = [*pairs("across", 0, 3, p_if_closed=0.2), *pairs("own", 0, 1)]
    assert "In 3 of these the test part is so small that even a repair which closes every gap" in summed_up(*small)
    assert summed_up(cell(unusable="no repair found")) == "No repair was found that could be judged."


def row(fall: float, low: float, **changes: Any) -> Summary:
    """A row of a summary with an interval of the fall of B^2 over its pairs."""
    reduction = Interval(0.3 if fall > 0 else -0.3, 0.1 if low > 0 else -0.5, 0.5)
    around = Interval(1.0, 0.8, 1.2)
    pooled = Comparison(around, around, reduction, Interval(0.0, -0.1, 0.1), Interval(fall, low, 2 * fall - low))
    found = Summary("attribution", "across", 9, 0, 0, 9, 9, 0, 0, 0, 0, pooled, "95 %", 0.01, largest_random=0.1)
    return replace(found, **changes)


def test_rows_are_corrected_for_all_rows_but_random_masks() -> None:
    rows = [row(1.0, 0.5), row(1.0, 0.2, method="gates"), row(0.1, -0.3), row(1.0, 0.5, relation="random")]
    rows.append(row(1.0, 0.5, pooled=None))
    found = with_holm_of_rows(rows)
    p = [p_value(one.pooled.fall) for one in rows[:3] if one.pooled is not None]
    assert [one.p_holm for one in found] == pytest.approx([3 * p[0], 2 * p[1], p[2], 1.0, 1.0])
    assert [one.lowered for one in found] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("changes", "lowered"),
    [({}, True), ({"p_holm": 0.06}, False), ({"largest_random": 0.3}, False), ({"largest_random": None}, False),
     ({"relation": "random"}, False), ({"pooled": None}, False), ({"foreign_text": True}, False)],
)  # fmt: skip
def test_when_repairs_are_shown_to_lower_bias_over_all_pairs(changes: dict[str, Any], lowered: bool) -> None:
    assert row(1.0, 0.5, **{"p_holm": 0.01, **changes}).lowered == lowered


def test_a_small_p_without_an_interval_shows_nothing() -> None:
    assert not row(1.0, -0.5, p_holm=0.01).lowered


def test_the_verdict_says_what_is_shown_over_all_pairs() -> None:
    shown = row(1.0, 0.5, p_holm=0.01, over_limit=2)
    assert verdict_of([shown], compared=True).endswith(
        "The counts are of single uses; over all pairs of a kind together, repairs by attribution lower the bias in "
        "other domains (-30% [-50%, -10%]; 2 of 9 pairs over the utility limit)."
    )
    both = verdict_of([replace(shown, relation="own", over_limit=0), replace(shown, over_limit=0)], compared=True)
    assert "lower the bias at home (-30% [-50%, -10%]) and in other domains (-30% [-50%, -10%])." in both
    assert "together" not in verdict_of([replace(shown, p_holm=0.2)], compared=True)


@pytest.mark.usefixtures("chosen_anyway")
def test_a_summary_is_of_its_cells(tmp_path: Path) -> None:
    model, suites, settings = study(tmp_path)
    result = generalise(model, suites, replace(settings, random_draws=2))
    assert [row.relation for row in result.summary] == ["own", "across", "random"]
    for row in result.summary:
        cells = [one for one in result.cells if one.relation == row.relation]
        assert row.pairs == len(cells) == 2
        assert row.pooled is not None
        # Roots of squares that are clipped at 0 can only be larger than the root of their mean.
        before = np.array([one.before.value for one in cells])
        assert row.pooled.before.value <= np.sqrt((before**2).mean()) + 1e-9
        if all(before > 0):
            assert row.pooled.before.value == pytest.approx(np.sqrt((before**2).mean()))
        assert row.pooled.after.low <= row.pooled.after.high


@pytest.mark.usefixtures("chosen_anyway")
def test_selection_rates_of_decisions_stand_before_and_after_the_repairs_for_them(tmp_path: Path) -> None:
    model, (one, two), settings = study(tmp_path)
    measure = one.scenarios[0].measure.model_copy(update={"favourable": "a"})
    decision = one.scenarios[0].model_copy(update={"measure": measure})
    one = one.model_copy(update={"scenarios": [decision, *one.scenarios[1:]]})
    kept: dict[str, Any] = {}
    found = generalise(model, [one, two], settings, remember=lambda fit, plan: kept.update({fit.source: plan}))
    assert [(state.use, state.state) for state in found.selections] == [
        ("one", "unpruned"),
        ("one", "attribution, its own repair"),
    ]
    test = Parts.prepare(model, one, settings).test
    for state, mask in zip(found.selections, (None, kept["one"].mask), strict=True):
        favourable = test.prompts.table((test.y(mask) > 0).astype(float))[0]  # (markers,)
        for number, group in enumerate(one.groups):
            rate = state.decisions[1].groups[group].rate.value
            assert rate == pytest.approx(favourable[test.prompts.groups == number].mean())
    assert found.as_dict()["selections"][0]["decisions"][1]["scenario"] == "like"


def test_random_masks_are_no_claim() -> None:
    assert not cell(relation="random").proven
    assert cell(relation="random").as_dict()["faults"] == []


def test_suites_of_different_measures_are_named_and_alike_ones_are_not() -> None:
    mixed = load_suite("hiring-race")
    one = mixed.scenarios[0].measure.kind
    plain = mixed.model_copy(
        update={"name": "plain", "scenarios": [each for each in mixed.scenarios if each.measure.kind == one]}
    )
    alike = [mixed, load_suite("lending-race")]
    assert not any("different measures" in note for note in notes(alike, GeneraliseSettings()))
    (said,) = (note for note in notes([*alike, plain], GeneraliseSettings()) if "different measures" in note)
    assert f"preference and quantity in hiring-race, lending-race; {one} in plain. " in said
    assert "standardised by the spread within groups" in said


def test_the_language_of_the_utility_text_is_told() -> None:
    suites = [load_suite(name) for name in ("hiring-race", "hiring-race-es")]
    assert any("English text, for suites in es" in note for note in notes(suites, GeneraliseSettings()))
    own = GeneraliseSettings(utility_text="text.txt")
    assert not any("English" in note for asked in (own,) for note in notes(suites, asked))
    assert not any("English" in note for note in notes(suites[:1], GeneraliseSettings()))


def test_p_value_agrees_with_the_interval() -> None:
    assert p_value(Interval(-1.96, -3.92, 0.0)) == pytest.approx(0.05, abs=1e-3)
    assert p_value(Interval(0.0, -1.0, 1.0)) == 1


def judged_singly(model: Any, suite: Suite, settings: GeneraliseSettings, *modes: str) -> list[singles.LeftOut]:
    """The modes "specific" and "within" of attribution on a suite."""
    chosen = methods_of(settings.methods, settings.options, settings.seed, quick=False)[0]
    return singles.leave_one_out(Parts.prepare(model, suite, settings), chosen, settings, Recorder(model), modes)


def test_a_scenario_left_out_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that is chosen without a scenario stays the same when the scenario's wordings change."""
    monkeypatch.setattr(singles, "SHARES", {"neurons": (0.02, 0.1, 0.3)})
    choose, chosen = singles._Run._choose, list[list[np.ndarray | None]]()

    def noting(self: Any, *asked: Any) -> Any:
        mask, cost = choose(self, *asked)
        chosen[-1].append(None if mask is None else mask.removed)
        return mask, cost

    monkeypatch.setattr(singles._Run, "_choose", noting)
    model, (suite, _), settings = study(tmp_path)
    before = []
    for words in ("", "Something else: "):
        changed = document("one")
        last = changed["scenarios"][-1]
        last["paraphrases"] = [f"{words}{text}" for text in last["paraphrases"]]
        chosen.append([])
        found = judged_singly(model, load_suite(write_suite(tmp_path, changed, "one")), settings, "within")
        before.append(found[0].scenarios[-1].smd_before)
    assert before[0] != before[1]
    without = [masks[len(suite.scenarios) - 1 :: len(suite.scenarios)] for masks in chosen]  # the last one left out
    assert len(without[0]) == len(RULES)
    assert len({len(mask) for mask in without[0] if mask is not None}) > 1, "no rule has a choice"
    for one, other in zip(*without, strict=True):
        np.testing.assert_array_equal(one, other)


def test_single_scenarios_measure_only_what_they_are_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the unpruned model again, nor what a mask does to scenarios that it was not fitted on."""
    model, (suite, _), settings = study(tmp_path)
    mask, measured, asked = Mask.removing(model, [0]), singles._measured, list[tuple[int, ...]]()

    def noting(part: Evaluator, mask: Mask, *, utility: bool = False) -> Any:
        if not utility:
            asked.append(tuple(part.prompts.scenarios))
        return measured(part, mask, utility=utility)

    monkeypatch.setattr(singles, "_measured", noting)
    parts = Parts.prepare(model, suite, settings)
    parts.measure_unpruned(Recorder(model))
    chosen = methods_of(settings.methods, settings.options, settings.seed, quick=False)[0]
    run = singles._Run(parts, chosen, settings, Recorder(model), None)
    everything, rule = parts.fit.prompts.scenarios, RULES["mean rank"]
    monkeypatch.setattr(run, "_masks", lambda *_: iter([]))
    before = model.usage.copy()
    run.judge("specific", "", everything, lambda one: [one], rule)
    assert (model.usage.since(before).forward, asked) == (0, [])
    monkeypatch.setattr(run, "_masks", lambda *_: iter([mask]))
    monkeypatch.setattr(singles, "corrected_choice", lambda *_: 0.0)  # so that no mask is chosen
    run.judge("within", "mean rank", everything, lambda one: [other for other in everything if other != one], rule)
    assert asked == [(1, 2), (0, 2), (0, 1)]


def test_a_mask_that_leaves_no_finite_answers_counts_as_no_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (suite, _), settings = study(tmp_path)
    mask = Mask.removing(model, [0, UnitSpace.of(model).n_heads + 3])
    measured, broken = singles._measured, [suite.scenarios[1].id]

    def failing(part: Evaluator, mask: Mask, **told: Any) -> Any:
        asked = [part.prompts.suite.scenarios[number].id for number in part.prompts.scenarios]
        return None if asked == broken else measured(part, mask, **told)

    monkeypatch.setattr(singles._Run, "_choose", lambda *_: (mask, 0.25))
    (whole,) = judged_singly(model, suite, settings, "specific")
    monkeypatch.setattr(singles, "_measured", failing)
    (found,) = judged_singly(model, suite, settings, "specific")
    assert [one.id for one in found.scenarios] == [one.id for one in whole.scenarios]
    assert (found.not_finite, found.over_limit, whole.not_finite) == (1, whole.over_limit + 1, 0)
    kept, lost = found.scenarios[0], found.scenarios[1]
    assert kept == whole.scenarios[0]
    assert (lost.perplexity_increase, lost.over_limit, lost.units) == (None, True, 2)
    assert (lost.smd_after, lost.gap_after) == (lost.smd_before, lost.gap_before)
    assert found.comparison.before == whole.comparison.before
    assert found.comparison.after != whole.comparison.after
    assert found.perplexity_increase == pytest.approx(whole.perplexity_increase)
    assert singles.LeftOut.from_dict(json.loads(json.dumps(asdict(found)))) == found
    nothing = replace(found, scenarios=[lost])
    assert (nothing.perplexity_increase, nothing.as_dict()["not_finite"]) == (None, 1)


def test_single_scenarios_are_judged_on_the_test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (suite, _), settings = study(tmp_path)
    space = UnitSpace.of(model)
    mask = Mask.removing(model, [0, space.n_heads + 3, space.n_heads + 50])
    drawn = Mask.removing(model, [space.n_heads + 7])
    monkeypatch.setattr(singles._Run, "_choose", lambda *_: (mask, 0.25))
    monkeypatch.setattr(Mask, "random_like", lambda *_: drawn)
    parts = Parts.prepare(model, suite, settings)
    chosen = methods_of(settings.methods, settings.options, settings.seed, quick=False)[0]
    told = replace(settings, max_perplexity_increase=0.001)
    (found,) = singles.leave_one_out(parts, chosen, told, Recorder(model), ["specific"])
    test = parts.test
    before, after, random = (test.evaluate(one, utility=True).table for one in (None, mask, drawn))
    cost = test.perplexity_increase(mask)
    for row, one in enumerate(found.scenarios):
        for state, name in ((before, "before"), (after, "after")):
            for figure in ("smd", "gap"):
                assert getattr(one, f"{figure}_{name}") == pytest.approx(statistics(state)[figure][row], rel=1e-3)
        assert (one.id, one.units) == (suite.scenarios[row].id, 3)
        assert one.perplexity_increase.high == pytest.approx(cost.high, abs=1e-5)
        assert (one.over_limit, one.select_perplexity_increase) == (cost.value > 0.001, 0.25)
    assert found.over_limit == 3 * (cost.value > 0.001)
    assert found.perplexity_increase == pytest.approx(cost.value, abs=1e-5)
    assert found.random_reduction == pytest.approx(compare(before, random).reduction.value, abs=1e-4)


def test_the_count_that_leaves_least_bias_within_the_limit_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"few": table(1.0, 1), "some": table(0.3, 1), "many": table(0.8, 1), "most": table(0.1, 1)}
    costs = {"few": 0.001, "some": 0.002, "many": 0.01, "most": 0.5}
    choosing = object.__new__(singles._Run)
    choosing.settings, choosing.parts = GeneraliseSettings(), SimpleNamespace(select=None)
    choosing._select = lambda _: None
    monkeypatch.setattr(singles, "_unpruned", lambda *_: table(2.0, 1))
    choosing.reader = SimpleNamespace(perplexity_increase=lambda mask, _: Interval(*[costs[mask]] * 3))
    monkeypatch.setattr(singles, "_measured", lambda _, mask, **__: left[mask])
    for order in (list(left), list(left)[::-1]):
        choosing._masks = lambda *_, order=order: iter(order)
        assert choosing._choose([*range(6)], RULES["mean score"]) == ("some", 0.002)
    choosing._masks = lambda *_: iter(["most"])
    assert choosing._choose([*range(6)], RULES["mean score"]) == (None, 0.0)


def test_units_without_a_score_are_never_chosen() -> None:
    choosing = object.__new__(singles._Run)
    choosing.start, choosing.counts, choosing.numbers = 10, [1, 4], [0, 1]
    choosing.scores = np.array([[3.0, np.nan, -1.0, 2.0, -np.inf], [2.0, 9.0, np.nan, 3.0, 1.0]])
    choosing.problem = SimpleNamespace(mask=lambda removed: set(removed.tolist()))
    for rule in RULES.values():
        assert list(choosing._masks([0, 1], rule))[-1] == {10, 13}
    assert list(choosing._masks([1], RULES["mean score"])) == [{11}, {11, 13, 10, 14}]


# What a user may get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suites", "hiring-race"), "at least two suites"),
        (("--suites", "hiring-race,hiring-race"), "named twice"),
        (("--suites", "hiring-race,hiring-rase"), "There is no suite 'hiring-rase'"),
        (("--suites", "hiring-race,lending-race", "--methods", "attribution", "fasp"), "separate methods by commas"),
        (("--suites", "hiring-race,lending-race", "--modes", "across", "joint"), "separate modes by commas"),
        (("--suites", "hiring-race,lending-race", "--modes", "sideways"), "Unknown mode 'sideways'"),
        (
            ("--suites", "hiring-race,lending-race", "--modes", "languages"),
            "no two of these suites make such a pair; add across",
        ),
        (("--suites", "hiring-race,lending-race", "--modes", "joint"), "at least 3 suites"),
        (("--suites", "hiring-race,lending-race", "--methods", "attributon"), "did you mean 'attribution'"),
        (("--suites", "hiring-race,lending-race", "--max-test-markers", "1"), "max_test_markers must be at least 2"),
        (("--suites", "hiring-race,lending-race", "--max-scenarios", "-1"), "max_scenarios must be at least 1"),
        (("--suites", "hiring-race,lending-race", "--set", "rounds=1"), "names no method"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str, output: Path, call: Command) -> None:
    assert message in call("generalise", *options, "-o", output).refusal
    assert not output.parent.exists()


def test_a_suite_without_a_part_to_hold_out(tmp_path: Path, output: Path, call: Command) -> None:
    poor = document("poor")
    poor["scenarios"][0]["paraphrases"] = poor["scenarios"][0]["paraphrases"][:2]
    paths = [write_suite(tmp_path, poor, "poor"), write_suite(tmp_path)]
    refusal = call("generalise", "-s", paths[0], "-s", paths[1], "-o", output).refusal
    assert "needs at least 3, to fit, select and test" in refusal


def test_results_of_another_version(tmp_path: Path, call: Command) -> None:
    advice = [{"method": "attribution", "family": "gender (en)", "choice": "one repair per use"}]
    for name, content in (
        ("older", {"advice": advice}),
        ("old", {"format": "secateur-generalise-0", "advice": advice}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generalise.json").write_text(json.dumps({**content, "cells": []}))
        assert "another version of Secateur" in call("show", tmp_path / name).refusal
    summaries = {run.path.name: run.summary for run in list_runs(tmp_path)}
    assert summaries == dict.fromkeys(("older", "old"), "written by another version of Secateur, or damaged")


def test_a_few_scenarios_are_asked_of(tmp_path: Path) -> None:
    many = document("one")
    many["scenarios"] = [{**many["scenarios"][0], "id": f"like-{number}"} for number in range(9)]
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    suite = load_suite(write_suite(tmp_path, many, "one"))
    parts = Parts.prepare(model, suite, GeneraliseSettings(max_scenarios=3))
    assert parts.fit.prompts.scenarios == parts.test.prompts.scenarios == [0, 4, 8]
    quick = GeneraliseSettings(quick=True).reduced()
    assert Parts.prepare(model, suite, quick).test.prompts.scenarios == [0, 3, 5, 8]
    assert GeneraliseSettings(quick=True, max_scenarios=2).reduced().max_scenarios == 2


@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_spaced_numbers(total: int, most: int | None) -> None:
    numbers = spaced(total, most)
    assert len(set(numbers)) == len(numbers) == (total if most is None else min(most, total))
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] < total
