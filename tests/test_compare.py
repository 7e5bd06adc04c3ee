"""Comparing and localising from end to end on a tiny model."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Command, Outcome, save_model, write_suite, write_text
from safetensors.numpy import load_file
from tiny import all_logits, tiny_model

import secateur
from secateur.api import compare as compare_again
from secateur.errors import NumericalError, SettingError
from secateur.evaluation import Evaluator
from secateur.measures.disparity import Interval
from secateur.scoring.name_attention import NameAttention
from secateur.search.elimination import Elimination
from secateur.search.methods import METHODS, method
from secateur.studies.compare import CompareSettings, MethodResult, with_holm
from secateur.studies.parts import Parts

HEADS, NEURONS = 8, 96
COMPARED = ("attribution", "random")
PASSING = 2  # seed of a tiny model: a method finds something on the small suite


def run(call: Command, directory: Path, output: Path, *options: str, methods: str = ",".join(COMPARED)) -> Outcome:
    inputs = ("-m", save_model(directory / "model", PASSING), "-s", write_suite(directory))
    text = ("--utility-text", write_text(directory), "--control-suite", "none", "--random-draws", "3")
    chosen = ("--methods", methods, "--max-perplexity-increase", "5", "--device", "cpu")
    return call("compare", *inputs, *text, *chosen, "-o", output, *options)


def test_compare_writes_a_table_of_all_methods(tmp_path: Path, output: Path, call: Command) -> None:
    outcome = run(call, tmp_path, output)
    assert (outcome.status, outcome.err) == (0, "")
    assert sorted(path.name for path in output.iterdir()) == [
        "compare.csv",
        "compare.json",
        "measured.sqlite",
        "report.html",
    ]
    result = json.loads((output / "compare.json").read_text())
    assert {found["name"] for found in result["methods"]} == set(COMPARED)
    reductions = [found["reduction"]["value"] for found in result["methods"] if found["reduction"] is not None]
    assert reductions == sorted(reductions, reverse=True)
    for found in result["methods"]:
        assert found["candidates"]
        assert (found["reduction"] is None) == (found["status"] != "chosen")
        assert sum(candidate["chosen"] for candidate in found["candidates"]) == (found["status"] == "chosen")
        assert found["tokens_forward"] >= found["localise_tokens"]
    rows = list(csv.DictReader((output / "compare.csv").open()))
    assert [row["method"] for row in rows] == [found["name"] for found in result["methods"]]
    for row, found in zip(rows, result["methods"], strict=True):
        assert row["p_holm"] == ("" if found["p_holm"] is None else str(found["p_holm"]))
        assert (found["p_holm"] is None) == (found["reduction"] is None)
    page = (output / "report.html").read_text()
    assert ("chosen by the test part, so its figure is likely too good" in page) == (len(reductions) > 1)
    assert ("chosen by the test part, so its figure is likely too good" in outcome.out) == (len(reductions) > 1)
    for name in COMPARED:
        assert f"<td>{name}" in page
        assert name in outcome.out
    assert call("show", output).status == 0


@pytest.mark.parametrize("limit", ["5", "0.000001"])
def test_random_shows_its_spread_whatever_it_chose(tmp_path: Path, output: Path, call: Command, limit: str) -> None:
    outcome = run(call, tmp_path, output, "--max-perplexity-increase", limit, methods="random")
    (found,) = json.loads((output / "compare.json").read_text())["methods"]
    assert len(found["random_reductions"]) == 3
    assert f"3 draws of {'the chosen' if found['status'] == 'chosen' else 'one'} size" in outcome.out
    assert "3 draws on the test part" in (output / "report.html").read_text()


def test_draws_are_few_only_where_nobody_asked_for_many() -> None:
    assert CompareSettings(quick=True).reduced().random_draws == 5
    assert CompareSettings(quick=True, random_draws=30).reduced().random_draws == 30


def test_methods_that_do_not_suit_the_model_are_listed_unless_asked_for(tmp_path: Path, output: Path) -> None:
    model = tiny_model("gpt2")
    told = {"utility_text": write_text(tmp_path), "control_suite": None, "random_draws": 1, "quick": True}
    with pytest.raises(SettingError, match=r"^fairness-pruning: .* do not have; set its importance to l2"):
        compare_again(model, write_suite(tmp_path), methods=("fairness-pruning",), **told)
    result = compare_again(model, write_suite(tmp_path), max_perplexity_increase=5, output=output, **told)
    unsuited = {found.name: found for found in result.methods if found.status == "does not apply"}
    assert set(unsuited) == {"fairness-pruning"}
    assert "set its importance to l2" in unsuited["fairness-pruning"].notes[0]
    assert {found.name for found in result.methods} == set(METHODS)
    assert "fairness-pruning (does not apply)" in (output / "report.html").read_text()


def test_a_mask_that_leaves_no_finite_answer_is_over_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluate = Evaluator.evaluate

    def broken(self: Evaluator, mask: Any = None, *arguments: Any, **options: Any) -> Any:
        if mask is not None and mask.neurons_removed > 10:
            raise NumericalError("not finite")
        return evaluate(self, mask, *arguments, **options)

    monkeypatch.setattr(Evaluator, "evaluate", broken)
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    told = {"utility_text": write_text(tmp_path), "control_suite": None, "random_draws": 1}
    settings = {"methods": ("magnitude",), "max_perplexity_increase": 5, "output": tmp_path / "run", **told}
    (found,) = compare_again(model, write_suite(tmp_path), **settings).methods
    destroyed = [candidate for candidate in found.candidates if candidate.neurons > 10]
    assert destroyed
    assert not any(candidate.within_limit for candidate in destroyed)
    fields = json.loads((tmp_path / "run" / "compare.json").read_text())["methods"][0]
    again = MethodResult.from_dict(fields)
    assert [c.perplexity_increase for c in again.candidates] == [c.perplexity_increase for c in found.candidates]


def test_what_shows_late_ends_one_method_and_not_the_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: Path
) -> None:
    def late(self: Any, *arguments: Any) -> Any:
        raise SettingError("No prompt has tokens after its marker; use another method.")

    def destroyed(*arguments: Any) -> Any:
        raise NumericalError("not finite")

    monkeypatch.setattr(NameAttention, "score", late)
    monkeypatch.setattr("secateur.studies.verdict.examine", destroyed)
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    told = {"utility_text": write_text(tmp_path), "control_suite": None, "max_perplexity_increase": 5}
    result = compare_again(
        model, write_suite(tmp_path), methods=("name-attention", "attribution"), output=output, **told
    )
    found = {one.name: one for one in result.methods}
    assert found["name-attention"].status == "does not apply"
    assert found["name-attention"].notes[0].startswith("name-attention: No prompt has tokens after its marker; use")
    assert found["attribution"].status == "chosen"
    assert found["attribution"].over_limit
    assert "no finite answers on the test part" in found["attribution"].faults[0]
    assert "no finite answers on the test part" in (output / "report.html").read_text()


def test_a_search_without_finite_answers_ends_one_method_and_counts_its_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first candidate is there when the search breaks off; none is chosen."""

    def destroyed(*_: Any) -> Any:
        raise NumericalError("The model returned values that are not finite.")

    monkeypatch.setattr(Elimination, "_path", destroyed)
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    told = {"utility_text": write_text(tmp_path), "control_suite": None, "max_perplexity_increase": 5}
    result = compare_again(model, write_suite(tmp_path), methods=("attribution", "magnitude"), **told)
    found = {one.name: one for one in result.methods}
    broken = found["attribution"]
    assert (broken.status, broken.reduction, broken.notes) == (
        "not finite",
        None,
        ["attribution: The model returned values that are not finite."],
    )
    assert broken.candidates
    assert broken.tokens_forward > broken.localise_tokens > 0
    assert result.run["tokens_forward"] == model.usage.forward
    assert found["magnitude"].candidates


def test_random_draws_are_no_cost_of_the_method(tmp_path: Path) -> None:
    told = {"utility_text": write_text(tmp_path), "control_suite": None, "max_perplexity_increase": 5}
    costs = []
    for draws in (1, 4):
        model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
        result = compare_again(model, write_suite(tmp_path), methods=("random",), random_draws=draws, **told)
        (found,) = result.methods
        costs.append((found.tokens_forward, found.draw_tokens))
        assert result.run["tokens_forward"] == model.usage.forward
    assert costs[0][0] == costs[1][0]
    assert 4 * costs[0][1] > costs[1][1] > costs[0][1] > 0, "passes begin where masks begin to differ"
    (whole,) = compare_again(
        model, write_suite(tmp_path), methods=("random",), random_draws=4, kept_mib=0, **told
    ).methods
    assert whole.draw_tokens == 4 * costs[0][1]
    assert whole.random_reductions == pytest.approx(found.random_reductions, abs=1e-3)
    row = next(csv.DictReader(result.csv().splitlines()))
    assert int(row["random_draws"]) == 4
    assert float(row["random_lowest"]) <= float(row["random_mean"]) <= float(row["random_highest"])


def test_tokens_to_find_units_hold_the_trials(tmp_path: Path) -> None:
    """All that attribution forwards, but for what it measures on select and test."""
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    settings = CompareSettings(
        methods=("attribution",), max_perplexity_increase=5, control_suite=None, utility_text=write_text(tmp_path)
    )
    (found,) = compare_again(model, write_suite(tmp_path), **asdict(settings)).methods
    parts = Parts.prepare(model, secateur.load_suite(write_suite(tmp_path)), settings)
    measured = len(found.candidates) * parts.select.tokens + (found.status == "chosen") * parts.test.tokens
    assert found.tokens_forward - found.localise_tokens == measured


def test_a_choice_that_breaks_the_limit_on_test_comes_after_those_that_keep_to_it() -> None:
    def found(name: str, reduction: float, *faults: str, over_limit: bool = False) -> MethodResult:
        figures = {"reduction": Interval(reduction, 0, 1), "perplexity_increase": Interval(0.01, 0, 1)}
        told = {"faults": list(faults), "over_limit": over_limit}
        return MethodResult(name, {}, "chosen", [], 0, 0, 0, 0.0, **told, **figures)

    nothing = MethodResult("d", {}, "over the limit", [], 0, 0, 0, 0.0)
    over = found("b", 0.9, "perplexity rose by 5.00%, above the limit of 2%", over_limit=True)
    ordered = sorted([nothing, over, found("a", 0.2), found("c", 0.5, "no effect")], key=lambda one: one.order)
    assert [one.name for one in ordered] == ["c", "a", "b", "d"]


def test_p_values_are_corrected_for_all_methods_that_were_judged() -> None:
    def found(name: str, p_value: float | None, *faults: str, low: float = 0.1) -> MethodResult:
        reduction = None if p_value is None else Interval(0.5, low, 0.9)
        told = {"reduction": reduction, "p_value": p_value, "faults": list(faults)}
        return MethodResult(name, {}, "chosen" if reduction else "over the limit", [], 0, 0, 0, 0.0, **told)

    given = [found("a", 0.001), found("b", None), found("c", 0.02), found("d", 0.03, "over"), found("e", 0.6, low=-1)]
    corrected = {one.name: (one.p_holm, one.faults) for one in with_holm(given)}
    chance = "corrected for 4 methods (Holm), the fall can be chance (p = 0.06)"
    assert corrected == {
        "a": (pytest.approx(0.004), []),
        "b": (None, []),
        "c": (pytest.approx(0.06), [chance]),
        "d": (pytest.approx(0.06), ["over", chance]),
        "e": (pytest.approx(0.6), []),  # its interval includes no effect, which its faults say
    }
    assert with_holm([given[2]])[0].faults == []


def test_the_seed_of_a_study_is_that_of_its_methods_unless_it_is_set() -> None:
    assert method("random").seeded(3).scorer.seed == 3
    assert method("fasp").seeded(3).scorer.seed == 3
    assert method("random", {"seed": "7"}).seeded(3).scorer.seed == 7
    assert method("attribution").seeded(3).settings == method("attribution").settings


def test_show_tells_of_a_run_that_has_only_begun(tmp_path: Path, call: Command) -> None:
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "partial.json").write_text(json.dumps({"key": {}}))
    assert "no candidate was measured yet" in call("show", tmp_path / "run").out
    (partial / "partial.json").write_text(json.dumps({"key": {}, "methods": []}))
    assert "finished: no method yet" in call("show", tmp_path / "run").out


def test_compare_carries_on_where_it_was_interrupted(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "out" / "whole"
    assert run(call, tmp_path, whole).status == 0
    evaluate, seen = Evaluator.evaluate, []

    def stop_in_the_second_method(self: Evaluator, *arguments: Any, **options: Any) -> Any:
        state = output.with_name("run.partial") / "partial.json"
        if json.loads(state.read_text())["methods"]:
            raise KeyboardInterrupt
        seen.append(1)
        return evaluate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", stop_in_the_second_method)
        assert run(call, tmp_path, output).status == 130
    assert not output.exists()
    assert "finished: attribution" in call("show", output).out
    outcome = run(call, tmp_path, output)
    assert outcome.status == 0
    assert "Carrying on an interrupted run; finished: attribution" in outcome.out
    assert not output.with_name("run.partial").exists()
    same = ("name", "status", "heads", "neurons", "candidates", "reduction", "perplexity_increase", "random_reductions")
    one, other = (json.loads((place / "compare.json").read_text())["methods"] for place in (whole, output))
    assert [{k: m[k] for k in same} for m in one] == [{k: m[k] for k in same} for m in other]


def test_another_seed_does_not_carry_on(tmp_path: Path, output: Path, call: Command) -> None:
    partial = output.with_name("run.partial")
    partial.mkdir(parents=True)
    (partial / "partial.json").write_text(json.dumps({"key": {"model": "another"}, "methods": [{"name": "random"}]}))
    assert "interrupted run with other settings" in run(call, tmp_path, output, methods="random").refusal
    assert (partial / "partial.json").is_file()
    outcome = run(call, tmp_path, output, "--overwrite", methods="random")
    assert outcome.status == 0
    assert "Carrying on" not in outcome.out


def test_results_survive_their_json_form(tmp_path: Path) -> None:
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    result = compare_again(
        model,
        write_suite(tmp_path),
        methods=("attribution",),
        utility_text=write_text(tmp_path),
        control_suite=None,
        max_perplexity_increase=5,
    )
    (found,) = result.methods
    assert (found.status, found.p_holm) == ("chosen", found.p_value)
    assert MethodResult.from_dict(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "atribution"), "did you mean 'attribution'"),
        (("--methods", "random,random"), "named twice"),
        (("--set", "rounds=3"), "names no method"),
        (("--set", "fasp.seeds=3"), "'fasp', which is not compared"),
        (("--set", "attribution.rounds=-3"), "'rounds' of the method 'attribution'"),
        (("--random-draws", "0"), "random_draws must be at least 1"),
    ],
)
def test_bad_settings_of_a_comparison(
    tmp_path: Path, output: Path, call: Command, options: tuple[str, ...], said: str
) -> None:
    assert said in run(call, tmp_path, output, *options).refusal
    assert not output.parent.exists()


def test_quick_takes_less_of_everything() -> None:
    quick = CompareSettings(quick=True).reduced()
    assert (quick.max_markers, quick.max_test_markers, quick.utility_tokens, quick.random_draws) == (6, 10, 1536, 5)
    assert (quick.control_prompts, quick.max_scenarios) == (48, 10)
    assert CompareSettings(max_scenarios=3, quick=True).reduced().max_scenarios == 3
    assert CompareSettings(max_markers=3, quick=True).reduced().max_markers == 3
    assert CompareSettings().reduced() == CompareSettings()


def test_quick_leaves_alone_what_the_user_has_set() -> None:
    assert method("fasp").quick().settings["seeds"] == 1
    assert method("fasp", {"seeds": "2"}).quick().settings["seeds"] == 2
    assert method("attribution").quick().settings["rounds"] < method("attribution").settings["rounds"]
    assert method("attribution", {"rounds": "6"}).quick().settings["rounds"] == 6


@pytest.mark.parametrize("name", sorted(METHODS))
def test_localise_writes_scores_and_the_first_units(tmp_path: Path, output: Path, call: Command, name: str) -> None:
    inputs = ("-m", save_model(tmp_path / "model"), "-s", write_suite(tmp_path))
    text = ("--utility-text", write_text(tmp_path), "--device", "cpu")
    outcome = call("localise", *inputs, *text, "--method", name, "-o", output)
    assert (outcome.status, outcome.err) == (0, "")
    scores = load_file(output / "scores.safetensors")
    assert all(values.shape == (HEADS + NEURONS,) for values in scores.values())
    rows = list(csv.DictReader((output / "top.csv").open()))
    rank = scores["rank"][~np.isnan(scores["rank"])]
    assert len(rows) == min(200, len(rank)) > 0
    assert float(rows[0]["rank"]) == pytest.approx(rank.max(), rel=1e-5)
    model = secateur.load(tmp_path / "model", device="cpu")
    space = secateur.UnitSpace.of(model)
    for row in rows:
        flat = space.flat(secateur.Unit(row["kind"], int(row["layer"]), int(row["index"])))  # type: ignore[arg-type]
        assert float(row["rank"]) == pytest.approx(scores["rank"][flat], rel=1e-5)
    shown = call("show", output).out
    assert f"scored by {name}" in shown
    assert f"1 {rows[0]['kind']} {rows[0]['layer']}.{rows[0]['index']}" in shown


def test_methods_lists_them_all(call: Command) -> None:
    outcome = call("methods")
    assert outcome.status == 0
    assert all(name in outcome.out for name in METHODS)


def test_single_weights_are_removed_judged_and_written(tmp_path: Path, output: Path, call: Command) -> None:
    """The whole way of a weight mask: repair, plan, checkpoint, and the live model's answers from the checkpoint."""
    inputs = ("-m", save_model(tmp_path / "model", PASSING), "-s", write_suite(tmp_path), "--device", "cpu")
    text = ("--utility-text", write_text(tmp_path), "--control-suite", "none", "--max-perplexity-increase", "9")
    knobs = ("--method", "wanda-difference", "--set", "granularity=weight", "--set", "p=10", "--set", "q=5")
    outcome = call("repair", *inputs, *text, *knobs, "-o", output)
    result = json.loads((output / "result.json").read_text())
    assert outcome.status in (0, 3, 4)
    assert result["candidates"][0]["weights"] > 0
    if outcome.status == 4:
        pytest.fail("choose another model: nothing passed, so the rest is not tested")
    assert result["units"]["weights"] == result["candidates"][0]["weights"]
    assert f"{result['units']['weights']:,} single weights" in outcome.out
    model = secateur.load(tmp_path / "model", device="cpu")
    with secateur.load_plan(output).applied(model):
        live = all_logits(model)
    assert not torch.equal(live, all_logits(model))
    torch.testing.assert_close(all_logits(secateur.load(output / "checkpoint", device="cpu")), live)
