"""What a study of where repairs hold has found, as plain data."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from secateur.measures.disparity import SIGNIFICANT, Comparison, Interval
from secateur.measures.overlap import Overlap
from secateur.measures.selection import StateSelections
from secateur.studies.advice import Advice
from secateur.studies.candidates import CandidateRecord, Status
from secateur.studies.leave_one_out import LeftOut
from secateur.studies.relations import Relation
from secateur.studies.verdict import CHANCE, faults_of
from secateur.suites import Suite

GENERALISE_FORMAT = "secateur-generalise-5"
PLACES: dict[Relation, str] = {
    "own": "at home",
    "across": "in other domains",
    "attributes": "for other attributes",
    "languages": "in other languages",
    "joint": "on the use left out of a joint fit",
    "together": "as one repair for all uses",
    "random": "random masks",
}
BIASES = ("before", "after", "reduction", "change", "fall")
FOREIGN_TEXT = "perplexity is of a text in another language"
NO_REPAIR = "no repair found"
NOT_FINITE = "answers are not finite"
TOO_SMALL = "may be chance (the test part is too small to show even a full repair)"


@dataclass(frozen=True)
class Fit:
    """What one method chose on one source: a suite, or all suites but one.

    Attributes
    ----------
    status: whether a mask was chosen, and if not, why. reason: in a sentence, where the search could not go on.
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
    reason: str = ""
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
    p_before: permutation p-value of the bias before, on the whole test part of the target, corrected for all suites of
        the study (Holm).
    before, after, reduction, change: of B. fall: of B^2, not cut off at 0, from which p_holm is. Of random masks, all
        but the first are the mean with the smallest and the largest draw.
    fall_if_closed: the fall under a repair that closed every gap here and touched nothing else; None for random masks.
    mean_abs_smd, mean_abs_gap: mean |SMD| and mean |gap| before and after, both raw: a repair that only widens the
        spread within groups lowers B and leaves the gap.
    unusable: why there is no mask to judge, in words; empty where there is one. Without one, all stays as it is.
    perplexity_increase: under the mask, on the test part of the text; None for random masks.
    over_limit: whether that breaks the utility limit.
    foreign_text: whether source or target are in another language than the text, so that the limit says nothing of it.
    largest_random: the largest reduction by random masks on the same scenarios and markers; None where none were
        judged, and nothing is proven.
    p_holm: of no change, corrected for all cells that one row of the summary counts. p_if_closed: the same if all their
        repairs closed every gap.
    """

    method: str
    source: str
    target: str
    relation: Relation
    differs: tuple[str, ...]
    markers: int
    scenarios: int
    p_before: float
    before: Interval
    after: Interval
    reduction: Interval
    change: Interval
    fall: Interval
    mean_abs_smd: tuple[float, float]
    mean_abs_gap: tuple[float, float]
    fall_if_closed: Interval | None = None
    unusable: str = ""
    perplexity_increase: Interval | None = None
    over_limit: bool = False
    foreign_text: bool = False
    largest_random: float | None = None
    p_holm: float = 1.0
    p_if_closed: float = 1.0

    @property
    def repaired(self) -> bool:
        """Whether there is a mask to judge."""
        return not self.unusable

    @property
    def bias_shown(self) -> bool:
        """Whether there was a bias on the target that can be told from chance."""
        return self.p_before < SIGNIFICANT

    @property
    def change_percent(self) -> Interval:
        """The change of B in percent of B before, below 0 where the bias fell, as reports show it."""
        return self.reduction.as_change

    @property
    def differs_in_one(self) -> bool:
        """Whether the target differs from the source in one thing at most, so that the effect is that thing's."""
        return len(self.differs) <= 1

    @property
    def interval(self) -> str:
        """What the ends of after, reduction and change are."""
        return "smallest and largest draw" if self.relation == "random" else "95 %"

    @property
    def faults(self) -> list[str]:
        """What keeps a repair from being proven, in words."""
        if self.unusable:
            return [self.unusable]
        found = faults_of(self.p_before, self.reduction, self.largest_random, self.over_limit, self.p_holm)
        if CHANCE in found and self.p_if_closed >= SIGNIFICANT:
            found[found.index(CHANCE)] = TOO_SMALL
        return [*found, FOREIGN_TEXT] if self.foreign_text else found

    @property
    def proven(self) -> bool:
        """Whether there was a bias, it fell, all cells taken into account, by more than under every random mask, and
        perplexity kept to the limit, on a text of its language."""
        return self.relation != "random" and not self.faults

    @property
    def provable(self) -> bool:
        """Whether there was a bias, and a full repair, one that closes every gap, would be shown to lower it, all cells
        taken into account. A pair that is proven is provable."""
        return self.proven or (self.bias_shown and self.repaired and self.p_if_closed < SIGNIFICANT)

    @property
    def rose(self) -> bool:
        """Whether the bias can be told from chance to have risen, all cells taken into account."""
        grown = self.fall.high < 0 and self.after.value > self.before.value
        return self.relation != "random" and grown and self.p_holm < SIGNIFICANT

    @property
    def label(self) -> str:
        """The change in percent. A star: proven; a triangle: the bias is shown to have risen; an exclamation mark:
        perplexity is over the limit; brackets: no bias could be told from chance before; an equals sign: B is 0 before
        and after."""
        if not self.repaired:
            return "none"
        signs = ("▲" if self.rose else "") + ("!" if self.over_limit else "")
        none_left = self.before.value == self.after.value == 0
        text = f"{'=' if none_left else f'{round(self.change_percent.value):+d}'}{signs}"
        return f"{text}*" if self.proven else text if self.bias_shown else f"({text})"

    def as_dict(self) -> dict[str, Any]:
        """One entry of ``cells`` in ``generalise.json``."""
        faults = [] if self.relation == "random" else self.faults
        told = {"change_percent": self.change_percent.as_dict(), "interval": self.interval, "repaired": self.repaired}
        found = {"provable": self.provable, "proven": self.proven, "rose": self.rose, "faults": faults}
        return {**asdict(self), **told, **found}


@dataclass(frozen=True)
class Summary:
    """What one method's repairs do where one thing differs, over all pairs of source and target.

    Attributes
    ----------
    pairs: that differ in one thing at most. set_aside: those that differ in more.
    without_repair: pairs for whose source no repair was found, or under which answers are not finite, so that the use
        stays as it is.
    biased: pairs with a bias before that can be told from chance on the target's test part.
    provable: of these, those in which a full repair, one that closes every gap, would be shown to lower it. too_small:
        those with a repair in which it would not.
    proven: of the biased pairs, those in which the repair is. rose: pairs in which the bias can be told from chance to
        have risen.
    pooled: B before and after over all of these pairs, biased or not, as over one large suite; None without any.
    over_limit: pairs whose mask breaks the utility limit; they are pooled as they were measured.
    interval: what its ends are: "95 %" bootstrap over markers, drawn alike in all suites, and scenarios, drawn in each
        by itself, for these pairs and masks; of random masks the smallest and the largest draw.
    perplexity_increase: median over the repairs of these pairs; None for random masks.
    largest_random: the largest reduction of B over the same pairs by random masks, draw by draw; None where none were
        judged, or a use has none under which answers are finite.
    foreign_text: whether some pair is of another language than the text, so that what its repair costs is not known.
    p_holm: of no change of B over these pairs, corrected for all rows of the study.
    """

    method: str
    relation: Relation
    pairs: int
    set_aside: int
    without_repair: int
    biased: int
    provable: int
    too_small: int
    proven: int
    rose: int
    over_limit: int
    pooled: Comparison | None
    interval: str
    perplexity_increase: float | None
    largest_random: float | None = None
    foreign_text: bool = False
    p_holm: float = 1.0

    @property
    def place(self) -> str:
        """Where the repairs were judged, in words."""
        return PLACES[self.relation]

    @property
    def lowered(self) -> bool:
        """Whether repairs lower B over all of these pairs, all rows taken into account, by more than every random mask,
        on a text of their language. Masks over the limit count; see ``over_limit``."""
        if self.pooled is None or self.relation == "random" or self.largest_random is None or self.foreign_text:
            return False
        fell = self.pooled.reduction.low > 0 and self.p_holm < SIGNIFICANT
        return fell and self.pooled.reduction.value > self.largest_random


@dataclass(frozen=True)
class Agreement:
    """How far two sources lead to the same units, and in which layers.

    Attributes
    ----------
    by_layer: the same within every layer, (layers,), beside chance for sets of the sizes that they have there.
    p_holm: corrected for all pairs of sources.
    """

    method: str
    one: str
    other: str
    found: Overlap
    by_layer: list[Overlap]
    p_holm: float = 1.0


@dataclass(frozen=True)
class GeneraliseResult:
    """Where the repairs hold.

    Attributes
    ----------
    verdict: where repairs are proven to help, in a sentence or two.
    summary: one row per method and thing that differs.
    fits: one per method and source. cells: one per method, source and target.
    agreements: of every two suites' units. layers: units by method and source, heads and neurons together, (layers,).
    left_out: the modes "specific" and "within".
    advice: a repair of its own for every use, or shared ones, by method and by family of uses.
    selections: selection rates of the uses that are decisions, unpruned and under their own repairs and those for all
        uses, on the whole test part.
    notes: what a reader should know of the suites, in sentences.
    """

    model: str
    suites: list[Suite]
    limit: float
    control_suite: str | None
    verdict: str
    summary: list[Summary]
    fits: list[Fit]
    cells: list[Cell]
    agreements: list[Agreement]
    layers: dict[str, dict[str, list[int]]]
    left_out: list[LeftOut]
    advice: list[Advice]
    selections: list[StateSelections]
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
            "verdict": self.verdict,
            "summary": [{**asdict(one), "lowered": one.lowered} for one in self.summary],
            "fits": [asdict(fit) for fit in self.fits],
            "cells": [cell.as_dict() for cell in self.cells],
            "agreements": [asdict(one) for one in self.agreements],
            "layers": self.layers,
            "left_out": [one.as_dict() for one in self.left_out],
            "advice": [asdict(one) for one in self.advice],
            "selections": [asdict(one) for one in self.selections],
            "notes": self.notes,
            "run": self.run,
        }

    def tables(self) -> dict[str, str]:
        """Comma-separated values by the name of their file: the cells, and what else there is."""
        others = {
            "summary.csv": self._summary_rows(),
            "overlap.csv": self._overlap_rows(),
            "within.csv": self._within_rows(),
        }
        return {"generalise.csv": self.csv(), **{name: _csv(rows) for name, rows in others.items() if rows}}

    def csv(self) -> str:
        """The cells as comma-separated values, one line each."""
        text = io.StringIO()
        intervals = (*BIASES, "change_percent", "fall_if_closed", "perplexity_increase")
        found = ("p_if_closed", "provable", "proven", "rose")
        columns = ["method", "source", "target", "relation", "differs", "markers", "scenarios", "p_before"]
        columns += [f"{name}_{end}" for name in intervals for end in ("value", "low", "high")]
        columns += [f"{name}_{when}" for name in ("mean_abs_smd", "mean_abs_gap") for when in ("before", "after")]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*columns, "interval", "over_limit", "random_reduction", "p_holm", *found, "faults"])
        for cell in self.cells:
            told = cell.as_dict()
            figures = [getattr(getattr(cell, name), end, "") for name in intervals for end in ("value", "low", "high")]
            head = (cell.method, cell.source, cell.target, cell.relation, " ".join(cell.differs))
            raw = (*cell.mean_abs_smd, *cell.mean_abs_gap)
            tail = (cell.interval, cell.over_limit, cell.largest_random, cell.p_holm, *(told[name] for name in found))
            writer.writerow(
                [*head, cell.markers, cell.scenarios, cell.p_before, *figures, *raw, *tail, "; ".join(told["faults"])]
            )
        return text.getvalue()

    def _summary_rows(self) -> list[dict[str, Any]]:
        """The summary, one line each."""
        rows = []
        for one in self.summary:
            figures = {key: value for key, value in asdict(one).items() if key != "pooled"}
            pooled = _ends({name: getattr(one.pooled, name, None) for name in BIASES})
            rows.append({**figures, "lowered": one.lowered, **pooled})
        return rows

    def _overlap_rows(self) -> list[dict[str, Any]]:
        """Two repairs a line: over all layers, and in every layer where one of them removes something."""
        rows = []
        for one in self.agreements:
            layers = [(str(layer), found, None) for layer, found in enumerate(one.by_layer) if found.union]
            for layer, found, p_holm in [("all", one.found, one.p_holm), *layers]:
                pair = {"method": one.method, "one": one.one, "other": one.other, "layer": layer}
                rows.append({**pair, **asdict(found), "p_holm": p_holm})
        return rows

    def _within_rows(self) -> list[dict[str, Any]]:
        """The modes "specific" and "within": one line per set of scenarios, and one for each of them."""
        rows = []
        for one in self.left_out:
            ends = _ends({name: getattr(one.comparison, name) for name in BIASES})
            head = {"method": one.method, "suite": one.suite, "mode": one.mode, "rule": one.rule}
            whole = {"random_reduction": one.random_reduction, "p_holm": one.p_holm, "not_finite": one.not_finite}
            rows.append({**head, "scenario": "all", **ends, **whole})
            for each in one.scenarios:
                smd = {"smd_before": each.smd_before, "smd_after": each.smd_after}
                gap = {"gap_before": each.gap_before, "gap_after": each.gap_after}
                cost = {**_ends({"perplexity_increase": each.perplexity_increase}), "over_limit": each.over_limit}
                rows.append({**head, "scenario": each.id, "units": each.units, **smd, **gap, **cost})
        return rows


def _ends(figures: dict[str, Interval | None]) -> dict[str, float | None]:
    """Columns of intervals: value, low and high of each; empty where there is none."""
    ends = ("value", "low", "high")
    return {f"{name}_{end}": getattr(found, end, None) for name, found in figures.items() for end in ends}


def _csv(rows: list[dict[str, Any]]) -> str:
    """Rows as comma-separated values under the names of all their columns."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
