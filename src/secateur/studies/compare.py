"""``compare``: every method on the same model, data and utility limit; chosen on select, judged once on test."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from secateur.errors import SettingError
from secateur.evaluation.evaluator import Pool
from secateur.evaluation.store import Store
from secateur.measures.disparity import SIGNIFICANT, Comparison, Interval, holm, p_value
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.scoring.base import notes_of
from secateur.search.base import Problem
from secateur.search.methods import METHODS, Method, method, methods_of
from secateur.studies.candidates import CandidateRecord, Candidates, Status
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Cost, Costs, Recorder
from secateur.studies.verdict import Examination, examine_if_finite, examine_random, find_faults
from secateur.suites import Suite, suite_hash
from secateur.weights import AnyMask

RANDOM = "random"
DRAWS = 20
QUICK_MARKERS = 6
QUICK_TEST_MARKERS = 10
QUICK_SCENARIOS = 10
QUICK_TOKENS = 1536
QUICK_CONTROL_PROMPTS = 48
QUICK_DRAWS = 5


@dataclass(frozen=True)
class CompareSettings(StudySettings):
    """What a comparison can be told, besides what every study can.

    Attributes
    ----------
    methods: names of the methods; none for all, and then those that do not suit the model or the suite are
        listed as such.
    options: settings by method, such as ``{"fasp": {"seeds": 5}}``. How much a method removes is chosen on select
        unless it is set; how it scores stays at its defaults.
    random_draws: masks of the size that ``random`` chooses, to show their spread on test; None for 20, or 5 where
        it is to be quick. Fewer than 20 are too few to judge by.
    quick: a small part of fit, select, test and text, and coarser searches: minutes, wider intervals.
    """

    methods: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    random_draws: int | None = None
    quick: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return self.methods or tuple(METHODS)

    def check(self) -> None:
        super().check()
        self.check_least("random_draws", 1)
        if len(set(self.names)) < len(self.names):
            raise SettingError("A method is named twice.")
        for name in {*self.options} - {*self.names}:
            raise SettingError(f"There are settings for the method '{name}', which is not compared.")
        for name in self.names:
            method(name, self.options.get(name))

    def reduced(self) -> CompareSettings:
        """The same on less data if it is to be quick."""
        if not self.quick:
            return self
        return replace(
            self,
            max_markers=min(self.max_markers or QUICK_MARKERS, QUICK_MARKERS),
            max_test_markers=min(self.max_test_markers or QUICK_TEST_MARKERS, QUICK_TEST_MARKERS),
            max_scenarios=min(self.max_scenarios or QUICK_SCENARIOS, QUICK_SCENARIOS),
            utility_tokens=min(self.utility_tokens or QUICK_TOKENS, QUICK_TOKENS),
            control_prompts=min(self.control_prompts, QUICK_CONTROL_PROMPTS),
            random_draws=QUICK_DRAWS if self.random_draws is None else self.random_draws,
        )


@dataclass(frozen=True)
class MethodResult:
    """What one method reached.

    Attributes
    ----------
    status: whether a mask was chosen, every setting broke the limit, none within it lowered the bias on select,
        nothing was proposed, the method does not suit the model or the suite, or the model gave no finite answers while
        it searched.
    over_limit: whether the choice breaks the utility limit on test.
    faults: what keeps the reduction on test from being proven, in words.
    heads, neurons, weights: units removed, or single weights. action: "turned down" where units are not removed.
    bias_before, bias_after, reduction, perplexity_increase, control_change: on test, None without a mask.
    p_value, p_holm: of no change of B on test, by itself and corrected for all methods of the comparison.
    random_reductions: for the method ``random``, the reduction under every draw of random masks, of the size that
        it chose, or else of its largest candidate within the limit, or of its smallest.
    candidates: every mask that was measured on select.
    localise_tokens: tokens forwarded to find the units, before anything is measured on select.
    tokens_forward, tokens_backward, seconds: in all, but for random masks on test, which are a baseline for all
        methods: draw_tokens, draw_seconds.
    notes: what the method has to say about its scores.
    """

    name: str
    settings: dict[str, Any]
    status: Status
    candidates: list[CandidateRecord]
    localise_tokens: int
    tokens_forward: int
    tokens_backward: int
    seconds: float
    heads: int = 0
    neurons: int = 0
    weights: int = 0
    action: str = "removed"
    knobs: dict[str, Any] = field(default_factory=dict)
    bias_before: Interval | None = None
    bias_after: Interval | None = None
    reduction: Interval | None = None
    perplexity_increase: Interval | None = None
    control_change: Interval | None = None
    p_value: float | None = None
    p_holm: float | None = None
    random_reductions: list[float] = field(default_factory=list)
    draw_tokens: int = 0
    draw_seconds: float = 0.0
    over_limit: bool = False
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MethodResult:
        """The inverse of ``dataclasses.asdict``: what a resumed run reads back."""
        intervals = ("bias_before", "bias_after", "reduction", "perplexity_increase", "control_change")
        read = {key: Interval(**fields[key]) for key in intervals if fields.get(key) is not None}
        candidates = [CandidateRecord.from_dict(record) for record in fields["candidates"]]
        return cls(**{**fields, **read, "candidates": candidates})

    @property
    def cost(self) -> Cost:
        """In all, random masks included."""
        return Cost(self.seconds + self.draw_seconds, self.tokens_forward + self.draw_tokens, self.tokens_backward)

    @property
    def order(self) -> tuple[bool, float]:
        """What methods are sorted by: those that keep to the limit on test first, the largest reduction first."""
        if self.reduction is None or self.perplexity_increase is None:
            return True, np.inf
        return self.over_limit, -self.reduction.value


@dataclass(frozen=True)
class CompareResult:
    """One line per method.

    Attributes
    ----------
    methods: in the order of the held-out reduction, the largest first; after these the methods whose choice breaks
        the limit on test, and those without a choice.
    limit: the utility limit.
    control_suite: the non-demographic suite, or None.
    run: versions, seed, data hashes, cost.
    """

    model: str
    suite: Suite
    limit: float
    control_suite: str | None
    methods: list[MethodResult]
    run: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The content of ``compare.json``."""
        return {
            "model": self.model,
            "suite": self.suite.name,
            "limit": self.limit,
            "control_suite": self.control_suite,
            "methods": [asdict(found) for found in self.methods],
            "run": self.run,
        }

    def csv(self) -> str:
        """The table as comma-separated values, one line per method."""
        rows = [_flat(found) for found in self.methods]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _flat(found: MethodResult) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": found.name,
        "status": found.status,
        "heads": found.heads,
        "neurons": found.neurons,
        "weights": found.weights,
        "action": found.action,
        "knobs": " ".join(f"{key}={value}" for key, value in found.knobs.items()),
        "faults": "; ".join(found.faults),
    }
    for name in ("bias_before", "bias_after", "reduction", "perplexity_increase", "control_change"):
        interval: Interval | None = getattr(found, name)
        for end in ("value", "low", "high"):
            row[f"{name}_{end}"] = "" if interval is None else getattr(interval, end)
    draws = found.random_reductions
    return {
        **row,
        "p_holm": "" if found.p_holm is None else found.p_holm,
        "random_draws": len(draws) or "",
        "random_lowest": min(draws, default=""),
        "random_mean": float(np.mean(draws)) if draws else "",
        "random_highest": max(draws, default=""),
        "candidates": len(found.candidates),
        "localise_tokens": found.localise_tokens,
        "tokens_forward": found.tokens_forward,
        "tokens_backward": found.tokens_backward,
        "seconds": found.seconds,
    }


Remembered = dict[str, MethodResult]


def compare(
    model: LanguageModel,
    suite: Suite,
    settings: CompareSettings | None = None,
    *,
    progress: Progress | None = None,
    remembered: Remembered | None = None,
    remember: Callable[[MethodResult], None] = lambda _: None,
    costs: Costs | None = None,
    store: Store | None = None,
    cluster: Pool | None = None,
) -> CompareResult:
    """Run every method on the same parts under the same limit.

    Parameters
    ----------
    remembered: results of an interrupted run on the same model, suite and settings; not made again where the method's
        own settings are the same.
    remember: called with every result as soon as it is there. costs: of earlier sittings, which this one adds to.
    store: keeps every measured mask, and those that it has already are not measured again.
    cluster: measures many masks at once, or None.
    """
    settings = (settings or CompareSettings()).reduced()
    settings.check()
    methods, unsuited = check_methods(model, suite, settings)
    progress = progress or Progress()
    costs = costs or Costs()
    recorder = Recorder(model, progress, costs)
    parts = Parts.prepare(model, suite, settings, store, cluster)
    shared = parts.problem(settings, recorder)
    parts.measure_unpruned(recorder)
    cost = recorder.cost
    found: list[MethodResult] = []
    for number, chosen in enumerate(methods, start=1):
        progress.say(f"Method {number} of {len(methods)}: {chosen.name}")
        known = (remembered or {}).get(chosen.name, unsuited.get(chosen.name))
        if known is None or known.settings != chosen.settings:
            known = _run(parts, replace(shared, scores=None), chosen, settings, progress, costs)
            remember(known)
        found.append(known)
        cost += known.cost
    told = {**settings.as_dict(), "suite": suite.name, "suite_hash": suite_hash(suite)}
    return CompareResult(
        model=model.source,
        suite=suite,
        limit=settings.max_perplexity_increase,
        control_suite=settings.control_suite,
        methods=sorted(with_holm(found), key=lambda one: one.order),
        run={**recorder.describe(told), **asdict(cost), "splits": parts.splits.describe(suite)},
    )


def check_methods(
    model: LanguageModel, suite: Suite, settings: CompareSettings
) -> tuple[list[Method], dict[str, MethodResult]]:
    """The methods, and results of those that cannot work on the model or the suite, with the reason.

    Raises
    ------
    SettingError: one of these was asked for by name.
    """
    methods = methods_of(settings.names, settings.options, settings.seed, settings.quick)
    unsuited = {}
    for chosen in methods:
        try:
            chosen.check(model, suite, settings.ablation)
        except SettingError as error:
            if chosen.name in settings.methods or chosen.name in settings.options:
                raise
            unsuited[chosen.name] = _unsuited(chosen, str(error))
    return methods, unsuited


def _run(
    parts: Parts, problem: Problem, chosen: Method, settings: CompareSettings, progress: Progress, costs: Costs
) -> MethodResult:
    """One method: score, propose, choose on select, judge on test."""
    part = f"{chosen.name} {chosen.settings}"
    finding = f"{part}: to find the units"
    recorder = Recorder(problem.model, progress, costs, part)
    # Before the first candidate there is nothing else to pay for.
    found = costs.parts.get(finding, recorder.cost)
    problem = replace(problem, step=recorder.step, localise_tokens=found.tokens_forward)

    def note(_: Candidates) -> None:
        costs.parts[finding] = Cost(tokens_forward=problem.localise_tokens)

    candidates = Candidates(parts.select, settings.max_perplexity_increase, settings.seed, recorder, note)
    candidates.run_if_possible(problem, chosen.search.proposals(problem, chosen.scorer))
    mask = candidates.choose()
    test = None if mask is None else examine_if_finite(parts, mask, settings.seed, recorder)
    cost = recorder.cost
    drawing, draws = Recorder(problem.model, progress, costs, f"{part}: random masks"), list[Comparison]()
    if chosen.name == RANDOM and candidates.records:
        count = settings.random_draws or DRAWS
        draws = examine_random(parts, mask or _standing_in(candidates), count, settings.seed, drawing)
    return MethodResult(
        name=chosen.name,
        settings=chosen.settings,
        status=candidates.status,
        candidates=candidates.records,
        localise_tokens=problem.localise_tokens,
        **asdict(cost),
        random_reductions=[draw.reduction.value for draw in draws],
        draw_tokens=drawing.cost.tokens_forward,
        draw_seconds=drawing.cost.seconds,
        notes=[f"{chosen.name}: {candidates.reason}"] if candidates.reason else notes_of(problem.scores),
        **({} if mask is None else _choice(mask, candidates)),
        **({} if mask is None else _verdict(test, draws, settings.max_perplexity_increase)),
    )


def with_holm(found: Sequence[MethodResult]) -> list[MethodResult]:
    """Results with p-values corrected for all methods that were judged; a fall that this makes chance is a fault."""
    judged = {one.name: one.p_value for one in found if one.p_value is not None}
    adjusted = dict(zip(judged, holm(np.array([*judged.values()])).tolist(), strict=True))
    return [_corrected(one, adjusted[one.name], len(judged)) if one.name in judged else one for one in found]


def _corrected(found: MethodResult, p_holm: float, judged: int) -> MethodResult:
    """One result; where the interval of its reduction includes no effect, its faults say so already."""
    chance = []
    if p_holm >= SIGNIFICANT and found.reduction is not None and found.reduction.low > 0:
        chance = [f"corrected for {judged} methods (Holm), the fall can be chance (p = {p_holm:.2g})"]
    return replace(found, p_holm=p_holm, faults=[*found.faults, *chance])


def _choice(mask: AnyMask, candidates: Candidates) -> dict[str, Any]:
    """What was chosen, as fields of a result."""
    return {
        "heads": mask.heads_removed,
        "neurons": mask.neurons_removed,
        "weights": mask.weights_removed,
        "action": mask.action,
        "knobs": next(record.knobs for record in candidates.records if record.chosen),
    }


def _verdict(test: Examination | None, draws: list[Comparison], limit: float) -> dict[str, Any]:
    """What the test part says of the choice, as fields of a result."""
    if test is None:
        return {"over_limit": True, "faults": ["the model gives no finite answers on the test part"]}
    return {
        "bias_before": test.comparison.before,
        "bias_after": test.comparison.after,
        "reduction": test.comparison.reduction,
        "perplexity_increase": test.perplexity_increase,
        "control_change": None if test.control is None else test.control.change,
        "p_value": p_value(test.comparison.fall),
        "over_limit": test.perplexity_increase.value > limit,
        "faults": find_faults(test, draws, limit),
    }


def _unsuited(chosen: Method, reason: str) -> MethodResult:
    return MethodResult(chosen.name, chosen.settings, "does not apply", [], 0, 0, 0, 0.0, notes=[reason])


def _standing_in(candidates: Candidates) -> AnyMask:
    """The largest candidate within the limit, or else the smallest."""
    sizes = [(mask.heads_removed + mask.neurons_removed, record.within_limit) for mask, record in candidates.measured]
    inside = [number for number, (_, within) in enumerate(sizes) if within]
    best = max(inside, key=lambda n: sizes[n][0]) if inside else min(range(len(sizes)), key=lambda n: sizes[n][0])
    return candidates.measured[best][0]
