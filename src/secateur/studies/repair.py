"""``repair``: score every unit, choose a mask on select, judge it once on test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from secateur.evaluation.evaluator import Pool
from secateur.evaluation.store import Store
from secateur.measures.disparity import Comparison, Interval, Table
from secateur.measures.selection import Selection, selections
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.scoring.base import Scores, notes_of
from secateur.search.methods import DEFAULT_METHOD, Method, method
from secateur.studies.audit import ScenarioDisparity, describe_scenarios
from secateur.studies.candidates import CandidateRecord, Candidates, why_nothing
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.plan import Plan
from secateur.studies.record import Costs, Recorder
from secateur.studies.verdict import NOT_VERIFIED, Verdict, examine, examine_random, judge
from secateur.studies.verification import Verification, VerificationSettings, verify
from secateur.suites import Suite, suite_hash
from secateur.suites.joining import thinned
from secateur.units import UnitSpace
from secateur.weights import AnyMask

# Of a result, in its plan: the file lists its units one by one, and texts are for the report.
LEFT_OUT = ("candidates", "units", "selections", "verification")


@dataclass(frozen=True)
class RepairSettings(StudySettings):
    """Everything that a repair can be told, besides what every study can.

    Attributes
    ----------
    method: how units are scored and chosen.
    options: settings of the method by name, such as ``{"rounds": 4}``.
    random_draws: random masks of the same size to compare with.
    verification: also let the model write before and after, see :func:`secateur.studies.verification.verify`; its
        seed, batch size and chat mode are the repair's. None for not.
    """

    method: str = DEFAULT_METHOD
    options: dict[str, Any] = field(default_factory=dict)
    random_draws: int = 5
    verification: VerificationSettings | None = None

    def check(self) -> None:
        super().check()
        method(self.method, self.options)
        self.check_least("random_draws", 1)
        if self.verification is not None:
            self.verification.check()


@dataclass(frozen=True)
class RepairResult:
    """What a repair found, chose and proved.

    Attributes
    ----------
    mask: the chosen mask, or None where no candidate passed. space: the units of the model.
    verdict: "verified" or "not verified"; explanation: why, in words.
    comparison: bias on test before and after. random: the same for random masks of the same size.
    p_before: permutation p-value of the bias on test before.
    control: the same for the control suite.
    perplexity_before, perplexity_after, perplexity_increase, kl: on the test part of the text.
    test_before, test_after: every scenario on test.
    table_before, table_after: y of every scenario and marker on test; kept out of all files but the report.
    selections_before, selections_after: selection rates of the suite's decisions on test; none where it has none.
    candidates: every mask that was measured on select.
    scores: of the unpruned model.
    verification: what the model writes before and after, where that was asked for.
    """

    model: str
    suite: Suite
    limit: float
    mask: AnyMask | None
    space: UnitSpace
    verdict: Verdict
    explanation: str
    candidates: list[CandidateRecord]
    scores: Scores | None
    run: dict[str, Any]
    method: str = DEFAULT_METHOD
    comparison: Comparison | None = None
    p_before: float | None = None
    random: list[Comparison] = field(default_factory=list)
    control_suite: str | None = None
    control: Comparison | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_increase: Interval | None = None
    kl: float | None = None
    test_before: list[ScenarioDisparity] = field(default_factory=list)
    test_after: list[ScenarioDisparity] = field(default_factory=list)
    table_before: Table | None = None
    table_after: Table | None = None
    selections_before: list[Selection] = field(default_factory=list)
    selections_after: list[Selection] = field(default_factory=list)
    verification: Verification | None = None

    @property
    def plan(self) -> Plan | None:
        """The chosen mask with its record, or None where no candidate passed."""
        if self.mask is None:
            return None
        figures = {key: value for key, value in self.as_dict().items() if key not in LEFT_OUT}
        told = ("settings", "splits", "versions", "command")
        return Plan(self.mask, {**figures, **{key: self.run[key] for key in told}})

    @property
    def asked(self) -> Suite:
        """The suite with the scenarios that were judged, one for every row of the tables."""
        judged = {one.id for one in self.test_before}
        scenarios = [scenario for scenario in self.suite.scenarios if scenario.id in judged]
        return self.suite.model_copy(update={"scenarios": scenarios})

    @property
    def notes(self) -> list[str]:
        """What the method has to say about its scores, in sentences."""
        return notes_of(self.scores)

    @property
    def random_reduction(self) -> Interval | None:
        """Mean reduction by random masks; low and high are the smallest and largest draw. None without draws."""
        values = [draw.reduction.value for draw in self.random]
        return Interval(float(np.mean(values)), min(values), max(values)) if values else None

    def as_dict(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        drawn = self.random_reduction
        head: dict[str, Any] = {"model": self.model, "suite": self.suite.name, "method": self.method}
        tail = {
            "verdict": self.verdict,
            "explanation": self.explanation,
            "seconds": self.run["seconds"],
            "tokens_forward": self.run["tokens_forward"],
            "tokens_backward": self.run["tokens_backward"],
            "carried_on": self.run["carried_on"],
            "notes": self.notes,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "verification": None if self.verification is None else self.verification.as_dict(),
        }
        if self.mask is None or self.comparison is None or self.perplexity_increase is None:
            return {**head, "units": None, "test": None, "utility": None, "selections": None, **tail}
        mask = self.mask
        return {
            **head,
            "units": {
                "heads": mask.heads_removed,
                "neurons": mask.neurons_removed,
                "weights": mask.weights_removed,
                "action": mask.action,
                "heads_total": self.space.n_heads,
                "neurons_total": self.space.n_neurons,
            },
            "test": {
                **self.comparison.as_dict(),
                "p_before": self.p_before,
                **({} if drawn is None else {"random_reduction": drawn.as_dict()}),
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
            "selections": {
                "before": [selection.as_dict() for selection in self.selections_before],
                "after": [selection.as_dict() for selection in self.selections_after],
            },
            **tail,
        }


def check_method(model: LanguageModel, suite: Suite, settings: RepairSettings) -> Method:
    """The method of a repair.

    Raises
    ------
    SettingError: it cannot work on the model or the suite.
    """
    chosen = method(settings.method, settings.options).seeded(settings.seed)
    chosen.check(model, suite, settings.ablation)
    return chosen


PartialSink = Callable[[dict[str, Any]], None]


def repair(
    model: LanguageModel,
    suite: Suite,
    settings: RepairSettings | None = None,
    *,
    progress: Progress | None = None,
    save_partial: PartialSink = lambda _: None,
    costs: Costs | None = None,
    store: Store | None = None,
    cluster: Pool | None = None,
) -> RepairResult:
    """Find the units that carry a suite's bias, choose which to remove, and judge the choice.

    Scores come from the fit part, every choice is made on select, and test is read once, at the
    end, for the unpruned model, the chosen mask, random masks of its size and a control suite.

    Parameters
    ----------
    save_partial: called with plain data after every candidate, so that an interrupted run
        leaves what it has found. costs: of earlier sittings, which this one adds to.
    store: keeps every measured mask, and those that it has already are not measured again.
    cluster: measures many masks at once, or None.

    Returns
    -------
    RepairResult: its ``mask`` and ``plan`` are None where no candidate lowered the bias within the limit.
    """
    settings = settings or RepairSettings()
    settings.check()
    chosen_method = check_method(model, suite, settings)
    parts = Parts.prepare(model, suite, settings, store, cluster, divergence=True)
    recorder = Recorder(model, progress or Progress(), costs or Costs())

    def describe() -> dict[str, Any]:
        told = {**settings.as_dict(), "options": chosen_method.settings, "suite": suite.name}
        run = recorder.describe({**told, "suite_hash": suite_hash(suite)})
        return {**run, "splits": parts.splits.describe(suite)}

    def save(candidates: Candidates) -> None:
        run = {**describe(), "finished": None}
        save_partial({"suite": suite.name, "candidates": candidates.as_list(), "run": run})

    problem = parts.problem(settings, recorder)
    candidates = Candidates(parts.select, settings.max_perplexity_increase, settings.seed, recorder, save)
    candidates.run(problem, chosen_method.search.proposals(problem, chosen_method.scorer))
    mask = candidates.choose()

    def result(verdict: Verdict, explanation: str, **figures: Any) -> RepairResult:
        return RepairResult(
            model=model.source,
            suite=suite,
            method=settings.method,
            limit=settings.max_perplexity_increase,
            mask=mask,
            space=problem.space,
            verdict=verdict,
            explanation=explanation,
            candidates=candidates.records,
            scores=problem.scores,
            run=describe(),
            **figures,
        )

    if mask is None:
        return result(NOT_VERIFIED, why_nothing(candidates.records, settings.max_perplexity_increase))
    found = examine(parts, mask, settings.seed, recorder)
    random = examine_random(parts, mask, settings.random_draws, settings.seed, recorder)
    verdict, explanation = judge(found, random, settings.max_perplexity_increase)
    verification, asked = _verification(model, suite, mask, settings, recorder), thinned(suite, settings.max_scenarios)
    return result(
        verdict,
        explanation,
        comparison=found.comparison,
        p_before=found.p_before,
        random=random,
        control_suite=settings.control_suite,
        control=found.control,
        perplexity_before=found.perplexity_before,
        perplexity_after=found.perplexity_after,
        perplexity_increase=found.perplexity_increase,
        kl=found.kl,
        test_before=describe_scenarios(asked, found.before, settings.seed),
        test_after=describe_scenarios(asked, found.after, settings.seed),
        table_before=found.before,
        table_after=found.after,
        selections_before=selections(parts.test.prompts, parts.test.y(), settings.seed),
        selections_after=selections(parts.test.prompts, parts.test.y(mask), settings.seed),
        verification=verification,
    )


def _verification(
    model: LanguageModel, suite: Suite, mask: AnyMask, settings: RepairSettings, recorder: Recorder
) -> Verification | None:
    """What the model writes before and after, where that was asked for."""
    if settings.verification is None:
        return None
    shared = {name: getattr(settings, name) for name in ("seed", "dealing", "batch_size", "chat")}
    chosen = replace(settings.verification, **shared)
    made = {"suite": suite.name, "method": settings.method}
    return verify(model, suite, mask, chosen, recorder=recorder, record=made)
