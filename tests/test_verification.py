"""What a model writes before and after a mask: figures against plain loops, examples, the guard, reports, refusals."""

from __future__ import annotations

import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import REPAIR, Command, Document, small_suite, write_suite, write_text
from test_toxicity import save_classifier
from tiny import tiny_model

import secateur
from secateur.errors import DataError, MaskError, SettingError
from secateur.measures.disparity import Table, largest_pairs, smd_changes
from secateur.measures.generation import Request, write
from secateur.measures.open_prompts import group_prompts, open_prompts
from secateur.measures.prompts import all_markers, build_prompts
from secateur.measures.sampling import SampledAmounts, answer_seed, quantity_prompts
from secateur.measures.splits import split, whole
from secateur.measures.toxicity import SWEARING_ALONE, Classifier, load_classifier
from secateur.reports.terminal import verification_lines
from secateur.studies.plan import Plan
from secateur.studies.verification import Continuation, VerificationSettings, compare_amounts, judge_texts, verify
from secateur.suites import Suite, load_suite, suite_hash
from secateur.units import Mask

ATTACK = "</td><script>alert(1)</script>"
QUICK = VerificationSettings(runs=3, classifier="none", batch_size=50)


def document(**changes: Any) -> Document:
    """The small suite with a quantity alone, whose wordings invite digits from a tiny random model."""
    small = small_suite(**changes)
    return {**small, "scenarios": [small["scenarios"][1], {**small["scenarios"][1], "id": "again"}]}


def suite_of(tmp_path: Path, **changes: Any) -> Suite:
    return load_suite(write_suite(tmp_path, document(**changes)))


def masked_model() -> tuple[secateur.LanguageModel, Mask]:
    model = tiny_model(seed=2)
    return model, Mask.removing(model, [0, 3, 10, 40, 60])


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuations go token by token, one length of prompts after the other: keep them short."""
    monkeypatch.setattr("secateur.studies.verification.OPEN_TOKENS", 6)
    monkeypatch.setattr("secateur.studies.verification.GROUP_TOKENS", 5)


# Sampled answers


def sampled(suite: Suite, amounts: np.ndarray) -> SampledAmounts:
    """Made-up answers to all prompts of a suite, (prompts, runs)."""
    prompts = quantity_prompts(build_prompts(tiny_model(), suite, whole(suite)))
    texts = tuple(tuple(f"{amount:g}" for amount in row) for row in amounts)
    return SampledAmounts(amounts, prompts, texts)


@pytest.fixture
def made_up(tmp_path: Path) -> tuple[SampledAmounts, SampledAmounts, SampledAmounts]:
    """Before, after, and the answers whose range tells inliers; with holes."""
    suite = suite_of(tmp_path)
    prompts = build_prompts(tiny_model(), suite, whole(suite))
    rng = np.random.default_rng(0)
    first = np.array([prompt.marker < 8 for prompt in prompts.prompts])
    before = np.exp(rng.normal(3 + first[:, None], 0.3, (len(prompts), 4)))
    after = np.exp(rng.normal(3 + 0.2 * first[:, None], 0.3, (len(prompts), 4)))
    before[rng.random(before.shape) < 0.2] = np.nan
    after[rng.random(after.shape) < 0.2] = np.nan
    after[[prompt.scenario == 0 and prompt.marker == 3 for prompt in prompts.prompts]] = np.nan
    return sampled(suite, before), sampled(suite, after), sampled(suite, np.exp(rng.normal(3, 0.5, before.shape)))


def test_figures_are_those_of_a_plain_loop(made_up: tuple[SampledAmounts, SampledAmounts, SampledAmounts]) -> None:
    before, after, range_of = made_up
    found = compare_amounts(before, after, range_of, 1.0)
    suite, prompts = before.prompts.suite, before.prompts.prompts
    names = [marker for _, marker in all_markers(suite)]
    assert [scenario.id for scenario in found.scenarios] == ["price", "again"]
    for number, scenario in enumerate(found.scenarios):
        logs: dict[str, dict[tuple[int, str], float]] = {state: {} for state in ("before", "after")}
        inside: dict[str, list[bool]] = {"before": [], "after": []}
        for at, prompt in enumerate(prompts):
            if prompt.scenario != number:
                continue
            low, high = np.percentile(range_of.amounts[at], [5, 95])
            rows = {"before": before.amounts[at], "after": after.amounts[at]}
            inside["before"] += [low <= amount <= high for amount in rows["before"]]
            inside["after"] += [low <= amount <= high for amount in rows["after"]]
            if not np.isnan(rows["before"]).all() and not np.isnan(rows["after"]).all():
                for state, row in rows.items():
                    logs[state][prompt.paraphrase, names[prompt.marker]] = float(np.nanmean(np.log(row)))
        for state in ("before", "after"):
            levels = {one: np.mean([v for (w, _), v in logs[state].items() if w == one]) for one in range(3)}
            level = np.mean(list(levels.values()))
            values: dict[str, list[float]] = {}
            for (wording, marker), value in logs[state].items():
                values.setdefault(marker, []).append(float(value - levels[wording] + level))
            y = {marker: np.mean(moved) for marker, moved in values.items()}
            groups = [np.array([y[m] for m in markers if m in y]) for markers in suite.groups.values()]
            disparity = getattr(scenario, state)
            gap = groups[0].mean() - groups[1].mean()
            assert disparity.gap.value == pytest.approx(gap)
            spread = np.sqrt((groups[0].var(ddof=1) + groups[1].var(ddof=1)) / 2)
            assert disparity.smd.value == pytest.approx(gap / spread)
            amounts = getattr(scenario, f"amounts_{state}")
            for group, values in zip(suite.groups, groups, strict=True):
                assert disparity.means[group] == pytest.approx(values.mean())
                assert amounts[group].value == pytest.approx(np.exp(values.mean()))
                assert amounts[group].low < amounts[group].value < amounts[group].high
            inliers = getattr(scenario, f"inliers_{state}")
            assert inliers.value == pytest.approx(np.mean(inside[state]))
            assert inliers.low <= inliers.value <= inliers.high


def test_the_change_of_smd_is_paired(made_up: tuple[SampledAmounts, SampledAmounts, SampledAmounts]) -> None:
    before, after, range_of = made_up
    for scenario in compare_amounts(before, after, range_of, 1.0).scenarios:
        change, levels = scenario.smd_change, (scenario.before.smd, scenario.after.smd)
        assert scenario.before.pair == scenario.after.pair == ("boats", "lamps")
        assert change.value == pytest.approx(levels[1].value - levels[0].value)
        assert change.low < change.value < change.high < 0
    shifted = sampled(before.prompts.suite, np.exp(np.log(before.amounts) + 1))  # another level, the same SMD
    for scenario in compare_amounts(before, shifted, range_of, 1.0).scenarios:
        found = scenario.smd_change
        assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_the_change_of_smd_stays_with_one_pair() -> None:
    groups = np.repeat([0, 1, 2], 4)
    one, other = (np.array([[0, 1, 0, 1, *second, *third]], dtype=float) for second, third in (
        ((8, 9, 8, 9), (2, 3, 2, 3)),
        ((2, 3, 2, 3), (8, 9, 8, 9)),
    ))  # fmt: skip
    before, after = Table(one, groups), Table(other, groups)
    assert largest_pairs(before) == [(0, 1)]
    assert largest_pairs(after) == [(0, 2)]
    spread = one[0, :4].std(ddof=1)
    assert smd_changes(before, after)[0].value == pytest.approx((-2 + 8) / spread)


def test_markers_do_not_differ_by_the_wordings_that_they_answer(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    prompts = build_prompts(tiny_model(), suite, whole(suite)).prompts
    own = np.random.default_rng(0).normal(3, 0.1, 16)
    amounts = np.exp([[own[prompt.marker] + 2 * prompt.paraphrase] * 2 for prompt in prompts])
    all_answered = sampled(suite, amounts)
    every = compare_amounts(all_answered, all_answered, all_answered, 1.0)
    holes = amounts.copy()
    holes[[prompt.paraphrase == prompt.marker // 8 for prompt in prompts]] = np.nan  # the groups answer other wordings
    holes[[prompt.paraphrase > 1 and prompt.marker % 8 > 5 for prompt in prompts]] = np.nan
    some = compare_amounts(all_answered, sampled(suite, holes), all_answered, 1.0)
    assert every.scenarios[0].after.gap.value == pytest.approx(own[:8].mean() - own[8:].mean())
    for one, other in zip(every.scenarios, some.scenarios, strict=True):
        assert other.after.gap.value == pytest.approx(one.after.gap.value, abs=0.1)


def test_lost_gained_and_unchanged_answers_are_counted(
    made_up: tuple[SampledAmounts, SampledAmounts, SampledAmounts],
) -> None:
    before, after, range_of = made_up
    found = compare_amounts(before, after, range_of, 1.0)
    known = np.isfinite(before.amounts), np.isfinite(after.amounts)
    assert found.lost_count == (known[0] & ~known[1]).sum()
    assert found.gained_count == (~known[0] & known[1]).sum()
    assert (found.parsed_before, found.parsed_after) == (known[0].mean(), known[1].mean())
    assert all(one.amount_before is not None and one.amount_after is None for one in found.lost)
    assert found.anomaly_change.value == pytest.approx(found.inliers_before.value - found.inliers_after.value)
    same = compare_amounts(before, before, range_of, 1.0)
    assert (same.unchanged, same.changed, same.lost, same.anomaly_change.value) == (1, [], [], 0)


def test_examples_that_changed_most_come_first(
    made_up: tuple[SampledAmounts, SampledAmounts, SampledAmounts],
) -> None:
    before, after, range_of = made_up
    after.amounts[5, 2], before.amounts[5, 2] = 1e6, 2.0
    after.amounts[9, 1], before.amounts[9, 1] = 1.0, 5e5
    found = compare_amounts(before, after, range_of, 1.0).changed
    sizes = [abs(np.log(one.amount_after) - np.log(one.amount_before)) for one in found]  # type: ignore[type-var]
    assert sizes == sorted(sizes, reverse=True)
    assert [(one.amount_before, one.amount_after, one.run) for one in found[:2]] == [(2.0, 1e6, 2), (5e5, 1.0, 1)]
    assert len({(one.scenario, one.prompt) for one in found}) == len(found) == 10
    prompt = before.prompts.prompts[5]
    assert found[0].marker == all_markers(before.prompts.suite)[prompt.marker][1]
    assert found[0].marker in found[0].prompt


def test_scenarios_with_too_few_amounts_are_left_out_and_named(
    made_up: tuple[SampledAmounts, SampledAmounts, SampledAmounts],
) -> None:
    before, after, range_of = made_up
    for number, prompt in enumerate(before.prompts.prompts):
        if prompt.scenario == 1 and prompt.marker >= 8:
            after.amounts[number] = np.nan
    found = compare_amounts(before, after, range_of, 1.0)
    assert [scenario.id for scenario in found.scenarios] == ["price"]
    assert found.left_out == ["again"]
    after.amounts[:] = np.nan
    found = compare_amounts(before, after, range_of, 1.0)
    assert (found.scenarios, found.bias, found.inliers_after.value) == ([], None, 0)


def test_answers_are_those_of_test_prompts_with_the_same_seeds(tmp_path: Path) -> None:
    model, mask = masked_model()
    suite = suite_of(tmp_path)
    found = verify(model, suite, mask, QUICK).amounts
    assert found is not None
    test = split(suite, 0).test
    prompts = build_prompts(model, suite, test).prompts
    assert found.answers == 3 * len(prompts) == 3 * 2 * 4
    requests = [Request(p.context, answer_seed(0, n, run)) for n, p in enumerate(prompts) for run in range(3)]
    before = write(model, requests, 12)
    with mask.applied(model):
        after = write(model, requests, 12)
    assert found.unchanged == pytest.approx(np.mean([a == b for a, b in zip(before, after, strict=True)]))
    names = {all_markers(suite)[marker][1] for marker in test.markers}
    for example in (*found.changed, *found.lost):
        assert example.marker in names
        assert (example.before, example.after) in zip(before, after, strict=True)


def test_equal_seeds_give_equal_results_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, mask = masked_model()
    suite = suite_of(tmp_path)
    one = verify(model, suite, mask, QUICK)
    again = verify(model, suite, mask, VerificationSettings(runs=3, classifier="none", batch_size=7))
    assert one.as_dict() == again.as_dict()
    other = verify(model, suite, mask, VerificationSettings(runs=3, classifier="none", seed=1))
    assert other.as_dict() != one.as_dict()
    nothing = verify(model, suite, Mask.none(model), QUICK)
    assert nothing.amounts is not None
    assert nothing.amounts.unchanged == 1
    assert all(continuation.unchanged for continuation in (*nothing.open, *nothing.mentions))


@pytest.mark.parametrize("told", [{"dtype": "bfloat16", "device": "cpu"}, {"device_map": "cpu"}])
def test_precisions_and_device_maps(told: dict[str, Any], tmp_path: Path) -> None:
    """Batches are the same before and after, so that no rounding looks like a change."""
    tiny_model().save_pretrained(tmp_path / "model")
    model = secateur.load(tmp_path / "model", **told)
    suite = suite_of(tmp_path)
    nothing = verify(model, suite, Mask.none(model), QUICK)
    assert nothing.amounts is not None
    assert nothing.amounts.unchanged == 1
    assert all(continuation.unchanged for continuation in (*nothing.open, *nothing.mentions))
    found = verify(model, suite, Mask.removing(model, [1, 20]), QUICK)
    assert found.amounts is not None
    assert found.amounts.unchanged < 1


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text-windowed", "falcon-alibi", "llama"])
@pytest.mark.parametrize("chat", [False, True])
def test_families_and_chat_templates(name: str, chat: bool, tmp_path: Path) -> None:
    model = tiny_model(name, chat)
    found = verify(model, suite_of(tmp_path), Mask.removing(model, [1, 20]), QUICK)
    assert found.amounts is not None
    assert not all(continuation.unchanged for continuation in found.open)
    assert model.usage.forward == found.run["tokens_forward"] > 0


def test_a_suite_without_quantities_says_so(tmp_path: Path) -> None:
    model, mask = masked_model()
    small = small_suite(control=True)
    suite = load_suite(write_suite(tmp_path, {**small, "scenarios": [small["scenarios"][0]]}))
    found = verify(model, suite, mask, QUICK)
    assert found.amounts is None
    assert found.mentions == []
    notes = " ".join(found.notes)
    for said in ("asks for a quantity", "are no people", "No classifier"):
        assert said in notes


# Open prompts


def test_open_prompts_are_built_in_or_a_users(tmp_path: Path) -> None:
    english, spanish = open_prompts("en"), open_prompts("es")
    assert len(english) == len(spanish) >= 10
    assert open_prompts("de") == english
    file = tmp_path / "mine.txt"
    file.write_text("One line.\n\n  Another line. \n", encoding="utf-8")
    assert [prompt.message for prompt in open_prompts("en", file)] == ["One line.", "Another line."]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompt"):
        open_prompts("en", file)
    with pytest.raises(DataError, match="cannot be read"):
        open_prompts("en", tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="cannot be read"):
        VerificationSettings(prompts=tmp_path).check()


@pytest.mark.parametrize(
    ("suite", "beginning"),
    [
        ("occupations", "The plumber walked into"),
        ("religion", "A Christian person walked into"),
        ("occupations-es", "La persona que trabaja en mecánica de coches entró"),
    ],
)
def test_mentions_fit_the_markers_of_a_suite(suite: str, beginning: str) -> None:
    prompts = group_prompts(load_suite(suite), [0])
    assert prompts[0].reply.startswith(beginning)
    assert len({prompt.reply for prompt in prompts}) == 4
    assert group_prompts(load_suite("control-colour"), [0]) == []


def test_a_continuation_knows_whether_it_changed() -> None:
    assert Continuation("a", "b", "b").unchanged
    assert not Continuation("a", "b", "c").unchanged


# The guard


def bad_words(texts: Any) -> np.ndarray:
    """A classifier that counts a word."""
    return np.array([min(1.0, text.count("bad") / 4) for text in texts])


FAKE = Classifier("fake", ("bad",), bad_words)


def test_the_guard_lists_what_became_worse_one_by_one() -> None:
    continuations = [
        Continuation("p", "fine", "fine"),
        Continuation("bad p", "fine", "bad", "Ann", "women"),
        Continuation("p", "fine", "bad bad bad", "Bob", "men"),
        Continuation("p", "bad bad", "fine", "Cid", "men"),
    ]
    found = judge_texts(continuations, FAKE, 0.25)
    assert [(one.continuation.marker, one.prompt, one.before, one.after) for one in found.rose] == [
        ("Bob", 0, 0, 0.75),
        ("Ann", 0.25, 0, 0.25),
    ]
    assert list(found.groups) == ["", "women", "men"]
    men = found.groups["men"]
    assert (men.continuations, men.rose, men.fell, men.before, men.after) == (2, 1, 1, 0.25, 0.375)
    assert judge_texts(continuations, FAKE, 0.5).rose == found.rose[:1]
    assert judge_texts([], FAKE, 0.5).groups == {}


def test_the_guard_reads_an_answer_from_its_beginning() -> None:
    read: list[str] = []

    def score(texts: Any) -> np.ndarray:
        read.extend(texts)
        return np.array([float("Ann was bad" in text) for text in texts])

    continuations = [
        Continuation("Continue.\nAnn was", " fine", "bad", "Ann", "women", "Ann was"),
        Continuation("What is a lake?", "A lake", "A pond"),
    ]
    found = judge_texts(continuations, Classifier("subject", ("bad",), score), 0.25)
    assert read[2:] == ["Ann was fine", "A lake", "Ann was bad", "A pond"]
    assert [one.continuation for one in found.rose] == continuations[:1]


def test_every_continuation_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = Classifier("letters", ("e",), lambda texts: np.array([min(1.0, t.count("e") / 50) for t in texts]))
    monkeypatch.setattr("secateur.studies.verification.load_classifier", lambda *_: letters)
    model, mask = masked_model()
    found = verify(model, suite_of(tmp_path), mask, VerificationSettings(runs=2, worse=0.01))
    assert found.guard is not None
    assert sum(one.continuations for one in found.guard.groups.values()) == len(found.open) + len(found.mentions)
    assert all(one.prompt.endswith(one.reply) and str(one.marker) in one.reply.lower() for one in found.mentions)
    expected = {one for one in (*found.open, *found.mentions) if one.after.count("e") > one.before.count("e")}
    assert {one.continuation for one in found.guard.rose} == expected


def swearing() -> Classifier:
    return Classifier("profanity", ("profanity",), bad_words, SWEARING_ALONE, "en")


@pytest.mark.parametrize(
    ("language", "said"), [("en", ""), ("en-GB", ""), ("es", "The texts are in another language (es)")]
)
def test_the_guard_says_what_its_classifier_does_not_see(language: str, said: str) -> None:
    limits = judge_texts([], swearing(), 0.2, language).limits
    assert limits.startswith("This classifier sees swearing, not stereotypes, and knows English alone; an empty list")
    assert said in limits
    assert ("another language" in limits) is bool(said)
    assert judge_texts([], FAKE, 0.2, language).limits == ""


def test_what_a_classifier_does_not_see_is_said_where_people_look(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.studies.verification.load_classifier", lambda *_: swearing())
    suite = load_suite(write_suite(tmp_path, document(name="other", language="es")))
    model = secateur.load(tmp_path / "model", device="cpu")
    found = secateur.verify(model, plan, suite, runs=2, output=tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for said in (SWEARING_ALONE, "The texts are in another language (es)"):
        assert said in " ".join(verification_lines(found.as_dict()))
        assert html.count(said) == 2, "in the verdict and beside the list"
    older = found.as_dict()
    del older["guard"]["limits"], older["plan"]
    assert "Classifier" in " ".join(verification_lines(older))


def test_the_offline_classifier_says_what_it_does_not_see() -> None:
    pytest.importorskip("profanity_check")
    found = load_classifier("profanity")
    assert found is not None
    assert found.limits("en") == SWEARING_ALONE


# Commands


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """The directory of a plan of a saved model, fitted on a suite's file."""
    model, mask = masked_model()
    model.save_pretrained(tmp_path / "model")
    model = secateur.load(tmp_path / "model", device="cpu")
    suite = suite_of(tmp_path)
    settings = {"seed": 4, "utility_text": None, "chat": "auto", "suite_hash": suite_hash(suite)}
    told = {"suite": suite.name, "method": "attribution", "model": str(tmp_path / "model")}
    record = {**told, "settings": settings}
    Plan(Mask(mask.space, mask.keep, model.fingerprint), record).save(tmp_path / "plan")
    return tmp_path / "plan"


def command(plan: Path, output: Path) -> list[str | Path]:
    told = ("--classifier", "none", "--runs", "2", "--device", "cpu")
    return ["verify", plan, "-s", plan.parent / "small.yaml", "-o", output, *told]


def test_verify_writes_figures_and_a_report(plan: Path, output: Path, call: Command) -> None:
    outcome = call(*command(plan, output))
    assert (outcome.status, outcome.err) == (0, "")
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "verify.json"]
    assert [path.name for path in output.parent.iterdir()] == ["run"]
    found = json.loads((output / "verify.json").read_text(encoding="utf-8"))
    assert found["run"]["settings"]["seed"] == 4
    assert found["amounts"]["runs"] == 2
    assert len(found["open"]) == 12
    assert len(found["mentions"]) == 4 * 2 * 2
    for said in ("Sampled answers", "Anomaly rate", "greedy continuations unchanged"):
        assert said in outcome.out
        assert said in call("show", output).out
    mask = secateur.load_plan(plan).mask
    verified = found["plan"]
    assert (verified["suite"], verified["method"], verified["action"]) == ("small", "attribution", "removed")
    assert (verified["heads"], verified["neurons"], verified["weights"]) == (
        mask.heads_removed,
        mask.neurons_removed,
        0,
    )
    assert (verified["ablation"], verified["mask"]) == ("zero", sha256(mask.key).hexdigest()[:32])
    said = f"{mask.heads_removed} heads and {mask.neurons_removed} neurons removed (ablation zero) by attribution"
    for place in (outcome.out, call("show", output).out, (output / "report.html").read_text(encoding="utf-8")):
        assert f"plan: {said}, fitted on small, mask {verified['mask']}" in place
    change = found["amounts"]["anomaly_change"]
    points = "{value:+.1f} [{low:+.1f}, {high:+.1f}] points"
    assert points.format(**{name: 100 * value for name, value in change.items()}) in outcome.out
    assert "continuations" in call("runs", output.parent).out
    html = (output / "report.html").read_text(encoding="utf-8")
    assert "What the model writes, before and after" in html
    assert "2 answers make a range that holds fewer than 90 % of new ones" in html
    model = secateur.load(plan.parent / "model", device="cpu")
    same = secateur.verify(model, plan, plan.parent / "small.yaml", runs=2, classifier="none")
    assert json.loads(json.dumps(same.as_dict()["open"])) == found["open"]
    assert "exists" in call(*command(plan, output)).refusal


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--runs", "1"), "at least 2 runs and a temperature above 0"),
        (("--temperature", "0"), "at least 2 runs and a temperature above 0"),
        (("--worse", "0"), "A score can rise by more than 0"),
        (("--batch-size", "0"), "batch size must be at least 1"),
        (("--prompts", "nothing.txt"), "'nothing.txt' cannot be read"),
        (("--classifier", "./nothing"), "cannot be loaded as a text classifier"),
        (("--bad-label", "toxic"), "no labels to choose from"),
        (("--suite", "nothing"), "There is no suite 'nothing'"),
        (("--suite", "occupations", "--model", "./nothing"), "nothing"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    arguments: tuple[str, ...], said: str, plan: Path, output: Path, call: Command
) -> None:
    if "--model" not in arguments:
        shutil.rmtree(plan.parent / "model")  # would be said first, if the model were loaded first
    assert said in call(*command(plan, output), *arguments).refusal
    assert not output.exists()
    assert not output.with_name("run.partial").exists()


def test_a_classifier_of_transformers_judges(plan: Path, tmp_path: Path, output: Path, call: Command) -> None:
    judge = save_classifier(tmp_path / "judge", ("fine", "toxic"))
    told = ("--classifier", judge, "--bad-label", "toxic", "--worse", "0.000001")
    outcome = call(*command(plan, output), *told)
    assert (outcome.status, outcome.err) == (0, "")
    guard = json.loads((output / "verify.json").read_text(encoding="utf-8"))["guard"]
    assert (guard["classifier"], guard["labels"]) == (judge, ["toxic"])
    assert guard["rose"]
    assert all(one["after"] > one["before"] for one in guard["rose"])
    assert sum(group["rose"] for group in guard["groups"].values()) == len(guard["rose"])
    assert guard["rose"][0]["continuation"]["prompt"] in (output / "report.html").read_text(encoding="utf-8")
    assert "it has: fine, toxic" in call(*command(plan, output.with_name("b")), *told[:2], "--bad-label", "x").refusal


def test_a_repair_can_name_bad_labels(tmp_path: Path, output: Path, call: Command) -> None:
    judge = save_classifier(tmp_path / "judge", ("LABEL_0", "LABEL_1"))
    told = ("repair", "-m", "./nothing", "-s", write_suite(tmp_path), "-o", output)
    assert "Name them with --bad-label" in call(*told, "--verify", "--classifier", judge).refusal
    named = ("--classifier", judge, "--bad-label", "LABEL_9")
    assert "no label 'LABEL_9'" in call(*told, "--verify", *named).refusal
    assert "belong to --verify" in call(*told, "--bad-label", "LABEL_1").refusal


def test_a_missing_extra_is_said(plan: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    assert "pip install 'secateur[toxicity]'" in call(*command(plan, output), "--classifier", "profanity").refusal


def test_a_plan_of_another_model_is_refused(plan: Path, tmp_path: Path, output: Path, call: Command) -> None:
    tiny_model(seed=7).save_pretrained(tmp_path / "other")
    assert call(*command(plan, output), "-m", tmp_path / "other").refusal
    assert not output.exists()
    model, _ = masked_model()
    with pytest.raises(MaskError):
        verify(model, suite_of(tmp_path), Mask.none(tiny_model(seed=7)), QUICK)
    with pytest.raises(SettingError, match="at least 2 runs"):
        verify(model, suite_of(tmp_path), Mask.none(model), VerificationSettings(runs=1))


def test_the_report_escapes_what_a_suite_and_a_model_say(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack(_: Any, requests: list[Request], *__: Any, **told: Any) -> list[str]:
        return [f"{number} {ATTACK}" for number, _ in enumerate(requests)]

    monkeypatch.setattr("secateur.studies.verification.write", attack)
    monkeypatch.setattr("secateur.measures.sampling.write", attack)
    bad = Classifier(ATTACK, (ATTACK,), lambda texts: np.linspace(0, 1, len(texts)) * ("9" in texts[0]))
    monkeypatch.setattr("secateur.studies.verification.load_classifier", lambda *_: bad)
    groups = {g: [f"{m} {ATTACK}" for m in markers] for g, markers in small_suite()["groups"].items()}
    suite = load_suite(write_suite(tmp_path, document(name="hostile", groups=groups, title=ATTACK)))
    model = secateur.load(tmp_path / "model", device="cpu")
    found = secateur.verify(model, plan, suite, runs=2, output=tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert found.amounts is not None
    assert found.amounts.bias is not None
    change = found.amounts.bias.change
    told = f"change {change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    verdict = html.split('<div class="verdict">')[1].split("</div>")[0]
    assert verdict.startswith("Bias B of the sampled answers: ")
    assert told in verdict
    assert "[" in verdict.split("before")[0]
    places = [verdict.index(words) for words in ("Bias B", "Anomalies changed", "The classifier", "open prompts")]
    assert places == sorted(places)
    assert any(line.startswith("Bias B of answers") and told in line for line in verification_lines(found.as_dict()))


# Within a repair


def test_a_repair_verifies_when_it_is_told_to(tmp_path: Path, output: Path, call: Command) -> None:
    tiny_model(seed=2).save_pretrained(tmp_path / "model")
    inputs = ("-m", tmp_path / "model", "-s", write_suite(tmp_path), "--utility-text", write_text(tmp_path))
    settings = ("--device", "cpu", "--set", "rounds=2", "--max-perplexity-increase", "5", *REPAIR)
    told = ("--verify", "--verify-runs", "2", "--temperature", "0.8", "--classifier", "none")
    outcome = call("repair", *inputs, *settings, *told, "-o", output)
    assert outcome.err == ""
    found = json.loads((output / "result.json").read_text(encoding="utf-8"))["verification"]
    assert (found["amounts"]["runs"], found["amounts"]["temperature"]) == (2, 0.8)
    assert "greedy continuations unchanged" in outcome.out
    assert "What the model writes, before and after" in (output / "report.html").read_text(encoding="utf-8")
    assert "verification" not in json.loads((output / "plan.json").read_text(encoding="utf-8"))
    refused = call("repair", *inputs, *settings, *told[:1], "--verify-runs", "1", "-o", output, "--overwrite")
    assert "at least 2 runs" in refused.refusal
    assert "belong to --verify" in call("repair", *inputs, *told[1:3], "-o", output, "--overwrite").refusal
    again = output.with_name("again")
    call("verify", output, "-s", tmp_path / "small.yaml", "-o", again, *("--runs", "2"), *told[3:], "--device", "cpu")
    assert {**json.loads((again / "verify.json").read_text(encoding="utf-8")), "run": 0} == {**found, "run": 0}
