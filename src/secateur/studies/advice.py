"""A repair of its own for every use, or shared repairs: what the held-out figures say."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from secateur.measures.disparity import (
    SIGNIFICANT,
    Interval,
    Table,
    bootstrap_squares,
    by_draw,
    compare_squares,
    corrected_square,
    largest_reduction,
    root,
)

Choice = Literal["one repair per use", "one repair for all", "repairs can be shared", "leave as it is", "not decided"]
# A shared repair that loses less than this to the use's own is worth its simplicity.
MARGIN = 0.1
SHARED: tuple[Choice, ...] = ("one repair for all", "repairs can be shared")


@dataclass(frozen=True)
class Use:
    """One use to advise on.

    Attributes
    ----------
    markers: names of the tables' markers with their groups, so that uses which share some are resampled alike.
    before: y on the test part without a mask.
    p_before: permutation p-value of the bias there, corrected for all suites of the study.
    own: under the mask that was fitted on the use; None where none may be used, and the use stays as it is.
    shared: under the one mask that was fitted on all uses together, or else under the masks that were fitted on each
        other use; None likewise, empty where none was asked for.
    random: under random masks of the size of the largest repair; empty where none were judged.
    foreign_text: whether what a repair costs is known for text in another language alone.
    together: where the plan of the one mask for all lies; empty where shared is not that one.
    left_out: under the mask that was fitted on all other uses together, if there is one for all.
    """

    name: str
    markers: tuple[str, ...]
    before: Table
    p_before: float
    own: Table | None
    shared: list[Table | None]
    random: list[Table]
    foreign_text: bool = False
    together: str = ""
    left_out: Table | None = None


@dataclass(frozen=True)
class Advice:
    """What to do with the uses of one family, and the figures that say so.

    Attributes
    ----------
    family: what the uses have in common, attribute and language; repairs are shared inside it alone.
    own, shared: reduction of B over the uses by their own masks and by shared ones: the one for all, or those fitted
        elsewhere.
    difference: own minus shared, in shares of B before.
    most_random: the largest reduction by random masks; a repair that does no better is never advised. None where
        none were judged.
    unseen: reduction by masks that were fitted on all other uses together, which stands for a use not yet seen;
        None where there is no one for all.
    uses: names of the uses with a bias to repair, that all this is over. They are found on the test part.
    plan: of the one repair for all, where that is advised.
    """

    method: str
    family: str
    choice: Choice
    explanation: str
    own: Interval | None = None
    shared: Interval | None = None
    difference: Interval | None = None
    most_random: float | None = None
    unseen: Interval | None = None
    uses: tuple[str, ...] = ()
    plan: str = ""


def advise(method: str, family: str, uses: list[Use], seed: int = 0) -> Advice:
    """Compare own repairs with shared ones, or with one for all, on the uses of a family that have a bias to repair.

    Reductions are of B over all these uses, as over one large suite: the mean of B^2 under the root. Where there is no
    mask, own or shared, the use is left as it is. Markers are resampled once for all uses, which share many of them,
    and scenarios for every use by itself.
    """
    biased = [use for use in uses if use.p_before < SIGNIFICANT]
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
    if not any(table is not None for use in judged for table in (use.own, *use.shared)):
        names = ", ".join(use.name for use in judged)
        return Advice(
            method,
            family,
            "leave as it is",
            f"No usable repair was found for {names}, nor one fitted elsewhere that could be used there.",
        )
    squares = np.mean([_squares(use, seed) for use in judged], axis=0)  # (4,)
    drawn = np.mean([_replicates(use, seed) for use in judged], axis=0)  # (4, replicates)
    own, shared, unseen = (_reduction(squares, drawn, which) for which in (1, 2, 3))
    difference = _difference(squares, drawn)
    plans = {use.together for use in judged}
    plan = plans.pop() if len(plans) == 1 else ""
    choice, reason = _choose(own, shared, difference, bool(plan))
    most_random = _most_random(judged, seed)
    if choice in ("one repair per use", *SHARED):
        doubt = _doubt(own if choice == "one repair per use" else shared, most_random, judged[0].foreign_text)
        choice, reason = ("not decided", doubt) if doubt else (choice, reason)
    where = "one use" if len(judged) == 1 else f"{len(judged)} uses"
    figures = (
        f"On {where} with a bias to repair, a repair of its own changes it by {_change(own)}, "
        f"{'the one repair for all' if plan else 'one fitted elsewhere'} by {_change(shared)}; own less shared, "
        f"reduction for reduction, is {_percent(difference)}. "
        + ("" if most_random is None else f"The best random mask of their size changes it by {0 - most_random:+.0%}.")
    ).strip()
    more = _of_one_for_all(plan, choice, unseen) if plan else _what_is_shared(method, judged)
    return Advice(
        method=method,
        family=family,
        choice=choice,
        explanation=f"{reason} {figures} {more}",
        own=own,
        shared=shared,
        difference=difference,
        most_random=most_random,
        unseen=unseen if plan else None,
        uses=tuple(use.name for use in judged),
        plan=f"plans/{plan}" if choice == "one repair for all" else "",
    )


def _nothing_shown(uses: int) -> str:
    if not uses:
        return "No use could be judged on enough markers that no repair has seen."
    on = "the one test part" if uses == 1 else f"any of {uses} test parts"
    return f"No bias can be told from chance on {on}, so there is nothing to repair that could be proven."


def _choose(own: Interval, shared: Interval, difference: Interval, one_for_all: bool) -> tuple[Choice, str]:
    """Parameters: reductions and their difference; whether shared is one mask for all uses."""
    worse = "One repair for all does less" if one_for_all else "Repairs do not carry over"
    if own.high <= 0 and shared.high <= 0:
        return "leave as it is", "Neither lowers the bias."
    if difference.low > 0 and own.low > 0:
        return "one repair per use", f"{worse}: make one for every use, as an adapter."
    if difference.low > 0:
        return "not decided", f"{worse}, and those of a use's own are not shown to help, either."
    if difference.high < MARGIN and shared.low > 0:
        if one_for_all:
            return "one repair for all", "One repair for all loses little."
        return "repairs can be shared", "Repairs carry over: one that was fitted on other uses loses little."
    return "not decided", "The figures do not decide; a repair for every use is the safer choice, once it is proven."


def _doubt(reduction: Interval, most_random: float | None, foreign_text: bool) -> str:
    """What keeps repairs that lower the bias from being advised; empty for nothing."""
    if foreign_text:
        return "Repairs lower the bias, but what they cost is known for text in another language alone."
    if most_random is None:
        return "Repairs lower the bias, but no random masks were judged, which may do as well."
    if reduction.value <= most_random:
        return "Repairs lower the bias, but random masks of their size do as well."
    return ""


def _of_one_for_all(plan: str, choice: Choice, unseen: Interval) -> str:
    """Where the one repair for all is, and what to expect of it elsewhere."""
    where = f" The one repair for all is plans/{plan} of the run." if choice == "one repair for all" else ""
    estimate = f"what repairs for all other uses together do is the estimate: {_change(unseen)}"
    return f"For a use not yet seen, {estimate}.{where}"


def _what_is_shared(method: str, uses: list[Use]) -> str:
    """Which masks "fitted elsewhere" stands for, and where they are."""
    each, some = "the mean over the repairs for each other use", [use.name for use in uses if use.together]
    if some:
        each = f"the one repair for all uses of the same groups for {', '.join(some)}, and else {each}"
    return (
        f"Fitted elsewhere stands for {each}; the masks are under plans/{method} of the run. --modes joint would fit "
        "one repair for all uses of the same groups, where these are three or more."
    )


def _tables(use: Use) -> list[Table]:
    """Before, and after under the own mask, the one fitted on all other uses and the shared ones."""
    return [use.before if table is None else table for table in (use.before, use.own, use.left_out, *use.shared)]


def _squares(use: Use, seed: int) -> np.ndarray:
    """B^2 before, by the own mask, the mean over shared ones, and by the one fitted on all other uses, (4,)."""
    return _by_origin(np.array([corrected_square(table, seed) for table in _tables(use)]))


def _replicates(use: Use, seed: int) -> np.ndarray:
    """The same under resamples, (4, replicates), of markers alike in all uses and of scenarios in each by itself."""
    return _by_origin(bootstrap_squares(_tables(use), seed, use.markers, use.name))


def _by_origin(squares: np.ndarray) -> np.ndarray:
    return np.stack([squares[0], squares[1], squares[3:].mean(axis=0), squares[2]])


def _reduction(squares: np.ndarray, replicates: np.ndarray, which: int) -> Interval:
    """Of B over all uses under one of the masks, 1 to 3."""
    return compare_squares(squares[[0, which]], replicates[[0, which]]).reduction


def _difference(squares: np.ndarray, replicates: np.ndarray) -> Interval:
    """B under shared masks minus B under own ones, in shares of B before."""
    before = max(float(root(squares[0])), 1e-9)
    return Interval.of(
        (root(squares[2]) - root(squares[1])) / before, (root(replicates[2]) - root(replicates[1])) / before
    )


def _most_random(uses: list[Use], seed: int) -> float | None:
    """The largest reduction of B over all uses by random masks, draw by draw; None without any."""
    squares = [np.array([corrected_square(table, seed) for table in (use.before, *use.random)]) for use in uses]
    return largest_reduction(by_draw(squares))


def _change(reduction: Interval) -> str:
    value, low, high = (round(number) for number in astuple(reduction.as_change))
    return f"{value:+d}% [{low:+d}%, {high:+d}%]"


def _percent(interval: Interval) -> str:
    value, low, high = (round(100 * number) for number in (interval.value, interval.low, interval.high))
    return f"{value}% [{low}%, {high}%]"
