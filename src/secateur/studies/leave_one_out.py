"""One scenario at a time: fitted on it alone, or on all the others of its suite, and judged on it, held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.disparity import (
    Comparison,
    Interval,
    Table,
    compare,
    corrected_choice,
    holm,
    p_value,
    reduction,
    statistics,
    suite_bias,
)
from secateur.scoring.base import UnitKind
from secateur.search.base import Problem
from secateur.search.combining import RULES
from secateur.search.methods import Method
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Recorder
from secateur.suites.joining import spaced
from secateur.units import ActivationMeans, Mask

# Shares of a kind's units that are tried; on a model of 46,080 neurons these are 128, 32 and 8.
SHARES: dict[UnitKind, tuple[float, ...]] = {"neurons": (0.0028, 0.0007, 0.0002), "heads": (0.015, 0.0075, 0.0037)}
NO_CHANGE = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class OneScenario:
    """What the mask for one scenario does to it, on the test part.

    Attributes
    ----------
    units: removed; 0 where no count lowered the bias within the limit.
    perplexity_increase: on the test part of the text; None where the model gives no finite answers under the mask. That
        counts as over the limit, and the scenario stays as it was: SMD and gap after are those before.
    over_limit: whether the mask breaks the utility limit there.
    select_perplexity_increase: on the select part of the text, which the count was chosen on, too.
    smd_before, smd_after, gap_before, gap_after: signed; see :mod:`secateur.measures.disparity`.
    """

    id: str
    units: int
    perplexity_increase: Interval | None
    over_limit: bool
    select_perplexity_increase: float
    smd_before: float
    smd_after: float
    gap_before: float
    gap_after: float

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> OneScenario:
        """The inverse of ``dataclasses.asdict``."""
        cost = fields["perplexity_increase"]
        return cls(**{**fields, "perplexity_increase": None if cost is None else Interval(**cost)})


@dataclass(frozen=True)
class LeftOut:
    """How repairs of single scenarios, or of all but one, do on the scenario in question.

    Attributes
    ----------
    mode: "specific": fitted on the scenario; "within": on all the others of the suite.
    rule: how the scores of several scenarios were combined; empty for one.
    scenarios: those that were judged, one by one.
    comparison: B over these scenarios, each under its own mask if the model gives finite answers under it.
    random_reduction: of B over the same scenarios, each under one random mask of the size of its own; None where under
        one of those the model gives no finite answers.
    p_holm: of no change; corrected for all such figures of a run by :func:`with_holm`.
    """

    method: str
    suite: str
    mode: str
    rule: str
    scenarios: list[OneScenario]
    comparison: Comparison
    random_reduction: float | None
    p_holm: float

    @property
    def perplexity_increase(self) -> float | None:
        """Mean over the scenarios where it is finite, on the test part of the text; without a mask it is 0."""
        finite = [one.perplexity_increase.value for one in self.scenarios if one.perplexity_increase is not None]
        return float(np.mean(finite)) if finite else None

    @property
    def over_limit(self) -> int:
        """How many masks break the utility limit there."""
        return sum(one.over_limit for one in self.scenarios)

    @property
    def not_finite(self) -> int:
        """Under how many masks, of those over the limit, the model gives no finite answers."""
        return sum(one.perplexity_increase is None for one in self.scenarios)

    def as_dict(self) -> dict[str, Any]:
        """One entry of ``left_out`` in ``generalise.json``."""
        figures = ("perplexity_increase", "over_limit", "not_finite")
        return {**asdict(self), **{name: getattr(self, name) for name in figures}}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LeftOut:
        """The inverse of ``dataclasses.asdict``: what a resumed run reads back."""
        scenarios = [OneScenario.from_dict(one) for one in fields["scenarios"]]
        comparison = Comparison(**{name: Interval(**found) for name, found in fields["comparison"].items()})
        return cls(**{**fields, "scenarios": scenarios, "comparison": comparison})


@dataclass(frozen=True)
class OneByOne:
    """What a method's scores do on a suite, scenario by scenario.

    Attributes
    ----------
    asked: settings of the method, modes and number of scenarios, by which a resumed run knows whether it is the same.
    found: one for every mode and rule; none where the scores could not be had. reason: why, in a sentence.
    """

    method: str
    suite: str
    asked: dict[str, Any]
    found: list[LeftOut]
    reason: str = ""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> OneByOne:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**fields, "found": [LeftOut.from_dict(one) for one in fields["found"]]})


def with_holm(found: Sequence[LeftOut]) -> list[LeftOut]:
    """The same with p-values corrected for all of them."""
    adjusted = holm(np.array([one.p_holm for one in found]))
    return [replace(one, p_holm=float(p)) for one, p in zip(found, adjusted, strict=True)]


def leave_one_out(
    parts: Parts,
    chosen: Method,
    settings: StudySettings,
    recorder: Recorder,
    modes: Sequence[str],
    most: int | None = None,
    means: ActivationMeans | None = None,
) -> list[LeftOut]:
    """Judge a method's scores scenario by scenario.

    Every scenario of the fit part is scored once. Units of one kind, neurons where the method scores them, are removed
    by one scenario's scores or by the combined scores of several; a unit that one of them has no score for stays. Their
    number is that one of three which leaves the least bias on the select part of the scenarios that were fitted, within
    the limit. Judged is the test part of the scenario in question: new markers, and for "within" a new situation, too;
    beside it, one random mask of the same size for every scenario.

    Parameters
    ----------
    most: judge so many scenarios, evenly spaced; None for all.
    means: for mean ablation, if they are known.
    """
    run = _Run(parts, chosen, settings, recorder, means)
    everything = parts.fit.prompts.scenarios
    judged = [everything[at] for at in spaced(len(everything), most)]
    found = []
    if "specific" in modes:
        found.append(run.judge("specific", "", judged, lambda one: [one], RULES["mean score"]))
    if "within" in modes and len(everything) > 1:
        for rule, combine in RULES.items():
            found.append(
                run.judge("within", rule, judged, lambda one: [other for other in everything if other != one], combine)
            )
    return found


class _Run:
    """The scores of every scenario, and what is made of them."""

    def __init__(
        self, parts: Parts, chosen: Method, settings: StudySettings, recorder: Recorder, means: ActivationMeans | None
    ) -> None:
        self.parts, self.chosen, self.settings, self.recorder = parts, chosen, settings, recorder
        self.kind: UnitKind = "neurons" if "neurons" in chosen.scorer.kinds else "heads"
        self.problem = parts.problem(settings, recorder, means)
        fit, space = parts.fit, self.problem.space
        self.numbers = fit.prompts.scenarios
        self.start, total = (0, space.n_heads) if self.kind == "heads" else (space.n_heads, space.n_neurons)
        self.counts = sorted({max(1, round(share * total)) for share in SHARES[self.kind]})
        # These measure perplexity, so that a mask reads a text once, however many scenarios are asked about.
        select, few = parts.select, self.numbers[:1]
        self.reader = select.on(select.prompts.of_scenarios(few), select.text)
        self.test_reader = parts.test.on(parts.test.prompts.of_scenarios(few), parts.test.text)
        self.selects = dict[tuple[int, ...], Evaluator]()  # by scenarios, since rules may propose the same masks
        scores = [self._score(fit.on(fit.prompts.of_scenarios([number]), fit.text)) for number in self.numbers]
        self.scores = np.stack(scores)  # (scenarios, units of the kind)

    def _score(self, fit: Evaluator) -> np.ndarray:
        """Scores of the units of the kind from one scenario, not finite where the method says nothing."""
        alone = Problem(self.problem.model, fit, [fit], self.recorder.step, self.problem.means)
        rank = np.asarray(alone.score(self.chosen.scorer).rank, dtype=float)
        return rank[self.start :] if self.kind == "neurons" else rank[: self.problem.space.n_heads]

    def _select(self, scenarios: Sequence[int]) -> Evaluator:
        """The select part of some scenarios, without the text."""
        key = tuple(scenarios)
        if key not in self.selects:
            self.selects[key] = _of(self.parts.select, scenarios)
        return self.selects[key]

    def judge(
        self,
        mode: str,
        rule: str,
        judged: list[int],
        fitted: Callable[[int], list[int]],
        combine: Callable[[np.ndarray, int], np.ndarray],
    ) -> LeftOut:
        """Choose a mask for every scenario from others, and put the scenarios' test rows together."""
        found, states = [], list[tuple[Table, Table, Table | None]]()
        suite, rng = self.parts.select.prompts.suite, np.random.default_rng(self.settings.seed + 1)
        what = f"{self.chosen.name}, {mode} {rule}".strip()
        with self.recorder.step(f"{what}: {suite.name}", len(judged)) as advance:
            for scenario in judged:
                mask, increase = self._choose(fitted(scenario), combine)
                test = _of(self.parts.test, [scenario])
                before = _unpruned(self.parts.test, [scenario])
                after = before if mask is None else _measured(test, mask)
                cost = NO_CHANGE if mask is None else self._cost(mask)
                random = before if mask is None else _measured(test, mask.random_like(rng))
                advance(1)
                if after is None or cost is None:  # nobody would deploy it: the scenario stays as it is
                    after, cost = before, None
                units = 0 if mask is None else mask.heads_removed + mask.neurons_removed
                found.append(self._one(suite.scenarios[scenario].id, units, cost, increase, before, after))
                states.append((before, after, random))
        befores, afters, randoms = zip(*states, strict=True)
        comparison = compare(_stacked(befores), _stacked(afters), self.settings.seed)
        return LeftOut(
            method=self.chosen.name,
            suite=suite.name,
            mode=mode,
            rule=rule,
            scenarios=found,
            comparison=comparison,
            random_reduction=self._reduction(befores, randoms),
            p_holm=p_value(comparison.fall),
        )

    def _one(
        self, name: str, units: int, cost: Interval | None, select_cost: float, before: Table, after: Table
    ) -> OneScenario:
        one, other = statistics(before), statistics(after)
        return OneScenario(
            id=name,
            units=units,
            perplexity_increase=cost,
            over_limit=cost is None or cost.value > self.settings.max_perplexity_increase,
            select_perplexity_increase=select_cost,
            smd_before=float(one["smd"][0]),
            smd_after=float(other["smd"][0]),
            gap_before=float(one["gap"][0]),
            gap_after=float(other["gap"][0]),
        )

    def _cost(self, mask: Mask) -> Interval | None:
        """Perplexity on the test part of the text under a mask; None where it is not finite."""
        if _measured(self.test_reader, mask, utility=True) is None:
            return None
        return self.test_reader.perplexity_increase(mask, self.settings.seed)

    def _reduction(self, befores: Sequence[Table], afters: Sequence[Table | None]) -> float | None:
        """Of B over scenarios; None where one of them is not known after."""
        known = [after for after in afters if after is not None]
        if len(known) < len(afters):
            return None
        before, after = (suite_bias(_stacked(tables), self.settings.seed).corrected for tables in (befores, known))
        return float(reduction(before, after))

    def _choose(
        self, scenarios: list[int], combine: Callable[[np.ndarray, int], np.ndarray]
    ) -> tuple[Mask | None, float]:
        """The mask that leaves the least bias on the select part of some scenarios within the limit, and its cost."""
        seed, limit = self.settings.seed, self.settings.max_perplexity_increase
        asked, before = self._select(scenarios), _unpruned(self.parts.select, scenarios)
        least = corrected_choice(before, seed)
        best: tuple[Mask | None, float] = None, 0.0
        for mask in self._masks(scenarios, combine):
            if _measured(self.reader, mask, utility=True) is None:
                continue
            increase = self.reader.perplexity_increase(mask, seed)
            if increase.value + increase.standard_error > limit:
                continue
            after = _measured(asked, mask)
            left = np.inf if after is None else corrected_choice(after, seed)
            if left < least:
                least, best = left, (mask, increase.value)
        return best

    def _masks(self, scenarios: list[int], combine: Callable[[np.ndarray, int], np.ndarray]) -> Iterator[Mask]:
        """The masks to choose from, the smallest first; of units that every one of some scenarios has a score for."""
        scores = self.scores[[self.numbers.index(number) for number in scenarios]]
        scored = np.flatnonzero(np.isfinite(scores).all(axis=0))
        for count in self.counts:
            removed = self.start + scored[combine(scores[:, scored], count)]
            if len(removed):
                yield self.problem.mask(removed)


def _of(part: Evaluator, scenarios: Sequence[int]) -> Evaluator:
    """Some scenarios of a part, without the text."""
    return part.on(part.prompts.of_scenarios(scenarios), None)


def _unpruned(part: Evaluator, scenarios: Sequence[int]) -> Table:
    """y of some scenarios without a mask, which the whole part has measured."""
    return part.evaluate().table.of_scenarios([part.prompts.scenarios.index(number) for number in scenarios])


def _measured(part: Evaluator, mask: Mask, *, utility: bool = False) -> Table | None:
    """Answers under a mask; None where they are not finite."""
    found = next(part.evaluate_each([mask], utility=utility))
    return None if found is None else found.table


def _stacked(tables: Sequence[Table]) -> Table:
    return Table(np.concatenate([table.y for table in tables]), tables[0].groups)
