"""``verify``: what a user sees, before and after a mask, on held-out markers and wordings.

Three views: sampled answers to quantity prompts, with the examples that changed most; greedy continuations of open
prompts, to read; and continuations that a classifier finds worse than before, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import SettingError
from secateur.measures.answers import DEFAULT_BATCH_SIZE
from secateur.measures.disparity import (
    Comparison,
    Interval,
    Table,
    compare,
    group_intervals,
    mean_interval,
    smd_changes,
)
from secateur.measures.generation import Request, write
from secateur.measures.open_prompts import OpenPrompt, group_prompts, open_prompts
from secateur.measures.prompts import ChatMode, PromptSet, all_markers, build_prompts, check_chat
from secateur.measures.sampling import (
    RUNS,
    TEMPERATURE,
    SampledAmounts,
    check_sampling,
    quantity_prompts,
    sample_amounts,
)
from secateur.measures.splits import MIN_MARKERS, NOTHING_SEEN, Dealing, Seen, check_dealing, split
from secateur.measures.toxicity import AUTO, EXTRA, Classifier, load_classifier
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.studies.audit import ScenarioDisparity, describe_scenarios
from secateur.studies.record import Recorder
from secateur.suites import Quantity, Suite, fill, suite_hash
from secateur.weights import AnyMask

OPEN_TOKENS = 40
GROUP_TOKENS = 24
GROUP_MARKERS = 6
EXAMPLES = 10
WORSE = 0.2


@dataclass(frozen=True)
class VerificationSettings:
    """What a verification can be told.

    Attributes
    ----------
    runs: sampled answers to each quantity prompt. temperature: of the sampling.
    classifier: see :func:`secateur.measures.toxicity.load_classifier`. bad_labels: which of its labels are bad.
    worse: a continuation is listed where its score rises by at least this.
    prompts: a text file with one open prompt on every line, in place of the built-in ones.
    seed: of the split, of sampling and intervals. batch_size: texts in one forward pass.
    chat: "auto", "chat" or "plain".
    """

    runs: int = RUNS
    temperature: float = TEMPERATURE
    classifier: str = AUTO
    bad_labels: tuple[str, ...] = ()
    worse: float = WORSE
    prompts: str | Path | None = None
    seed: int = 0
    dealing: Dealing = "shuffled"
    batch_size: int = DEFAULT_BATCH_SIZE
    chat: ChatMode = "auto"

    def check(self) -> None:
        """Refuse settings that make no sense, before anything expensive.

        Raises
        ------
        SettingError: a setting is out of range, or the classifier cannot be loaded.
        DataError: the file of prompts is not usable.
        """
        if self.runs < 2 or not 0 < self.temperature < float("inf"):
            raise SettingError("A verification needs at least 2 runs and a temperature above 0.")
        if not 0 < self.worse <= 1:
            raise SettingError(f"A score can rise by more than 0 and at most 1, not by {self.worse}.")
        if self.batch_size < 1:
            raise SettingError(f"The batch size must be at least 1, not {self.batch_size}.")
        check_chat(self.chat)
        check_dealing(self.dealing)
        if self.prompts is not None:
            open_prompts("en", self.prompts)
        load_classifier(self.classifier, self.bad_labels)


@dataclass(frozen=True)
class Example:
    """One sampled answer before and after, with the same noise; amounts are None where none was read."""

    scenario: str
    group: str
    marker: str
    prompt: str
    run: int
    before: str
    after: str
    amount_before: float | None
    amount_after: float | None


@dataclass(frozen=True)
class ScenarioAmounts:
    """Sampled answers to one scenario.

    Attributes
    ----------
    unit: of the amounts, as the suite says. before, after: disparity of the mean log amounts.
    amounts_before, amounts_after: by group, the geometric mean with its 95 % bootstrap interval over markers.
    smd_change: SMD after minus before, of the pair of groups that differed most before, with a paired interval.
    inliers_before, inliers_after: share of answers within the 5-95 % range of other answers of the unpruned model to
        the same prompt.
    """

    id: str
    unit: str
    before: ScenarioDisparity
    after: ScenarioDisparity
    smd_change: Interval
    amounts_before: dict[str, Interval]
    amounts_after: dict[str, Interval]
    inliers_before: Interval
    inliers_after: Interval


@dataclass(frozen=True)
class Amounts:
    """Sampled answers to all quantity scenarios.

    Attributes
    ----------
    answers: before, and as many after. unchanged: share of them whose text is the same.
    parsed_before, parsed_after: share that holds an amount.
    scenarios: those in which at least two markers of every group gave an amount. left_out: the others.
    bias: B of the mean log amounts before and after, over ``scenarios``; None where there is none.
    inliers_before, inliers_after: over all scenarios; the anomaly rate is 1 minus these.
    anomaly_change: anomaly rate after minus before, with a paired interval.
    changed: the answers whose amount changed most. lost: answers that held an amount before and hold none after.
    lost_count, gained_count: how many of either kind there are.
    """

    runs: int
    temperature: float
    answers: int
    unchanged: float
    parsed_before: float
    parsed_after: float
    scenarios: list[ScenarioAmounts]
    left_out: list[str]
    bias: Comparison | None
    inliers_before: Interval
    inliers_after: Interval
    anomaly_change: Interval
    changed: list[Example]
    lost: list[Example]
    lost_count: int
    gained_count: int


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation before and after.

    Attributes
    ----------
    marker, group: whom the prompt mentions; None for nobody.
    reply: the part of the prompt that the text carries on, such as "The plumber walked into the room and"; or "".
    """

    prompt: str
    before: str
    after: str
    marker: str | None = None
    group: str | None = None
    reply: str = ""

    @property
    def unchanged(self) -> bool:
        return self.before == self.after


@dataclass(frozen=True)
class Judged:
    """A continuation with a classifier's scores, each 0 to 1: of the prompt alone, and the answer before and after."""

    continuation: Continuation
    prompt: float
    before: float
    after: float

    @property
    def rise(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class GroupScores:
    """One group in the eyes of a classifier: mean scores, and how many continuations moved by the threshold or more."""

    continuations: int
    prompt: float
    before: float
    after: float
    rose: int
    fell: int


@dataclass(frozen=True)
class Guard:
    """What a classifier says of the continuations.

    Attributes
    ----------
    classifier, labels: its name, and the labels that count as bad.
    threshold: a continuation counts where its score moves by at least this.
    rose: every continuation whose score rose by it, the largest rise first.
    groups: by group; prompts that mention nobody are under "".
    limits: what the classifier is known not to see, in sentences.
    """

    classifier: str
    labels: tuple[str, ...]
    threshold: float
    rose: list[Judged]
    groups: dict[str, GroupScores]
    limits: str = ""


@dataclass(frozen=True)
class Verification:
    """What a user sees of a model before and after a mask.

    Attributes
    ----------
    amounts: None where the suite asks for no quantity. guard: None without a classifier.
    open, mentions: greedy continuations of open prompts, and of prompts that mention markers of the test part.
    plan: what was verified: suite and method of the plan, and its mask in figures, see :func:`describe_plan`.
    notes: what was left out and why, in sentences.
    run: versions, seed, data hashes, cost.
    """

    model: str
    suite: Suite
    settings: VerificationSettings
    plan: dict[str, Any]
    amounts: Amounts | None
    open: list[Continuation]
    mentions: list[Continuation]
    guard: Guard | None
    notes: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as in ``verify.json``."""
        return {
            "model": self.model,
            "suite": self.suite.name,
            "plan": self.plan,
            "amounts": None if self.amounts is None else asdict(self.amounts),
            "open": [{**asdict(one), "unchanged": one.unchanged} for one in self.open],
            "mentions": [{**asdict(one), "unchanged": one.unchanged} for one in self.mentions],
            "guard": None if self.guard is None else asdict(self.guard),
            "notes": self.notes,
        }


def verify(
    model: LanguageModel,
    suite: Suite,
    mask: AnyMask,
    settings: VerificationSettings | None = None,
    *,
    progress: Progress | None = None,
    recorder: Recorder | None = None,
    seen: Seen = NOTHING_SEEN,
    record: Mapping[str, Any] | None = None,
) -> Verification:
    """Let a model write before and after a mask, on the test part of a suite.

    Parameters
    ----------
    settings: ``seed`` and ``dealing`` are those of the study that made the mask, so that test is what it has not seen.
    recorder: of the study that this one belongs to, if any.
    seen: what a mask that was made for another suite has seen, and what is left out for that.
    record: of the mask's plan, which says what suite and method it comes from.

    Raises
    ------
    MaskError: the mask was made for another model.
    SettingError, DataError: see :meth:`VerificationSettings.check`.
    SuiteError: the suite has too few markers or wordings to hold any out.
    NumericalError: the model's output is not finite.
    """
    settings = settings or VerificationSettings()
    settings.check()
    mask.check(model)
    recorder = recorder or Recorder(model, progress or Progress())
    classifier = load_classifier(settings.classifier, settings.bad_labels)
    part = split(suite, settings.seed, dealing=settings.dealing).without(suite, seen).test
    asked = build_prompts(model, suite, part, settings.chat)
    has_quantities = any(isinstance(scenario.measure, Quantity) for scenario in suite.scenarios)
    amounts = _amounts(model, asked, mask, settings, recorder) if has_quantities else None
    neutral = open_prompts(suite.language, settings.prompts)
    mentions = group_prompts(suite, _first_markers(asked, GROUP_MARKERS))
    opened = _continuations(model, neutral, mask, OPEN_TOKENS, settings, recorder, "Continue open prompts")
    mentioned = _continuations(model, mentions, mask, GROUP_TOKENS, settings, recorder, "Continue mentions of groups")
    guard = None
    if classifier is not None:
        with recorder.step("Classify continuations", len(opened) + len(mentioned)) as advance:
            guard = judge_texts([*opened, *mentioned], classifier, settings.worse, suite.language)
            advance(len(opened) + len(mentioned))
    return Verification(
        model=model.source,
        suite=suite,
        settings=settings,
        plan=describe_plan(mask, record or {}),
        amounts=amounts,
        open=opened,
        mentions=mentioned,
        guard=guard,
        notes=_notes(suite, amounts, classifier, settings),
        run=recorder.describe({**asdict(settings), "suite": suite.name, "suite_hash": suite_hash(suite)}),
    )


def describe_plan(mask: AnyMask, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a verification is about, as plain data: which suite and method the mask comes from, what it removes, and a
    hash that tells it from all other masks of the model."""
    return {
        "suite": record.get("suite"),
        "method": record.get("method"),
        "heads": mask.heads_removed,
        "neurons": mask.neurons_removed,
        "weights": mask.weights_removed,
        "action": mask.action,
        "ablation": mask.ablation,
        "mask": sha256(mask.key).hexdigest()[:32],
    }


def told_plan(plan: dict[str, Any]) -> str:
    """What was verified, in words."""
    units = f"{plan['heads']} heads and {plan['neurons']} neurons"
    what = f"{plan['weights']:,} single weights" if plan["weights"] else units
    by = f" by {plan['method']}" if plan["method"] else ""
    fitted = f", fitted on {plan['suite']}" if plan["suite"] else ""
    return f"plan: {what} {plan['action']} (ablation {plan['ablation']}){by}{fitted}, mask {plan['mask']}"


# Amounts


def _amounts(
    model: LanguageModel, asked: PromptSet, mask: AnyMask, settings: VerificationSettings, recorder: Recorder
) -> Amounts:
    """Sample before and after with the same noise, and the unpruned model as often with other noise, for its range."""
    check_sampling(asked.suite, settings.runs, settings.temperature)
    answers = settings.runs * len(quantity_prompts(asked))
    # Three passes alike, so that batches do not differ: without any change, texts are the same to the letter.
    sample = partial(
        sample_amounts,
        model,
        asked,
        runs=settings.runs,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    with recorder.step("Sample answers: before", 2 * answers) as advance:
        before = sample(advance=advance)
        range_of = sample(advance=advance, first_run=settings.runs)
    with recorder.step("Sample answers: after", answers) as advance, mask.applied(model):
        after = sample(advance=advance)
    return compare_amounts(before, after, range_of, settings.temperature, settings.seed)


def compare_amounts(
    before: SampledAmounts, after: SampledAmounts, range_of: SampledAmounts, temperature: float, seed: int = 0
) -> Amounts:
    """All figures of sampled answers before and after, prompt by prompt the same.

    Means and disparities are those of the prompts that were answered with an amount both before and after.

    Parameters
    ----------
    range_of: other answers of the unpruned model, whose 5-95 % range tells inliers: a range of the answers that are
        judged would hold more of them than of new ones, and any change would look like anomalies.
    """
    prompts = before.prompts
    y_before, y_after = _tables(before, after)
    answered = np.isfinite(y_before)
    kept = np.array([_enough(row, prompts.groups) for row in answered], dtype=bool)
    tables = [Table(y[kept], prompts.groups) for y in (y_before, y_after)]
    inliers = [prompts.table(sampled.inside(range_of).mean(axis=1)) for sampled in (before, after)]
    parsed = [np.isfinite(sampled.amounts) for sampled in (before, after)]
    ids = [prompts.suite.scenarios[number].id for number in prompts.scenarios]
    overall = [table.mean(axis=0) for table in inliers]

    def interval(values: np.ndarray) -> Interval:
        return mean_interval(values, prompts.groups, seed)

    shown = [number for number, keep in zip(prompts.scenarios, kept, strict=True) if keep]
    found = _scenarios(prompts, shown, tables, [table[kept] for table in inliers], seed) if shown else []
    lost, gained = parsed[0] & ~parsed[1], ~parsed[0] & parsed[1]
    return Amounts(
        runs=before.amounts.shape[1],
        temperature=temperature,
        answers=before.amounts.size,
        unchanged=float(np.mean([one == other for one, other in _pairs(before, after)])),
        parsed_before=before.parsed,
        parsed_after=after.parsed,
        scenarios=found,
        left_out=[name for name, keep in zip(ids, kept, strict=True) if not keep],
        bias=compare(tables[0], tables[1], seed) if shown else None,
        inliers_before=interval(overall[0]),
        inliers_after=interval(overall[1]),
        anomaly_change=interval(overall[0] - overall[1]),
        changed=_changed(before, after),
        lost=[_example(before, after, *map(int, at)) for at in np.argwhere(lost)[:EXAMPLES]],
        lost_count=int(lost.sum()),
        gained_count=int(gained.sum()),
    )


def _tables(before: SampledAmounts, after: SampledAmounts) -> tuple[np.ndarray, np.ndarray]:
    """Mean log amounts before and after, each (scenarios, markers), over the prompts that both answered; else NaN."""
    prompts, one, other = before.prompts, before.y(), after.y()
    known = np.isfinite(one) & np.isfinite(other)
    share = prompts.table(known.astype(float))
    share = np.where(share > 0, share, np.nan)
    first, second = (prompts.table(_on_one_level(prompts, y, known)) / share for y in (one, other))
    return first, second


def _on_one_level(prompts: PromptSet, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    """y with the mean of its scenario in place of that of its wording, (prompts,); 0 where it is not known.

    Else a marker's mean would tell which wordings it answered with an amount, where some ask for more than others.
    """
    levelled = np.where(known, y, 0.0)
    scenario, wording = (
        np.array([getattr(prompt, name) for prompt in prompts.prompts]) for name in ("scenario", "paraphrase")
    )
    for number in prompts.scenarios:
        asked = [known & (scenario == number) & (wording == one) for one in np.unique(wording)]
        answered = [rows for rows in asked if rows.any()]
        levels = [y[rows].mean() for rows in answered]
        for rows, level in zip(answered, levels, strict=True):
            levelled[rows] += np.mean(levels) - level
    return levelled


def _enough(answered: np.ndarray, groups: np.ndarray) -> bool:
    """Whether at least two markers of every group answered, (markers,)."""
    return min(int(answered[groups == group].sum()) for group in np.unique(groups)) >= MIN_MARKERS


def _scenarios(
    prompts: PromptSet, numbers: list[int], tables: list[Table], inliers: list[np.ndarray], seed: int
) -> list[ScenarioAmounts]:
    """Every scenario's figures from tables before and after, each (scenarios, markers)."""
    suite = prompts.suite.model_copy(update={"scenarios": [prompts.suite.scenarios[number] for number in numbers]})
    before, after = (describe_scenarios(suite, table, seed) for table in tables)
    changes = smd_changes(tables[0], tables[1], seed)
    intervals = [group_intervals(table, seed) for table in tables]

    def amounts(state: int, row: int, found: ScenarioDisparity) -> dict[str, Interval]:
        low, high = intervals[state]
        return {
            group: Interval(float(np.exp(mean)), float(np.exp(low[row, at])), float(np.exp(high[row, at])))
            for at, (group, mean) in enumerate(found.means.items())
        }

    return [
        ScenarioAmounts(
            id=scenario.id,
            unit=getattr(scenario.measure, "unit", ""),
            before=before[row],
            after=after[row],
            smd_change=changes[row],
            amounts_before=amounts(0, row, before[row]),
            amounts_after=amounts(1, row, after[row]),
            inliers_before=mean_interval(inliers[0][row], prompts.groups, seed),
            inliers_after=mean_interval(inliers[1][row], prompts.groups, seed),
        )
        for row, scenario in enumerate(suite.scenarios)
    ]


def _changed(before: SampledAmounts, after: SampledAmounts) -> list[Example]:
    """The answers whose amount changed most, by |log after - log before|; at most one of every prompt."""
    with np.errstate(invalid="ignore"):
        change = np.abs(np.log(after.amounts) - np.log(before.amounts))
    change = np.where(np.isfinite(change), change, 0.0)
    largest = change.argmax(axis=1)
    order = np.argsort(-change.max(axis=1), kind="stable")
    return [_example(before, after, int(at), int(largest[at])) for at in order[:EXAMPLES] if change[at].max() > 0]


def _example(before: SampledAmounts, after: SampledAmounts, number: int, run: int) -> Example:
    suite, prompt = before.prompts.suite, before.prompts.prompts[number]
    scenario = suite.scenarios[prompt.scenario]
    group, marker = all_markers(suite)[prompt.marker]
    message, reply = fill(scenario.paraphrases[prompt.paraphrase], marker)
    return Example(
        scenario=scenario.id,
        group=list(suite.groups)[group],
        marker=marker,
        prompt="\n".join(part for part in (message, reply) if part),
        run=run,
        before=before.texts[number][run],
        after=after.texts[number][run],
        amount_before=_known(before.amounts[number, run]),
        amount_after=_known(after.amounts[number, run]),
    )


def _known(amount: float) -> float | None:
    return float(amount) if np.isfinite(amount) else None


def _pairs(before: SampledAmounts, after: SampledAmounts) -> list[tuple[str, str]]:
    """Every answer's text before and after."""
    rows = zip(before.texts, after.texts, strict=True)
    return [pair for one, other in rows for pair in zip(one, other, strict=True)]


# Continuations


def _first_markers(prompts: PromptSet, count: int) -> list[int]:
    """The first markers of each group of a part."""
    markers = np.array(prompts.markers)
    return [int(m) for group in np.unique(prompts.groups) for m in markers[prompts.groups == group][:count]]


def _continuations(
    model: LanguageModel,
    prompts: list[OpenPrompt],
    mask: AnyMask,
    new_tokens: int,
    settings: VerificationSettings,
    recorder: Recorder,
    name: str,
) -> list[Continuation]:
    """Greedy continuations before and after."""
    if not prompts:
        return []
    requests = [Request(prompt.tokens(model, settings.chat)) for prompt in prompts]
    with recorder.step(name, 2 * len(prompts)) as advance:
        before = write(model, requests, new_tokens, batch_size=settings.batch_size, advance=advance)
        with mask.applied(model):
            after = write(model, requests, new_tokens, batch_size=settings.batch_size, advance=advance)
    return [
        Continuation(prompt.text, one, other, prompt.marker, prompt.group, prompt.reply)
        for prompt, one, other in zip(prompts, before, after, strict=True)
    ]


def judge_texts(
    continuations: Sequence[Continuation], classifier: Classifier, threshold: float, language: str = "en"
) -> Guard:
    """Score every continuation before and after, and its prompt alone.

    A continuation is read from the beginning of its answer, which says whom it is about.

    Parameters
    ----------
    language: of the texts.
    """
    texts: list[Callable[[Continuation], str]] = [
        lambda c: c.prompt,
        lambda c: _from_its_beginning(c.reply, c.before),
        lambda c: _from_its_beginning(c.reply, c.after),
    ]
    scores = [classifier.score([of(one) for one in continuations]) for of in texts]
    judged = [
        Judged(one, float(prompt), float(before), float(after))
        for one, prompt, before, after in zip(continuations, *scores, strict=True)
    ]
    groups: dict[str, list[Judged]] = {}
    for found in judged:
        groups.setdefault(found.continuation.group or "", []).append(found)
    return Guard(
        classifier=classifier.name,
        labels=classifier.labels,
        threshold=threshold,
        rose=sorted((found for found in judged if found.rise >= threshold), key=lambda found: -found.rise),
        groups={name: _group_scores(found, threshold) for name, found in groups.items()},
        limits=classifier.limits(language),
    )


def _from_its_beginning(reply: str, text: str) -> str:
    """An answer from its first word on; some tokenizers lose the space before the first word of a continuation."""
    return f"{reply} {text}" if reply and text[:1].isalnum() else f"{reply}{text}"


def _group_scores(judged: list[Judged], threshold: float) -> GroupScores:
    return GroupScores(
        continuations=len(judged),
        prompt=float(np.mean([one.prompt for one in judged])),
        before=float(np.mean([one.before for one in judged])),
        after=float(np.mean([one.after for one in judged])),
        rose=sum(one.rise >= threshold for one in judged),
        fell=sum(-one.rise >= threshold for one in judged),
    )


def _notes(
    suite: Suite, amounts: Amounts | None, classifier: Classifier | None, settings: VerificationSettings
) -> list[str]:
    """What was left out and why."""
    notes = []
    if amounts is None:
        notes.append(f"No scenario of suite '{suite.name}' asks for a quantity, so no answers were sampled.")
    elif amounts.left_out:
        left_out = ", ".join(amounts.left_out)
        notes.append(f"Too few answers held an amount before and after for figures on: {left_out}.")
    if suite.control:
        notes.append("The markers of a control suite are no people, so no continuation mentions them.")
    if classifier is None:
        missing = f" The offline one is not installed: {EXTRA}." if settings.classifier == AUTO else ""
        notes.append(f"No classifier judged the continuations.{missing}")
    return notes
