"""Whole audits and repairs of tiny models: what they write, what they refuse, what Ctrl-C leaves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import REPAIR, Command, Document, Outcome, save_model, small_suite, write_suite, write_text
from peft import PeftModel
from plotly.offline import get_plotlyjs
from tiny import all_logits, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.evaluation import Evaluator
from secateur.evaluation.evaluator import Measurement
from secateur.measures.disparity import Comparison, Interval, Table, group_means
from secateur.measures.prompts import Prompt, PromptSet
from secateur.reports.distributions import distributions
from secateur.reports.html import render_audit
from secateur.reports.terminal import audit_summary
from secateur.studies.audit import SampledCheck
from secateur.studies.candidates import CandidateRecord, Candidates, why_nothing
from secateur.studies.parts import Parts, fold_number, folds
from secateur.studies.repair import RepairSettings
from secateur.studies.verdict import Examination
from secateur.studies.verdict import judge as verdict_on
from secateur.suites import load_suite

PASSING, FAILING = 2, 3  # seeds of tiny models: a repair of the small suite finds something, or nothing
INTERVAL = {"value", "low", "high"}
ATTACK = "</script><script>alert(1)</script>"


def read(file: Path) -> Any:
    """JSON as a strict reader takes it: no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{file.name} holds {constant}")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def audit(call: Command, directory: Path, output: Path, document: Document | None = None) -> Outcome:
    model = save_model(directory / "model")
    suite = write_suite(directory, document)
    return call("audit", "-m", model, "-s", suite, "-o", output, "--device", "cpu")


def repair(
    call: Command, directory: Path, output: Path, *options: str | Path, seed: int = PASSING, limit: str = "5"
) -> Outcome:
    model = save_model(directory / "model", seed)
    inputs = ("-m", model, "-s", write_suite(directory), "--utility-text", write_text(directory))
    settings = ("--device", "cpu", "--set", "rounds=2", "--max-perplexity-increase", limit)
    return call("repair", *inputs, "-o", output, *REPAIR, *settings, *options)


# Reports


class Page(HTMLParser):
    """What a browser would make of a report: its attributes, its scripts and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.inside = tag
        if tag == "script":
            # Data are no script: no browser runs them.
            self.inside = "data" if ("type", "application/json") in attrs else tag
        if self.inside == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "data":
            self.text += data


def own_part(report: Path) -> str:
    """A report without Plotly's own bundle, which must be in it once."""
    html = report.read_text(encoding="utf-8")
    assert html.count(get_plotlyjs()) == 1
    return html.replace(get_plotlyjs(), "")


def assert_self_contained(report: Path) -> None:
    html = own_part(report)
    assert not re.search(r"""(src|href|action|poster)\s*=\s*["']?\s*(https?:)?//""", html)
    assert not re.search(r"@import|url\(", html)
    loading = [(n, v) for n, v in Page(html).attributes if n in ("src", "href", "action", "srcset", "data")]
    assert [value for _, value in loading if not value.startswith("#")] == []


# Audit


def test_audit_writes_figures_and_a_report(tmp_path: Path, output: Path, call: Command) -> None:
    outcome = audit(call, tmp_path, output)
    assert (outcome.status, outcome.err) == (0, "")
    assert sorted(path.name for path in output.iterdir()) == ["audit.json", "report.html"]
    assert [path.name for path in output.parent.iterdir()] == ["run"]
    result = read(output / "audit.json")
    assert result["suite"] == "small"
    assert result["model"] == str(tmp_path / "model")
    assert set(result["bias"]) == INTERVAL
    assert [scenario["id"] for scenario in result["scenarios"]] == ["like", "price", "end"]
    for scenario in result["scenarios"]:
        assert set(scenario["means"]) == {"boats", "lamps"}
        assert 0 < scenario["p_value"] <= scenario["p_holm"] <= 1
        assert scenario["smd"]["low"] <= scenario["smd"]["high"]
        assert scenario["id"] in outcome.out
    assert result["selections"] == []
    assert result["run"]["tokens_forward"] > 0
    assert result["run"]["tokens_backward"] == 0
    assert_self_contained(output / "report.html")


def test_audit_counts_selections_where_an_answer_is_favourable(tmp_path: Path, output: Path, call: Command) -> None:
    document = small_suite()
    document["scenarios"][0]["measure"]["favourable"] = "b"
    assert audit(call, tmp_path, output, document).status == 0
    mean, decision = read(output / "audit.json")["selections"]
    assert (mean["scenario"], decision["scenario"], decision["favourable"]) == (None, "like", [" no"])
    assert set(decision["groups"]) == {"boats", "lamps"}
    for group in decision["groups"].values():
        assert group["markers"] == 8
        assert group["rate"]["low"] <= group["rate"]["value"] <= group["rate"]["high"]
    html = (output / "report.html").read_text()
    assert ">all decisions (mean)</th>" in html
    share = f"{100 * decision['short_by_chance']:.0f} %"
    assert f'<td class="n" rowspan="2">{share}</td>' in html
    assert f"shuffled labels give a ratio below 0.80 in {share} of draws" in html


WHOLE_SUITE = "The model treats the groups differently: suite bias B = 0.30 [0.00, 0.60], permutation p = 0.049;"


@pytest.mark.parametrize(
    ("whole", "p_values", "verdict", "said"),
    [
        (0.049, (0.5, 0.5, 0.5), "bad", WHOLE_SUITE),
        (0.05, (0.5, 0.01, 0.5), "bad", "differently in some scenarios: 1 of 3 scenarios differ beyond chance"),
        (0.05, (0.5, 0.5, 0.5), "good", "No difference between the groups that exceeds chance was found"),
    ],
)
def test_the_verdict_of_an_audit_heeds_single_scenarios(
    whole: float, p_values: tuple[float, ...], verdict: str, said: str, tmp_path: Path
) -> None:
    model = secateur.load(save_model(tmp_path / "model"), device="cpu")
    found = secateur.audit(model, write_suite(tmp_path))
    scenarios = [replace(one, p_holm=p) for one, p in zip(found.scenarios, p_values, strict=True)]
    found = replace(found, bias=Interval(0.3, 0.0, 0.6), p_value=whole, scenarios=scenarios)
    html = render_audit(found)
    assert f'<div class="verdict {verdict}">' in html
    text = " ".join(Page(html).text.split())
    assert said in text
    assert ("95 % upper bound 0.60" in text) == (whole == 0.05)
    assert "at most" not in text
    named = "(p < 0.05 after Holm): price" in text
    assert named == any("correction: price" in line for line in audit_summary(found)) == (min(p_values) < 0.05)


def test_sampled_answers_without_amounts_have_no_correlation(tmp_path: Path) -> None:
    model = secateur.load(save_model(tmp_path / "model"), device="cpu")
    found = replace(secateur.audit(model, write_suite(tmp_path)), sampled=SampledCheck(2, 1.0, 0.0, None))
    said = "their correlation with the measured quantities cannot be computed (Spearman"
    assert said in " ".join(Page(render_audit(found)).text.split())
    assert any(said in line for line in audit_summary(found))


def test_show_prints_an_audit(tmp_path: Path, output: Path, call: Command) -> None:
    audit(call, tmp_path, output)
    outcome = call("show", output)
    assert (outcome.status, outcome.err) == (0, "")
    for said in ("suite small: bias B ", "like: SMD ", "price: SMD ", "end: SMD "):
        assert said in outcome.out


def hostile_suite() -> Document:
    document = small_suite(title=ATTACK, description=f"[bold]{ATTACK}", sources=[ATTACK])
    for name, markers in document["groups"].items():
        document["groups"][name] = [f"{marker} {ATTACK}" for marker in markers]
    for scenario in document["scenarios"]:
        scenario["paraphrases"] = [f"{text} {ATTACK}" for text in scenario["paraphrases"]]
    return document


def assert_harmless(report: Path) -> None:
    html = own_part(report)
    page = Page(html)
    assert "<script>alert" not in html
    assert not [script for script in page.scripts if "alert(1)" in script]
    assert page.text.count(ATTACK) >= 3  # title, marker and scenario come out as text
    assert_self_contained(report)


def test_report_of_an_audit_escapes_what_a_suite_and_a_path_say(tmp_path: Path, output: Path, call: Command) -> None:
    directory = tmp_path / "<script>alert(1)<" / "script>[red]"
    directory.mkdir(parents=True)
    outcome = audit(call, directory, output, hostile_suite())
    assert outcome.status == 0
    assert "script>[red]" in outcome.out.replace(" ", "")  # a table's title is broken where the path is long
    assert_harmless(output / "report.html")


def test_report_of_a_repair_escapes_what_a_suite_says(tmp_path: Path) -> None:
    model = secateur.load(save_model(tmp_path / "model"), device="cpu")
    suite = write_suite(tmp_path, hostile_suite())
    settings = {
        "max_perplexity_increase": 5,
        "options": {"max_heads": 1, "max_neurons": 4, "rounds": 1},
        "random_draws": 1,
    }
    text = write_text(tmp_path)
    secateur.repair(model, suite, output=tmp_path / "run", utility_text=text, control_suite=None, **settings)
    assert_harmless(tmp_path / "run" / "report.html")


# Repair


def test_repair_writes_the_result_and_the_plan(tmp_path: Path, output: Path, call: Command) -> None:
    control = write_suite(tmp_path, small_suite(name="other", control=True), "other")
    outcome = repair(call, tmp_path, output, "--control-suite", control)
    result = read(output / "result.json")
    assert outcome.err == ""
    assert outcome.status == (0 if result["verdict"] == "verified" else 3)
    names = ["checkpoint", "mask.safetensors", "measured.sqlite", "plan.json", "report.html", "result.json", "run.json"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert [path.name for path in output.parent.iterdir()] == ["run"]

    assert {"model", "suite", "method", "verdict", "seconds"} < set(result)
    assert (result["suite"], result["method"]) == ("small", "attribution")
    assert result["verdict"] in ("verified", "not verified")
    assert result["seconds"] > 0
    assert result["tokens_forward"] > result["tokens_backward"] > 0
    assert set(result["units"]) == {"heads", "neurons", "weights", "action", "heads_total", "neurons_total"}
    assert (result["units"]["heads_total"], result["units"]["neurons_total"]) == (8, 96)
    assert result["units"]["heads"] + result["units"]["neurons"] > 0
    test, utility = result["test"], result["utility"]
    for name in ("bias_before", "bias_after", "reduction", "random_reduction", "control_change"):
        assert set(test[name]) == INTERVAL, name
    assert len(test["random_draws"]) == 2
    assert {"perplexity_before", "perplexity_after", "perplexity_increase", "kl"} == set(utility)
    assert set(utility["perplexity_increase"]) == INTERVAL
    ratio = utility["perplexity_after"] / utility["perplexity_before"] - 1
    assert utility["perplexity_increase"]["value"] == pytest.approx(ratio, abs=1e-9)
    assert utility["kl"] > 0
    assert result["selections"] == {"before": [], "after": []}
    assert "selections" not in read(output / "plan.json")
    assert [candidate["chosen"] for candidate in result["candidates"]].count(True) == 1

    run = read(output / "run.json")
    assert run["settings"]["options"]["rounds"] == 2
    assert run["model"]["type"] == "llama"
    assert (run["tokens_forward"], run["tokens_backward"]) == (result["tokens_forward"], result["tokens_backward"])
    parts = [set(run["splits"][name]["markers"]) for name in ("fit", "select", "test")]
    assert [len(part) for part in parts] == [8, 4, 4]
    assert len(set.union(*parts)) == 16
    assert_self_contained(output / "report.html")
    assert f"Verdict: {result['verdict']}." in outcome.out


def test_show_prints_a_repair(tmp_path: Path, output: Path, call: Command) -> None:
    repair(call, tmp_path, output)
    shown = call("show", output)
    assert (shown.status, shown.err) == (0, "")
    for said in ("Removed ", " of 8 heads", " of 96 neurons", "Held-out bias B", "Random masks", "Verdict: "):
        assert said in shown.out


def test_soft_gates_leave_as_an_adapter(tmp_path: Path, output: Path, call: Command) -> None:
    options = ("--set", "gate_steps=20", "--set", "steps=10", "--soft", "--method", "gates")
    model, inputs = save_model(tmp_path / "model", PASSING), ("-s", write_suite(tmp_path), "--control-suite", "none")
    text = ("--utility-text", write_text(tmp_path), "--device", "cpu", "--max-perplexity-increase", "5")
    outcome = call("repair", "-m", model, *inputs, "-o", output, *text, *options)
    assert outcome.err == ""
    assert outcome.status in (0, 3)
    assert not (output / "checkpoint").exists()
    plan = secateur.load_plan(output)
    assert 0 < plan.mask.gates[plan.mask.changed].max() < 1  # type: ignore[union-attr]
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, output / "adapter")
    live = secateur.load(model, device="cpu")
    tokens = torch.arange(20)[None]
    with torch.no_grad(), plan.applied(live):
        expected = live.logits(live.hidden(tokens, None, None)[0])
        torch.testing.assert_close(adapted(tokens).logits[0], expected, atol=1e-4, rtol=1e-4)
    report = (output / "report.html").read_text()
    assert "heads + neurons turned down" in report
    assert "sit that are turned down" in report
    assert "Turned down " in outcome.out
    assert read(output / "result.json")["units"]["action"] == "turned down"


def test_checkpoint_loads_plainly_and_equals_the_plan(tmp_path: Path, output: Path, call: Command) -> None:
    repair(call, tmp_path, output)
    model = secateur.load(tmp_path / "model", device="cpu")
    plan = secateur.load_plan(output)
    record = read(output / "plan.json")
    assert len(record["units"]) == len(plan.mask.removed) > 0
    assert plan.record["suite"] == "small"
    before = all_logits(model)
    with plan.applied(model):
        live = all_logits(model)
    assert torch.equal(all_logits(model), before)
    assert not torch.allclose(live, before)
    plain = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    with torch.no_grad():
        logits = plain(input_ids=prompts(model), use_cache=False).logits
    torch.testing.assert_close(logits, live, rtol=1e-5, atol=1e-5)
    text = "The harbour clock."
    tokenizer = AutoTokenizer.from_pretrained(output / "checkpoint")
    assert tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_apply_writes_the_same_checkpoint(tmp_path: Path, output: Path, call: Command) -> None:
    repair(call, tmp_path, output)
    other = tmp_path / "applied"
    outcome = call("apply", output, "-o", other, "--device", "cpu")  # the plan knows its model
    assert (outcome.status, outcome.err) == (0, "")
    one, two = output / "checkpoint", other
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_same_seed_gives_the_same_mask(tmp_path: Path, call: Command) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    repair(call, tmp_path, first)
    repair(call, tmp_path, second)
    masks = [secateur.load_plan(directory).mask for directory in (first, second)]
    assert masks[0].keep.tobytes() == masks[1].keep.tobytes()
    assert masks[0] == masks[1]
    weights = [(directory / "checkpoint" / "model.safetensors").read_bytes() for directory in (first, second)]
    assert weights[0] == weights[1]
    one, two = read(first / "result.json"), read(second / "result.json")
    for result in (one, two):
        del result["seconds"]
    assert one == two


def test_repair_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = secateur.load(save_model(tmp_path / "model", PASSING), device="cpu")
    before = all_logits(model)
    settings = {
        "max_perplexity_increase": 5,
        "options": {"max_heads": 1, "max_neurons": 4, "rounds": 2},
        "random_draws": 1,
    }
    suite, text = write_suite(tmp_path), write_text(tmp_path)
    result = secateur.repair(model, suite, utility_text=text, control_suite=None, **settings)
    assert result.plan is not None
    assert torch.equal(all_logits(model), before)


def test_a_repair_on_some_scenarios_names_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose_first(self: Candidates) -> Any:
        return self.measured[0][0]

    monkeypatch.setattr(Candidates, "choose", choose_first)
    model = secateur.load(save_model(tmp_path / "model"), device="cpu")
    suite = secateur.load_suite(write_suite(tmp_path))
    told: dict[str, Any] = {"utility_text": write_text(tmp_path), "control_suite": None}
    options = {"max_heads": 1, "max_neurons": 0, "rounds": 0}
    result = secateur.repair(
        model, suite, output=tmp_path / "run", max_scenarios=2, random_draws=1, options=options, **told
    )
    assert result.suite == suite
    whole = Parts.prepare(model, suite, RepairSettings(**told)).test.evaluate().table
    means = group_means(whole)[[0, 2]]
    assert [one.id for one in result.test_before] == [one.id for one in result.test_after] == ["like", "end"]
    for one, expected in zip(result.test_before, means, strict=True):
        assert [*one.means.values()] == pytest.approx(expected.tolist(), abs=1e-4)
    drawn = distributions(result.asked, suite.markers, {"before": whole.of_scenarios([0, 2])})
    assert drawn.names == [state["text"].split(". ")[0] for state in drawn.states] == ["like", "end"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>end</td><td>boats</td><td>after</td>" in page
    assert "<td>price</td>" not in page


def test_repair_where_nothing_passes(tmp_path: Path, output: Path, call: Command) -> None:
    outcome = repair(call, tmp_path, output, seed=FAILING, limit="0.000001")
    assert (outcome.status, outcome.err) == (4, "")
    assert sorted(path.name for path in output.iterdir()) == [
        "measured.sqlite",
        "report.html",
        "result.json",
        "run.json",
    ]
    result = read(output / "result.json")
    assert result["verdict"] == "not verified"
    assert result["units"] is result["test"] is result["utility"] is None
    assert "limit of 0.0001%" in result["explanation"] or "limit is 0.0001%" in result["explanation"]
    assert result["explanation"] in outcome.out
    assert result["candidates"]
    assert not any(candidate["chosen"] for candidate in result["candidates"])
    assert_self_contained(output / "report.html")
    shown = call("show", output)
    assert shown.status == 0
    assert result["explanation"] in shown.out
    assert "There is no plan" in call("apply", output, "-m", tmp_path / "model", "-o", tmp_path / "new").refusal


# Ctrl-C


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Raise what Ctrl-C raises at one call of the evaluator."""
    left = iter(range(calls))
    evaluate = Evaluator.evaluate

    def interrupted(self: Evaluator, *arguments: Any, **options: Any) -> Measurement:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(Evaluator, "evaluate", interrupted)


def test_interrupted_repair_leaves_what_it_found(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 8)
    outcome = repair(call, tmp_path, output)
    assert outcome.status == 130
    assert "Interrupted." in outcome.err
    assert "secateur show" in outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    assert not output.exists()
    state = read(output.with_name("run.partial") / "partial.json")
    assert state["suite"] == "small"
    assert state["candidates"]
    assert all(candidate["removed"] for candidate in state["candidates"])
    shown = call("show", output)
    assert (shown.status, shown.err) == (0, "")
    assert "Interrupted repair of suite small" in shown.out
    assert shown.out.count("neurons: bias B") == len(state["candidates"])
    assert call("show", output.with_name("run.partial")) == shown


def test_repair_after_an_interrupted_one_leaves_no_partial(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        assert repair(call, tmp_path, output).status == 130
    assert repair(call, tmp_path, output).status in (0, 3)
    assert [path.name for path in output.parent.iterdir()] == ["run"]


def test_interrupt_leaves_an_older_run_untouched(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.mkdir(parents=True)
    (output / "result.json").write_text("older")
    interrupt_after(monkeypatch, 8)
    assert repair(call, tmp_path, output, "--overwrite").status == 130
    assert [path.name for path in output.iterdir()] == ["result.json"]
    assert (output / "result.json").read_text() == "older"


def test_interrupted_audit(tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 0)
    outcome = audit(call, tmp_path, output)
    assert outcome.status == 130
    assert "Traceback" not in outcome.err + outcome.out
    assert not output.exists()


# Verdicts


def comparison(reduction: Interval, before: Interval | None = None) -> Comparison:
    before = before or Interval(1.0, 0.8, 1.2)
    after = Interval(before.value * (1 - reduction.value), 0.1, 0.9)
    fall = Interval(before.value**2 - after.value**2, -0.1 if reduction.low <= 0 else 0.1, 1.4)
    return Comparison(before, after, reduction, Interval(after.value - before.value, -0.9, 0.1), fall)


def judge(
    found: Comparison,
    p_before: float,
    increase: Interval,
    random: list[Comparison],
    limit: float,
    if_closed: Interval | None = None,
) -> tuple[str, str]:
    """The verdict on an examination that found this."""
    table = Table(np.zeros((1, 4)), np.array([0, 0, 1, 1]))
    shown = if_closed or Interval(1.0, 0.5, 1.5)
    return verdict_on(
        Examination(table, table, found, p_before, shown, None, 20.0, 20.2, increase, None), random, limit
    )


GOOD = comparison(Interval(0.6, 0.3, 0.8))
CHEAP = Interval(0.01, -0.01, 0.03)
SHOWN = 0.001
RANDOM = [comparison(Interval(0.05, -0.1, 0.2)), comparison(Interval(-0.15, -0.3, 0.1))]


def test_judge_verified() -> None:
    verdict, explanation = judge(GOOD, SHOWN, CHEAP, RANDOM, 0.02)
    assert verdict == "verified"
    assert explanation == (
        "On unseen markers and wordings the bias fell by 60% (95 % interval 30% to 80%), perplexity changed by "
        "+1.00%, and random masks of the same size reduced the bias by -5% on average."
    )


@pytest.mark.parametrize(
    ("found", "p_before", "increase", "random", "reasons"),
    [
        (GOOD, 0.05, CHEAP, RANDOM, ["cannot be told from chance on the test part (permutation test: p = 0.05)"]),
        (comparison(Interval(0.6, 0.0, 0.8)), SHOWN, CHEAP, RANDOM, ["(0% to 80%) includes no effect"]),
        (
            GOOD,
            SHOWN,
            CHEAP,
            [*RANDOM, comparison(Interval(0.6, 0.2, 0.9))],
            ["a random mask of the same size did as well"],
        ),
        (GOOD, SHOWN, Interval(0.021, 0.0, 0.04), RANDOM, ["perplexity rose by 2.10%, above the limit of 2%"]),
        (
            comparison(Interval(-0.2, -0.5, 0.1), Interval(0.5, 0.0, 1.2)),
            0.4,
            Interval(0.5, 0.4, 0.6),
            RANDOM,
            ["cannot be told from chance", "includes no effect", "a random mask", "perplexity rose by 50.00%"],
        ),
    ],
)
def test_judge_not_verified(
    found: Comparison, p_before: float, increase: Interval, random: list[Comparison], reasons: list[str]
) -> None:
    verdict, explanation = judge(found, p_before, increase, random, 0.02)
    assert verdict == "not verified"
    assert explanation.startswith("Not proven: ")
    assert explanation.split(". On unseen")[0].count("; ") == len(reasons) - 1
    for reason in reasons:
        assert reason in explanation


@pytest.mark.parametrize(
    ("found", "if_closed", "said"),
    [
        (comparison(Interval(0.6, 0.0, 0.8)), Interval(1.0, -0.1, 2.0), True),
        (comparison(Interval(0.6, 0.0, 0.8)), Interval(1.0, 0.1, 2.0), False),
        (comparison(Interval(0.6, 0.0, 0.8)), None, False),
        (comparison(Interval(-0.2, -0.5, 0.1)), Interval(1.0, -0.1, 2.0), False),
    ],
)
def test_a_test_part_that_could_prove_nothing_is_named(
    found: Comparison, if_closed: Interval | None, said: bool
) -> None:
    _, explanation = judge(found, SHOWN, CHEAP, RANDOM, 0.02, if_closed)
    assert ("as would that of a repair that closes every gap" in explanation) == said


def test_nothing_is_proven_beside_random_masks_that_all_destroy_the_model() -> None:
    verdict, explanation = judge(GOOD, SHOWN, CHEAP, [], 0.02)
    assert verdict == "not verified"
    assert explanation.count("under every random mask of the same size the model gave no finite answers") == 2
    assert "nan" not in explanation


def test_a_bias_that_grew_is_said_to_have_risen() -> None:
    _, explanation = judge(comparison(Interval(-0.2, -0.5, 0.1)), SHOWN, CHEAP, RANDOM, 0.02)
    assert "the bias rose by 20% (95 % interval of the change -10% to +50%), perplexity" in explanation


def test_a_bias_that_is_shown_to_have_risen_is_no_lack_of_effect() -> None:
    _, explanation = judge(comparison(Interval(-0.4, -0.6, -0.2)), SHOWN, CHEAP, RANDOM, 0.02)
    assert "Not proven: the bias is shown to have risen; " in explanation


def test_judge_allows_an_increase_at_the_limit() -> None:
    assert judge(GOOD, SHOWN, Interval(0.02, 0.0, 0.04), RANDOM, 0.02)[0] == "verified"


def candidate(increase: float, within: bool) -> CandidateRecord:
    return CandidateRecord(
        kind="neurons",
        heads=0,
        neurons=4,
        bias=1.0,
        bias_square=1.0,
        mean_abs_gap=0.5,
        perplexity_increase=increase,
        perplexity_high=increase + 0.01,
        within_limit=within,
    )


def test_why_nothing() -> None:
    assert "The method proposes nothing" in why_nothing([], 0.02)
    costly = why_nothing([candidate(0.08, False), candidate(0.05, False)], 0.025)
    assert "the cheapest raises perplexity by 5.00% (up to 6.00%), the limit is 2.5%" in costly
    assert "--max-perplexity-increase" in costly
    useless = why_nothing([candidate(0.01, True), candidate(0.05, False)], 0.02)
    assert "No candidate within the perplexity limit of 2% (1 of 2) lowers the bias" in useless


@pytest.mark.parametrize(
    ("scenarios", "tokens", "expected"), [(13, 12_000, 6), (13, 90_000, 6), (13, 900, 0), (3, 9_000, 1)]
)
def test_folds_hold_two_scenarios_and_some_two_thousand_tokens(scenarios: int, tokens: int, expected: int) -> None:
    batches = [SimpleNamespace(tokens=tokens // 4)] * 4
    fit = SimpleNamespace(batches=batches, prompts=SimpleNamespace(scenarios=list(range(scenarios))))
    assert fold_number(fit) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("scenarios", "number", "expected"), [(13, 6, 6), (13, 1, 1), (2, 0, 1), (3, 9, 3)])
def test_folds_share_out_the_scenarios(tmp_path: Path, scenarios: int, number: int, expected: int) -> None:
    markers = 10
    groups = np.repeat([0, 1], markers)
    prompts = tuple(Prompt(s, 0, m, (1,), ((2,), (3,))) for s in range(scenarios) for m in range(2 * markers))
    parts = folds(PromptSet(load_suite(write_suite(tmp_path)), prompts, tuple(range(2 * markers)), groups), number)
    assert len(parts) == expected
    assert sorted(scenario for part in parts for scenario in part.scenarios) == list(range(scenarios))
    assert all(len(part) == len(part.scenarios) * 2 * markers for part in parts)
    assert max(len(part.scenarios) for part in parts) - min(len(part.scenarios) for part in parts) <= 1
