"""What a study of where repairs hold has found, as plain data."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from secateur.measures.disparity import SIGNIFICANT, Comparison, Interval
from secateur.measures.overlap import Overlap
from secateur.studies.advice import Advice
from secateur.studies.candidates import CandidateRecord, Status
from secateur.studies.leave_one_out import LeftOut
from secateur.studies.relations import Relation
from secateur.suites import Suite

GENERALISE_FORMAT = "secateur-generalise-3"


@dataclass(frozen=True)
class Fit:
    """What one method chose on one source: a suite, or all suites but one.

    Attributes
    ----------
    status: whether a mask was chosen, and if not, why.
    own: bias on the source's own test part, None without a mask or for a joint source.
    control: bias on the control suite.
    perplexity_before, perplexity_after, perplexity_increase: on the test part of the text.
    over_limit: whether the choice breaks the utility limit there.
    settings: of the method.
    candidates: every mask that was measured on select.
    """

    method: str
    source: str
    status: Status
    candidates: list[CandidateRecord]
    settings: dict[str, Any] = field(default_factory=dict)
    heads: int = 0
    neurons: int = 0
    weights: int = 0
    own: Comparison | None = None
    control: Comparison | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_increase: Interval | None = None
    over_limit: bool = False
    tokens_forward: int = 0
    tokens_backward: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.method}/{self.source.replace(' ', '-')}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Fit:
        """The inverse of ``dataclasses.asdict``: what a resumed run reads back."""
        read: dict[str, Any] = {"candidates": [CandidateRecord.from_dict(one) for one in fields["candidates"]]}
        for key in ("own", "control"):
            told = fields[key]
            read[key] = None if told is None else Comparison(**{name: Interval(**told[name]) for name in told})
        if fields["perplexity_increase"] is not None:
            read["perplexity_increase"] = Interval(**fields["perplexity_increase"])
        return cls(**{**fields, **read})


@dataclass(frozen=True)
class Cell:
    """What a mask that was fitted on a source does to a target, on the target's test part.

    Attributes
    ----------
    relation: of the target to the source; "random": random masks of the size of the largest repair judged there.
    differs: what the target differs in from the source, of language, attribute and domain.
    markers: of the target, without those that the source has fitted or chosen by. scenarios: likewise, without those
        whose wordings it has.
    before, after, reduction, change: of B. Of random masks, the last three are the mean with the smallest and the
        largest draw.
    perplexity_increase: under the mask, on the test part of the text; None for random masks.
    over_limit: whether that breaks the utility limit.
    largest_random: the largest reduction by random masks on the same scenarios and markers; None where none were
        judged, and nothing is proven.
    p_holm: of no change, corrected for all cells.
    """

    method: str
    source: str
    target: str
    relation: Relation
    differs: tuple[str, ...]
    markers: int
    scenarios: int
    before: Interval
    after: Interval
    reduction: Interval
    change: Interval
    perplexity_increase: Interval | None = None
    over_limit: bool = False
    largest_random: float | None = None
    p_holm: float = 1.0

    @property
    def bias_shown(self) -> bool:
        """Whether there was a bias on the target that can be told from chance."""
        return self.before.low > 0

    @property
    def change_percent(self) -> Interval:
        """The change of B in percent of B before, below 0 where the bias fell, as reports show it."""
        found = self.reduction
        return Interval(0 - 100 * found.value, 0 - 100 * found.high, 0 - 100 * found.low)

    @property
    def interval(self) -> str:
        """What the ends of after, reduction and change are."""
        return "smallest and largest draw" if self.relation == "random" else "95 %"

    @property
    def faults(self) -> list[str]:
        """What keeps a repair from being proven, in words."""
        faults = []
        if not self.bias_shown:
            faults.append("no bias shown")
        if self.change.value >= 0:
            faults.append("did not fall")
        elif self.reduction.low <= 0 or self.p_holm >= SIGNIFICANT:
            faults.append("may be chance")
        if self.largest_random is None:
            faults.append("no random masks judged")
        elif self.reduction.value <= self.largest_random:
            faults.append("random masks do as well")
        if self.over_limit:
            faults.append("over the limit")
        return faults

    @property
    def proven(self) -> bool:
        """Whether there was a bias, it fell, all cells taken into account, by more than under every random mask, and
        perplexity kept to the limit."""
        return self.relation != "random" and not self.faults

    def as_dict(self) -> dict[str, Any]:
        """One entry of ``cells`` in ``generalise.json``."""
        faults = [] if self.relation == "random" else self.faults
        told = {"change_percent": self.change_percent.as_dict(), "interval": self.interval}
        return {**asdict(self), **told, "proven": self.proven, "faults": faults}


@dataclass(frozen=True)
class Agreement:
    """How far two sources lead to the same units, and in which layers.

    Attributes
    ----------
    by_layer: units in both, (layers,). p_holm: corrected for all pairs of sources.
    """

    method: str
    one: str
    other: str
    found: Overlap
    by_layer: list[int]
    p_holm: float = 1.0


@dataclass(frozen=True)
class GeneraliseResult:
    """Where the repairs hold.

    Attributes
    ----------
    fits: one per method and source. cells: one per method, source and target.
    agreements: of every two suites' units. layers: units by method and source, heads and neurons together, (layers,).
    left_out: the modes "specific" and "within".
    advice: a repair of its own for every use, or shared ones, by method and by family of uses.
    notes: what a reader should know of the suites, in sentences.
    """

    model: str
    suites: list[Suite]
    limit: float
    control_suite: str | None
    fits: list[Fit]
    cells: list[Cell]
    agreements: list[Agreement]
    layers: dict[str, dict[str, list[int]]]
    left_out: list[LeftOut]
    advice: list[Advice]
    notes: list[str]
    run: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(fit.method for fit in self.fits))

    def sources(self, name: str) -> list[str]:
        """What a method was fitted on and judged: the suites in their order, then joint sources and random masks."""
        found = {cell.source for cell in self.cells if cell.method == name}
        suites = [suite.name for suite in self.suites if suite.name in found]
        return [*suites, *sorted(found - set(suites))]

    def fits_of(self, name: str) -> list[Fit]:
        """A method's fits, one per source."""
        return [fit for fit in self.fits if fit.method == name]

    def mean_overlap(self, name: str) -> tuple[float, float] | None:
        """Mean of Jaccard's index over all pairs of a method's repairs, and what chance gives; None without pairs."""
        found = [one.found for one in self.agreements if one.method == name]
        if not found:
            return None
        return float(np.mean([one.jaccard for one in found])), float(np.mean([one.by_chance for one in found]))

    def as_dict(self) -> dict[str, Any]:
        """The content of ``generalise.json``."""
        return {
            "format": GENERALISE_FORMAT,
            "model": self.model,
            "suites": [suite.name for suite in self.suites],
            "limit": self.limit,
            "control_suite": self.control_suite,
            "fits": [asdict(fit) for fit in self.fits],
            "cells": [cell.as_dict() for cell in self.cells],
            "agreements": [asdict(one) for one in self.agreements],
            "layers": self.layers,
            "left_out": [asdict(one) for one in self.left_out],
            "advice": [asdict(one) for one in self.advice],
            "notes": self.notes,
            "run": self.run,
        }

    def csv(self) -> str:
        """The cells as comma-separated values, one line each."""
        text = io.StringIO()
        intervals = ("before", "after", "reduction", "change", "change_percent", "perplexity_increase")
        columns = ["method", "source", "target", "relation", "differs", "markers", "scenarios"]
        columns += [f"{name}_{end}" for name in intervals for end in ("value", "low", "high")]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*columns, "interval", "over_limit", "random_reduction", "p_holm", "proven", "faults"])
        for cell in self.cells:
            told = cell.as_dict()
            figures = [getattr(getattr(cell, name), end, "") for name in intervals for end in ("value", "low", "high")]
            head = (cell.method, cell.source, cell.target, cell.relation, " ".join(cell.differs))
            tail = (cell.interval, cell.over_limit, cell.largest_random, cell.p_holm, cell.proven)
            writer.writerow([*head, cell.markers, cell.scenarios, *figures, *tail, "; ".join(told["faults"])])
        return text.getvalue()
