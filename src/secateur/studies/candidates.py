"""Measure what a search proposes on the select part, and choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from secateur.errors import NumericalError, SettingError
from secateur.evaluation.evaluator import Evaluator
from secateur.measures.disparity import Table, corrected_choice, suite_bias
from secateur.search.base import Outcome, Problem, Proposals, Selection
from secateur.studies.record import Recorder
from secateur.units import Mask
from secateur.weights import AnyMask

Status = Literal[
    "chosen", "over the limit", "no reduction", "no candidate", "does not apply", "not finite", "not finite on test"
]

# Under a mask that destroys the model so far that it answers with numbers that are not finite.
DESTROYED: dict[str, Any] = {
    "bias": math.nan,
    "bias_square": math.inf,
    "mean_abs_gap": math.nan,
    "perplexity_increase": math.inf,
    "perplexity_high": math.inf,
    "within_limit": False,
}


@dataclass(frozen=True)
class CandidateRecord:
    """A candidate's figures on the select part; not finite where the model's answers are not.

    Attributes
    ----------
    bias: corrected suite bias B. bias_square: what is chosen by, see :func:`corrected_choice`; for two groups B^2
        before the root; negative below the noise.
    perplexity_increase, perplexity_high: relative increase and the upper end of its 95 % interval.
    within_limit: whether the increase plus one standard error keeps to the limit, so that the limit
        is likely to hold on other text, too.
    weights: single weights removed, where a method removes those instead of units.
    knobs: the settings of the search that led to it.
    """

    kind: str
    heads: int
    neurons: int
    bias: float
    bias_square: float
    mean_abs_gap: float
    perplexity_increase: float
    perplexity_high: float
    within_limit: bool
    weights: int = 0
    knobs: dict[str, Any] = field(default_factory=dict)
    chosen: bool = False

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CandidateRecord:
        """The inverse of ``dataclasses.asdict`` after a way through JSON, which has no numbers that are not finite."""
        return cls(**{key: DESTROYED[key] if value is None else value for key, value in fields.items()})


@dataclass(eq=False)
class Candidates:
    """The masks that a search has proposed, as measured on select.

    Attributes
    ----------
    select: the select part.
    limit: the utility limit, 0.02 for +2 %.
    changed: called after every measurement, so that an interrupted run leaves what it has found.
    failure: how a search ended that could not go on; None where it came to its end. reason: why, in a sentence.
    """

    select: Evaluator
    limit: float
    seed: int
    recorder: Recorder
    changed: Callable[[Candidates], None] = lambda _: None
    measured: list[tuple[AnyMask, CandidateRecord]] = field(default_factory=list)
    failure: Status | None = None
    reason: str = ""

    @property
    def records(self) -> list[CandidateRecord]:
        return [record for _, record in self.measured]

    def run(self, problem: Problem, proposals: Proposals) -> None:
        """Measure proposal after proposal, and tell the search each one's figures."""
        if not {"y", "nll"} <= self.select.figures(None).keys():
            with self.recorder.step("Measure the unpruned model", self.select.work(utility=True)) as advance:
                self.select.evaluate(None, advance, utility=True)
        try:
            selection = next(proposals)
            while True:
                record = self.measure(problem, selection)
                selection = proposals.send(Outcome(record.bias_square, record.perplexity_increase, record.within_limit))
        except StopIteration:
            pass

    def run_if_possible(self, problem: Problem, proposals: Proposals) -> None:
        """The same; what shows only while a method searches ends its search, and not a study of several."""
        try:
            self.run(problem, proposals)
        except SettingError as error:
            self.failure, self.reason = "does not apply", str(error)
        except NumericalError as error:
            self.failure, self.reason = "not finite", str(error)

    def measure(self, problem: Problem, selection: Selection) -> CandidateRecord:
        """Measure one proposal."""
        mask = problem.mask_of(selection)
        name = f"Candidate {len(self.measured) + 1}: {mask.summary}"
        with self.recorder.step(name, self.select.work(utility=True)) as advance:
            self.recorder.progress.status(self._best_so_far())
            try:
                table = self.select.evaluate(mask, advance, utility=True).table
                figures = self._figures(mask, table)
            except NumericalError:
                figures = DESTROYED
        record = CandidateRecord(
            kind=selection.kind,
            heads=mask.heads_removed,
            neurons=mask.neurons_removed,
            weights=mask.weights_removed,
            knobs=selection.knobs,
            **figures,
        )
        self.measured.append((mask, record))
        self.changed(self)
        return record

    def _best_so_far(self) -> str:
        inside = [record for record in self.records if record.within_limit]
        if not inside:
            return "none within the limit yet"
        best = min(inside, key=lambda record: record.bias_square)
        return f"best so far B {best.bias:.2f} at {best.perplexity_increase:+.1%}"

    def _figures(self, mask: AnyMask, table: Table) -> dict[str, Any]:
        increase, bias = self.select.perplexity_increase(mask, self.seed), suite_bias(table, self.seed)
        return {
            "bias": bias.corrected,
            "bias_square": corrected_choice(table, self.seed),
            "mean_abs_gap": bias.mean_abs_gap,
            "perplexity_increase": increase.value,
            "perplexity_high": increase.high,
            "within_limit": increase.value + increase.standard_error <= self.limit,
        }

    def choose(self) -> AnyMask | None:
        """The candidate with the least bias within the limit, marked as chosen, if it is better than none.

        Of a search that could not go on none is chosen: it has not proposed what it would have.
        """
        if self.failure is not None:
            return None
        before = corrected_choice(self.select.evaluate().table, self.seed)
        passing = [
            (record.bias_square, record.heads + record.neurons + record.weights, number)
            for number, record in enumerate(self.records)
            if record.within_limit and record.bias_square < before
        ]
        if not passing:
            return None
        number = min(passing)[2]
        mask, record = self.measured[number]
        self.measured[number] = (mask, replace(record, chosen=True))
        return mask

    @property
    def status(self) -> Status:
        """Whether a mask was chosen; if not, the search failed, every candidate broke the limit, none inside helped, or
        there was none."""
        if self.failure is not None:
            return self.failure
        if any(record.chosen for record in self.records):
            return "chosen"
        inside = any(record.within_limit for record in self.records)
        return "no reduction" if inside else "over the limit" if self.records else "no candidate"

    def as_list(self) -> list[dict[str, Any]]:
        """Plain data: every candidate with its removed units; of single weights, their number only."""
        return [
            {**asdict(record), "removed": mask.removed.tolist() if isinstance(mask, Mask) else []}
            for mask, record in self.measured
        ]


def why_nothing(candidates: list[CandidateRecord], limit: float) -> str:
    """Explain which limit held every candidate back."""
    if not candidates:
        return (
            "The method proposes nothing: it finds no unit that it expects to lower the bias, or its settings leave "
            "none over. The model is left as it is."
        )
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
