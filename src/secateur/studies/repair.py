"""``repair``: score every unit, choose a mask on select, judge it once on test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import SettingError
from secateur.evaluation.divergence import Divergence
from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import DEFAULT_BATCH_SIZE
from secateur.measures.disparity import Comparison, Interval, compare, corrected_square, suite_bias
from secateur.measures.prompts import ChatMode, PromptSet, build_prompts, check_chat
from secateur.measures.splits import Splits, split
from secateur.measures.utility import (
    DEFAULT_UTILITY_TOKENS,
    NeutralText,
    activation_means,
    read_passages,
    split_text,
)
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.scoring import Scorer, Scores, scorer
from secateur.scoring.attribution import disparity
from secateur.search.elimination import CandidateKind, Selection, Trial, geometric_counts, next_step, top_units
from secateur.studies.audit import ScenarioDisparity, describe_scenarios
from secateur.studies.plan import Plan
from secateur.studies.record import Recorder
from secateur.suites import Suite, load_suite, suite_hash
from secateur.units import ActivationMeans, Mask, UnitSpace, check_ablation

Verdict = str
VERIFIED, NOT_VERIFIED = "verified", "not verified"
FOLD_PROMPTS = 256
CONTROL_PROMPTS = 96


@dataclass(frozen=True)
class RepairSettings:
    """Everything that a repair can be told.

    Attributes
    ----------
    method: name of the scorer.
    max_perplexity_increase: the utility limit, 0.02 for +2 %.
    ablation: what a removed unit gives: "zero" or its "mean" over neutral text.
    seed: of splits, random masks, permutations and bootstrap.
    batch_size: prompts in one forward pass.
    chat: "auto", "chat" or "plain".
    max_markers: at most so many markers per group in fit and select; None for all. Test uses all.
    utility_text: a text file instead of the built-in neutral corpus.
    utility_tokens: tokens of it per part; None for all.
    random_draws: random masks of the same size to compare with.
    control_suite: a non-demographic suite measured before and after; None for none.
    max_heads, max_neurons: the largest counts among the candidates.
    rounds: of removing and scoring again.
    """

    method: str = "attribution"
    max_perplexity_increase: float = 0.02
    ablation: str = "zero"
    seed: int = 0
    batch_size: int = DEFAULT_BATCH_SIZE
    chat: ChatMode = "auto"
    max_markers: int | None = None
    utility_text: str | Path | None = None
    utility_tokens: int | None = DEFAULT_UTILITY_TOKENS
    random_draws: int = 5
    control_suite: str | None = "control-colour"
    max_heads: int = 4
    max_neurons: int = 64
    rounds: int = 6

    def check(self) -> None:
        """Refuse settings that make no sense, before anything expensive.

        Raises
        ------
        SettingError: names the setting and its range.
        DataError, SuiteError: the utility text or the control suite is not usable.
        """
        scorer(self.method)
        check_ablation(self.ablation)
        check_chat(self.chat)
        read_passages(self.utility_text)
        if self.control_suite is not None:
            load_suite(self.control_suite)
        if not 0 < self.max_perplexity_increase < 10:
            raise SettingError("The maximum perplexity increase must lie between 0 and 10 (0.02 stands for 2 %).")
        for name, low in (("batch_size", 1), ("random_draws", 1), ("max_heads", 0), ("max_neurons", 0), ("rounds", 0)):
            if getattr(self, name) < low:
                raise SettingError(f"The setting {name} must be at least {low}, not {getattr(self, name)}.")
        for name, low in (("max_markers", 2), ("utility_tokens", 512)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise SettingError(f"The setting {name} must be at least {low}, not {value}.")
        if self.max_heads + self.max_neurons + self.rounds == 0:
            raise SettingError("max_heads, max_neurons and rounds are all 0, so there would be no candidate.")


@dataclass(frozen=True)
class CandidateRecord:
    """A candidate's figures on the select part.

    Attributes
    ----------
    bias: corrected suite bias B. bias_square: B^2 before the root, negative below the noise.
    perplexity_increase, perplexity_high: relative increase and the upper end of its 95 % interval.
    within_limit: whether the increase plus one standard error keeps to the limit, so that the limit
        is likely to hold on other text, too.
    """

    kind: CandidateKind
    heads: int
    neurons: int
    bias: float
    bias_square: float
    mean_abs_gap: float
    perplexity_increase: float
    perplexity_high: float
    within_limit: bool
    chosen: bool = False


@dataclass(frozen=True)
class RepairResult:
    """What a repair found, chose and proved.

    Attributes
    ----------
    mask: the chosen mask, or None where no candidate passed.
    verdict: "verified" or "not verified"; explanation: why, in words.
    comparison: bias on test before and after. random: the same for random masks of the same size.
    control: the same for the control suite.
    perplexity_before, perplexity_after, perplexity_increase, kl: on the test part of the text.
    test_before, test_after: every scenario on test.
    candidates: every mask that was measured on select.
    scores: of the unpruned model.
    """

    model: str
    suite: Suite
    limit: float
    mask: Mask | None
    verdict: Verdict
    explanation: str
    candidates: list[CandidateRecord]
    scores: Scores
    run: dict[str, Any]
    method: str = "attribution"
    comparison: Comparison | None = None
    random: list[Comparison] = field(default_factory=list)
    control_suite: str | None = None
    control: Comparison | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_increase: Interval | None = None
    kl: float | None = None
    test_before: list[ScenarioDisparity] = field(default_factory=list)
    test_after: list[ScenarioDisparity] = field(default_factory=list)

    @property
    def plan(self) -> Plan | None:
        """The chosen mask with its record, or None where no candidate passed."""
        if self.mask is None:
            return None
        # A plan's file lists its units one by one, which leaves no need for their counts.
        figures = {key: value for key, value in self.as_dict().items() if key not in ("candidates", "units")}
        return Plan(self.mask, {**figures, **{key: self.run[key] for key in ("settings", "splits", "versions")}})

    @property
    def random_reduction(self) -> Interval:
        """Mean reduction by random masks; low and high are the smallest and largest draw."""
        values = [draw.reduction.value for draw in self.random]
        return Interval(float(np.mean(values)), min(values), max(values))

    def as_dict(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        head: dict[str, Any] = {"model": self.model, "suite": self.suite.name, "method": self.method}
        tail = {
            "verdict": self.verdict,
            "explanation": self.explanation,
            "seconds": self.run["seconds"],
            "tokens_forward": self.run["tokens_forward"],
            "tokens_backward": self.run["tokens_backward"],
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }
        if self.mask is None or self.comparison is None or self.perplexity_increase is None:
            return {**head, "units": None, "test": None, "utility": None, **tail}
        mask = self.mask
        return {
            **head,
            "units": {
                "heads": mask.heads_removed,
                "neurons": mask.neurons_removed,
                "heads_total": mask.space.n_heads,
                "neurons_total": mask.space.n_neurons,
            },
            "test": {
                "bias_before": self.comparison.before.as_dict(),
                "bias_after": self.comparison.after.as_dict(),
                "reduction": self.comparison.reduction.as_dict(),
                "random_reduction": self.random_reduction.as_dict(),
                "random_draws": [draw.reduction.value for draw in self.random],
                "control_suite": self.control_suite,
                "control_change": None if self.control is None else self.control.change.as_dict(),
            },
            "utility": {
                "perplexity_before": self.perplexity_before,
                "perplexity_after": self.perplexity_after,
                "perplexity_increase": self.perplexity_increase.as_dict(),
                "kl": self.kl,
            },
            **tail,
        }


PartialSink = Callable[[dict[str, Any]], None]


def repair(
    model: LanguageModel,
    suite: Suite,
    settings: RepairSettings | None = None,
    *,
    progress: Progress | None = None,
    save_partial: PartialSink = lambda _: None,
) -> RepairResult:
    """Find the units that carry a suite's bias, choose which to remove, and judge the choice.

    Scores come from the fit part, every choice is made on select, and test is read once, at the
    end, for the unpruned model, the chosen mask, random masks of its size and a control suite.

    Parameters
    ----------
    save_partial: called with plain data after every candidate, so that an interrupted run
        leaves what it has found.

    Returns
    -------
    RepairResult: its ``mask`` and ``plan`` are None where no candidate lowered the bias within the limit.
    """
    settings = settings or RepairSettings()
    settings.check()
    data = _Data.prepare(model, suite, settings)
    recorder = Recorder(model, progress or Progress())
    run = _Run(model, suite, settings, data, recorder, save_partial)
    scores = run.search()
    chosen = run.choose()
    if chosen is None:
        return run.nothing(scores)
    return run.judge(chosen, scores)


@dataclass(frozen=True, eq=False)
class _Data:
    """The three parts, tokenised and packed, and the text that goes with each.

    Fit is dealt into folds of scenarios, each with all markers: scoring in rounds takes one fold
    after the other, which is faster and keeps any round from fitting its own prompts too well.
    """

    splits: Splits
    fit: list[Evaluator]
    select: Evaluator
    test: Evaluator
    control: Evaluator | None

    @classmethod
    def prepare(cls, model: LanguageModel, suite: Suite, settings: RepairSettings) -> _Data:
        splits = split(suite, settings.seed, settings.max_markers)
        passages = read_passages(settings.utility_text)
        text = split_text(model, passages, settings.seed, max_tokens=settings.utility_tokens)

        def evaluator(prompts: PromptSet, neutral: NeutralText | None = None, divergence: bool = False) -> Evaluator:
            return Evaluator(model, prompts, neutral, settings.batch_size, divergence)

        control = None
        if settings.control_suite is not None:
            asked = load_suite(settings.control_suite)
            prompts = build_prompts(model, asked, split(asked, settings.seed).test, settings.chat)
            control = evaluator(folds(prompts, CONTROL_PROMPTS)[0])
        fit = build_prompts(model, suite, splits.fit, settings.chat)
        select = build_prompts(model, suite, splits.select, settings.chat)
        test = build_prompts(model, suite, splits.test, settings.chat)
        return cls(
            splits=splits,
            fit=[evaluator(fold, text["fit"]) for fold in folds(fit)],
            select=evaluator(select, text["select"]),
            test=evaluator(test, text["test"], divergence=True),
            control=control,
        )


def folds(prompts: PromptSet, size: int = FOLD_PROMPTS) -> list[PromptSet]:
    """Deal the scenarios of a set into folds of about ``size`` prompts each."""
    number = min(len(prompts.scenarios), max(1, round(len(prompts) / size)))
    return [prompts.of_scenarios(prompts.scenarios[i::number]) for i in range(number)]


@dataclass(eq=False)
class _Run:
    """One repair in progress."""

    model: LanguageModel
    suite: Suite
    settings: RepairSettings
    data: _Data
    recorder: Recorder
    save_partial: PartialSink
    candidates: list[tuple[Mask, CandidateRecord]] = field(default_factory=list)
    means: ActivationMeans | None = None

    @property
    def limit(self) -> float:
        return self.settings.max_perplexity_increase

    def search(self) -> Scores:
        """Measure every candidate on select; return the scores of the unpruned model."""
        select, text = self.data.select, self.data.fit[0].text
        if self.settings.ablation == "mean":
            assert text is not None
            with self.recorder.step("Mean activations", len(text.windows)) as advance:
                self.means = activation_means(self.model, text, advance)
        with self.recorder.step("Measure the unpruned model", select.work(utility=True)) as advance:
            select.evaluate(None, advance, utility=True)
        method = scorer(self.settings.method)
        scores = self._score(method, None)
        self._rank(scores)
        self._eliminate(method, scores)
        return scores

    def _score(self, method: Scorer, mask: Mask | None, number: int = 0) -> Scores:
        fold = self._fold(number)
        with self.recorder.step("Score every head and neuron", method.work(fold)) as advance:
            return method.score(fold, mask, self.means, advance)

    def _fold(self, number: int) -> Evaluator:
        return self.data.fit[number % len(self.data.fit)]

    def _rank(self, scores: Scores) -> None:
        """Measure heads alone and neurons alone, as first ranked: the largest number that keeps to the limit."""
        space = UnitSpace.of(self.model)
        limits: tuple[tuple[CandidateKind, int], ...] = (
            ("heads", self.settings.max_heads),
            ("neurons", self.settings.max_neurons),
        )
        for kind, largest in limits:
            for selection in top_units(scores, space, kind, geometric_counts(largest)):
                if self._measure(selection).within_limit:
                    break  # fewer units of the same kind would do less

    def _eliminate(self, method: Scorer, scores: Scores) -> None:
        """Remove heads and neurons together in rounds, scoring anew on the next fold after each.

        What is removed is measured on select after 1, 3, 7, ... rounds and at the end. Where it breaks
        the utility limit, the rounds before are measured, the last first, until one keeps to it.
        """
        since_measured: list[np.ndarray] = []
        for number, removed in enumerate(self._path(method, scores), start=1):
            since_measured.append(removed)
            if number & (number + 1) == 0:
                if not self._measure(Selection("both", removed)).within_limit:
                    since_measured.pop()
                    break
                since_measured.clear()
        for removed in reversed(since_measured):
            if self._measure(Selection("both", removed)).within_limit:
                break

    def _path(self, method: Scorer, scores: Scores) -> Iterator[np.ndarray]:
        """Growing sets of removed units, one per round."""
        assert self.data.fit[0].text is not None
        space = UnitSpace.of(self.model)
        divergence = Divergence(self.model, self.data.fit[0].text)
        trial = Trial(scores.damage, lambda units: divergence.of(self._mask(units)))
        for number in range(self.settings.rounds):
            if number > 0:
                scores = self._score(method, self._mask(trial.removed), number)
            table = self._fold(number).evaluate(self._mask(trial.removed)).table
            step = next_step(scores, space, "both", np.concatenate([trial.removed, trial.refused]), disparity(table))
            before = len(trial.removed)
            with self.recorder.step("Try the next units on neutral text", len(step)) as advance:
                trial.remove(step, advance)
            if len(trial.removed) == before:
                return
            yield trial.removed

    def _mask(self, removed: np.ndarray) -> Mask:
        return Mask.removing(self.model, removed, self.means)

    def _measure(self, selection: Selection) -> CandidateRecord:
        mask = self._mask(selection.removed)
        select = self.data.select
        name = f"Candidate {len(self.candidates) + 1}: {mask.heads_removed} heads, {mask.neurons_removed} neurons"
        with self.recorder.step(name, select.work(utility=True)) as advance:
            table = select.evaluate(mask, advance, utility=True).table
        increase = select.perplexity_increase(mask, self.settings.seed)
        bias = suite_bias(table, self.settings.seed)
        record = CandidateRecord(
            kind=selection.kind,
            heads=mask.heads_removed,
            neurons=mask.neurons_removed,
            bias=bias.corrected,
            bias_square=corrected_square(table, self.settings.seed),
            mean_abs_gap=bias.mean_abs_gap,
            perplexity_increase=increase.value,
            perplexity_high=increase.high,
            within_limit=increase.value + increase.standard_error <= self.limit,
        )
        self.candidates.append((mask, record))
        self.save_partial(
            {
                "suite": self.suite.name,
                "candidates": [{**asdict(r), "removed": m.removed.tolist()} for m, r in self.candidates],
                "run": self._describe(),
            }
        )
        return record

    def choose(self) -> Mask | None:
        """The candidate with the least bias on select within the limit, if it is better than none."""
        before = corrected_square(self.data.select.evaluate().table, self.settings.seed)
        passing = [
            (record.bias_square, record.heads + record.neurons, number)
            for number, (_, record) in enumerate(self.candidates)
            if record.within_limit and record.bias_square < before
        ]
        if not passing:
            return None
        number = min(passing)[2]
        mask, record = self.candidates[number]
        self.candidates[number] = (mask, replace(record, chosen=True))
        return mask

    def judge(self, mask: Mask, scores: Scores) -> RepairResult:
        """Read the test part: unpruned, masked, random masks and the control suite."""
        test, seed = self.data.test, self.settings.seed
        with self.recorder.step("Test: before", test.work(utility=True)) as advance:
            before = test.evaluate(None, advance, utility=True).table
        with self.recorder.step("Test: after", test.work(utility=True)) as advance:
            after = test.evaluate(mask, advance, utility=True).table
        random = self._random(mask)
        control = self._control(mask)
        comparison = compare(before, after, seed)
        increase = test.perplexity_increase(mask, seed)
        verdict, explanation = judge(comparison, increase, random, self.limit)
        return RepairResult(
            model=self.model.source,
            suite=self.suite,
            method=self.settings.method,
            limit=self.limit,
            mask=mask,
            verdict=verdict,
            explanation=explanation,
            candidates=[record for _, record in self.candidates],
            scores=scores,
            run=self._describe(),
            comparison=comparison,
            random=random,
            control_suite=self.settings.control_suite,
            control=control,
            perplexity_before=test.perplexity(),
            perplexity_after=test.perplexity(mask),
            perplexity_increase=increase,
            kl=test.kl_divergence(mask),
            test_before=describe_scenarios(self.suite, before, seed),
            test_after=describe_scenarios(self.suite, after, seed),
        )

    def _random(self, mask: Mask) -> list[Comparison]:
        rng = np.random.default_rng(self.settings.seed + 1)
        test, draws = self.data.test, self.settings.random_draws
        before = test.evaluate().table
        comparisons = []
        with self.recorder.step("Test: random masks of the same size", draws * test.work()) as advance:
            for _ in range(draws):
                after = test.evaluate(self._mask(random_units(mask, rng)), advance).table
                comparisons.append(compare(before, after, self.settings.seed))
        return comparisons

    def _control(self, mask: Mask) -> Comparison | None:
        control = self.data.control
        if control is None:
            return None
        with self.recorder.step(f"Control suite {self.settings.control_suite}", 2 * control.work()) as advance:
            before = control.evaluate(None, advance).table
            after = control.evaluate(mask, advance).table
        return compare(before, after, self.settings.seed)

    def nothing(self, scores: Scores) -> RepairResult:
        """The result where no candidate passed: the model is best left as it is."""
        return RepairResult(
            model=self.model.source,
            suite=self.suite,
            method=self.settings.method,
            limit=self.limit,
            mask=None,
            verdict=NOT_VERIFIED,
            explanation=why_nothing([record for _, record in self.candidates], self.limit),
            candidates=[record for _, record in self.candidates],
            scores=scores,
            run=self._describe(),
        )

    def _describe(self) -> dict[str, Any]:
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(self.settings).items()}
        described = self.recorder.describe(
            {**settings, "suite": self.suite.name, "suite_hash": suite_hash(self.suite)},
        )
        return {**described, "splits": self.data.splits.describe(self.suite)}


def random_units(mask: Mask, rng: np.random.Generator) -> np.ndarray:
    """Flat positions of as many heads and neurons as a mask removes, drawn at random."""
    space = mask.space
    heads = rng.choice(space.n_heads, size=mask.heads_removed, replace=False)
    neurons = space.n_heads + rng.choice(space.n_neurons, size=mask.neurons_removed, replace=False)
    return np.concatenate([heads, neurons])


def judge(comparison: Comparison, increase: Interval, random: list[Comparison], limit: float) -> tuple[Verdict, str]:
    """The verdict on the test figures, and its reasons in words.

    Verified means: there was a bias (B before has a lower end above 0), it fell (the reduction's
    lower end is above 0), by more than under every random mask, and perplexity kept to the limit.
    """
    best_random = max(draw.reduction.value for draw in random)
    reduction = comparison.reduction
    faults = []
    if comparison.before.low <= 0:
        faults.append(f"the bias before the repair ({comparison.before}) cannot be told from chance on the test part")
    if reduction.low <= 0:
        faults.append(f"the interval of the reduction ({reduction.low:.0%} to {reduction.high:.0%}) includes no effect")
    if reduction.value <= best_random:
        faults.append(f"a random mask of the same size did as well ({best_random:.0%})")
    if increase.value > limit:
        faults.append(f"perplexity rose by {increase.value:.2%}, above the limit of {100 * limit:.3g}%")
    figures = (
        f"On unseen markers and wordings the bias fell by {reduction.value:.0%} "
        f"(95 % interval {reduction.low:.0%} to {reduction.high:.0%}), perplexity changed by {increase.value:+.2%}, "
        f"and random masks of the same size changed the bias by {-np.mean([d.reduction.value for d in random]):+.0%}."
    )
    if not faults:
        return VERIFIED, figures
    return NOT_VERIFIED, f"Not proven: {'; '.join(faults)}. {figures}"


def why_nothing(candidates: list[CandidateRecord], limit: float) -> str:
    """Explain which limit held every candidate back."""
    if not candidates:
        return "No unit's removal is predicted to lower the bias, so the model is left as it is."
    inside = [candidate for candidate in candidates if candidate.within_limit]
    if not inside:
        cheapest = min(candidates, key=lambda candidate: candidate.perplexity_high)
        return (
            f"Every candidate costs too much: the cheapest raises perplexity by {cheapest.perplexity_increase:.2%} "
            f"(up to {cheapest.perplexity_high:.2%}), the limit is {100 * limit:.3g}%. Raise --max-perplexity-increase "
            "to allow more; the model is left as it is."
        )
    return (
        f"No candidate within the perplexity limit of {100 * limit:.3g}% ({len(inside)} of {len(candidates)}) lowers "
        "the bias on the select part; the model is left as it is."
    )
