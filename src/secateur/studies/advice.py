"""A repair of its own for every use, or shared repairs: what the held-out figures say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.measures.disparity import Interval, Table, interval_of_bias, reduction_replicates, suite_bias
from secateur.measures.disparity import reduction as reduction_of

Choice = Literal["one repair per use", "repairs can be shared", "leave as it is", "not decided"]
# A shared repair that loses less than this to the use's own is worth its simplicity.
MARGIN = 0.1


@dataclass(frozen=True)
class Use:
    """One use to advise on.

    Attributes
    ----------
    markers: names of the tables' markers with their groups, so that uses which share some are resampled alike.
    before: y on the test part without a mask.
    own: under the mask that was fitted on the use; None where none may be used, and the use stays as it is.
    shared: under the masks that were fitted elsewhere, None likewise; empty where none was asked for.
    joint: whether shared is one mask that was fitted on all other uses together, not one of each.
    """

    name: str
    markers: tuple[str, ...]
    before: Table
    own: Table | None
    shared: list[Table | None]
    joint: bool = False


@dataclass(frozen=True)
class Advice:
    """What to do with the uses of one family, and the figures that say so.

    Attributes
    ----------
    family: what the uses have in common, attribute and language; repairs are shared inside it alone.
    own, shared: mean reduction over the uses by their own masks and by masks fitted elsewhere.
    difference: own minus shared.
    uses: names of the uses with a bias to repair, that the means are over.
    """

    method: str
    family: str
    choice: Choice
    explanation: str
    own: Interval | None = None
    shared: Interval | None = None
    difference: Interval | None = None
    uses: tuple[str, ...] = ()


def advise(method: str, family: str, uses: list[Use], seed: int = 0) -> Advice:
    """Compare own repairs with shared ones on the uses of a family that have a bias to repair.

    A reduction below -100 % counts as -100 %, or one use whose bias is close to nothing in a resample would decide.
    Where there is no mask, own or shared, the use is left as it is: a reduction of 0. Markers are resampled once for
    all uses, which share many of them, and scenarios for every use by itself.
    """
    biased = [use for use in uses if interval_of_bias(use.before, seed).low > 0]
    if not biased:
        return Advice(method, family, "leave as it is", _nothing_shown(len(uses)))
    judged = [use for use in biased if use.shared]
    if not judged:
        names = ", ".join(use.name for use in biased)
        return Advice(
            method,
            family,
            "not decided",
            f"There is a bias on the test part of {names}, but no repair from elsewhere was judged there; ask for the "
            "mode across or joint, with suites of the same attribute.",
        )
    points = np.array([_reductions(use, seed) for use in judged])  # (uses, 2)
    drawn = np.mean([_replicates(use, seed) for use in judged], axis=0)  # (2, replicates)
    own, shared = (Interval.of(points[:, one].mean(), drawn[one]) for one in (0, 1))
    difference = Interval.of((points[:, 0] - points[:, 1]).mean(), drawn[0] - drawn[1])
    choice, reason = _choose(own, shared, difference)
    where = "one use" if len(judged) == 1 else f"{len(judged)} uses"
    figures = (
        f"On {where} with a bias to repair, a repair of its own lowers it by {_percent(own)} on average, "
        f"one fitted elsewhere by {_percent(shared)}; the difference is {_percent(difference)}."
    )
    explanation = f"{reason} {figures} {_what_is_shared(method, judged)}"
    return Advice(method, family, choice, explanation, own, shared, difference, tuple(use.name for use in judged))


def _nothing_shown(uses: int) -> str:
    if not uses:
        return "No use could be judged on enough markers that no repair has seen."
    on = "the one test part" if uses == 1 else f"any of {uses} test parts"
    return f"No bias can be told from chance on {on}, so there is nothing to repair that could be proven."


def _choose(own: Interval, shared: Interval, difference: Interval) -> tuple[Choice, str]:
    if own.high <= 0 and shared.high <= 0:
        return "leave as it is", "Neither lowers the bias."
    if difference.low > 0 and own.low > 0:
        return "one repair per use", "Repairs do not carry over: make one for every use, as an adapter."
    if difference.low > 0:
        return "not decided", "Repairs do not carry over, and those of a use's own are not shown to help, either."
    if difference.high < MARGIN and shared.low > 0:
        return "repairs can be shared", "Repairs carry over: one that was fitted on other uses loses little."
    return "not decided", "The figures do not decide; a repair for every use is the safer choice, once it is proven."


def _what_is_shared(method: str, uses: list[Use]) -> str:
    """Which masks "fitted elsewhere" stands for, and where they are."""
    joint = [use.name for use in uses if use.joint]
    each, together = "the mean over the repairs for each other use", "the repair for all other uses together"
    if len(joint) in (0, len(uses)):
        said = together if joint else each
    else:
        said = f"{together} for {', '.join(joint)}, and else {each}"
    return f"Fitted elsewhere stands for {said}; the masks are under plans/{method} of the run."


def _tables(use: Use) -> list[Table]:
    return [use.before if table is None else table for table in (use.own, *use.shared)]


def _reductions(use: Use, seed: int) -> tuple[float, float]:
    """By the own mask, and the mean over the masks from elsewhere."""
    before = suite_bias(use.before, seed).corrected
    after = [suite_bias(table, seed).corrected for table in _tables(use)]
    found = np.clip(reduction_of(before, np.array(after)), -1, 1)
    return float(found[0]), float(found[1:].mean())


def _replicates(use: Use, seed: int) -> np.ndarray:
    """The same under resamples, (2, replicates), of markers alike in all uses and of scenarios in each by itself."""
    found = np.clip(reduction_replicates(use.before, _tables(use), seed, use.markers, use.name), -1, 1)
    return np.stack([found[0], found[1:].mean(axis=0)])


def _percent(interval: Interval) -> str:
    value, low, high = (round(100 * number) for number in (interval.value, interval.low, interval.high))
    return f"{value}% [{low}%, {high}%]"
