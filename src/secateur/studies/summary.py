"""What a study of where repairs hold comes to: all pairs of a kind, and one sentence for who reads no tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from secateur.measures.disparity import Comparison, Interval, by_draw, compare_squares, holm, largest_reduction, p_value
from secateur.studies.reach import PLACES, Cell, Summary
from secateur.studies.relations import Relation

# Judged on what was not fitted.
ELSEWHERE: tuple[Relation, ...] = ("across", "attributes", "languages", "joint")
Pair = tuple[str, str]  # source and target


@dataclass(frozen=True, eq=False)
class Squares:
    """B^2 of one pair on what it was judged on, before the root: errors above and below 0 even out over pairs.

    Attributes
    ----------
    value: before and after, (2,). replicates: the same under resamples that pairs share, (2, replicates).
    random: under random masks, (draws,).
    """

    value: np.ndarray
    replicates: np.ndarray
    random: np.ndarray


def summarise(
    method: str, cells: Sequence[Cell], squares: Mapping[Pair, Squares], random: Mapping[str, np.ndarray]
) -> list[Summary]:
    """One row for everything that a method's repairs were judged on, and one for random masks.

    Parameters
    ----------
    cells: of the method. squares: of its pairs.
    random: B^2 before and under every random mask, by target, (1 + draws,).
    """
    rows = []
    for how in PLACES:
        judged = [cell for cell in cells if cell.relation == how]
        counted = [cell for cell in judged if cell.differs_in_one]
        if not judged:
            continue
        costs = {cell.source: cell.perplexity_increase.value for cell in counted if cell.perplexity_increase}
        pooled = _of_draws(list(random.values())) if how == "random" else _pooled([squares[_pair(c)] for c in counted])
        rows.append(
            Summary(
                method=method,
                relation=how,
                pairs=len(counted),
                set_aside=len(judged) - len(counted),
                without_repair=sum(not cell.repaired for cell in counted),
                biased=sum(cell.bias_shown for cell in counted),
                provable=sum(cell.provable for cell in counted),
                too_small=sum(cell.bias_shown and cell.repaired and not cell.provable for cell in counted),
                proven=sum(cell.proven for cell in counted),
                rose=sum(cell.rose for cell in counted),
                over_limit=sum(cell.over_limit for cell in counted),
                pooled=pooled,
                interval=judged[0].interval,
                perplexity_increase=float(np.median([*costs.values()])) if costs else None,
                largest_random=None if how == "random" else _largest_random([squares[_pair(c)] for c in counted]),
                foreign_text=any(cell.foreign_text for cell in counted),
            )
        )
    return rows


def with_holm(summaries: Sequence[Summary]) -> list[Summary]:
    """Rows with the p-value of their pooled change, corrected for all rows of the study; random masks are no tests."""
    tested = [
        (number, row.pooled)
        for number, row in enumerate(summaries)
        if row.pooled is not None and row.relation != "random"
    ]
    adjusted = holm(np.array([p_value(pooled.fall) for _, pooled in tested]))
    corrected = list(summaries)
    for (number, _), p in zip(tested, adjusted.tolist(), strict=True):
        corrected[number] = replace(summaries[number], p_holm=p)
    return corrected


def _pair(cell: Cell) -> Pair:
    return cell.source, cell.target


def _pooled(pairs: list[Squares]) -> Comparison | None:
    """B over several pairs as over one large suite; None for no pair."""
    if not pairs:
        return None
    value, replicates = (np.mean([getattr(one, name) for one in pairs], axis=0) for name in ("value", "replicates"))
    return compare_squares(value, replicates)


def _largest_random(pairs: list[Squares]) -> float | None:
    """The largest reduction of B over several pairs by random masks, draw by draw; None where a pair has no draw."""
    return largest_reduction(by_draw([np.append(pair.value[0], pair.random) for pair in pairs])) if pairs else None


def _of_draws(targets: list[np.ndarray]) -> Comparison:
    """The same under every random mask: the mean, with the smallest and the largest draw in place of an interval.

    Parameters
    ----------
    targets: each (1 + draws,); fewer draws where answers under one are not finite.
    """
    before, *draws = by_draw(targets)
    found = [compare_squares(np.array([before, one]), np.full((2, 1), np.nan)) for one in draws]

    def spread(name: str) -> Interval:
        values = [getattr(one, name).value for one in found]
        return Interval(float(np.mean(values)), min(values), max(values))

    return Comparison(*(spread(field.name) for field in fields(Comparison)))


def verdict_of(summaries: Sequence[Summary], compared: bool) -> str:
    """Where repairs are proven to help, in a sentence or two.

    Parameters
    ----------
    compared: whether random masks were judged, without which nothing is proven.
    """
    rows = [row for row in summaries if row.relation != "random"]
    pairs, without, biased, rose = (
        sum(getattr(row, name) for row in rows) for name in ("pairs", "without_repair", "biased", "rose")
    )
    if pairs == without:
        return "No repair was found that could be judged."
    if not biased:
        return (
            f"In none of {_counted(pairs)} could a bias be told from chance before the repair, so nothing can be "
            "proven, and whether repairs carry over is not known. More markers to judge by may show more."
        )
    if not compared:
        return (
            f"In {biased} of {_counted(pairs)} a bias could be told from chance before the repair, but without random "
            "masks to compare with nothing is proven."
        )
    found = []
    for how, place in PLACES.items():
        each = [row for row in rows if row.relation == how]
        if any(row.biased for row in each):
            found.append(f"{place} in {sum(row.proven for row in each)} of {sum(row.biased for row in each)}")
    said = f"Of {_counted(biased)} with a bias, repairs are proven to lower it {', '.join(found)}."
    small = sum(row.too_small for row in rows)
    blind = (
        f"In {small} of these the test part is so small that even a repair which closes every gap would not be shown "
        "to lower the bias; more markers and scenarios to judge by would tell more."
        if small
        else ""
    )
    missing = f"For {without} of all {pairs} pairs no repair was found." if without else ""
    worse = f"In {rose} of all {pairs} pairs the bias is shown to have risen." if rose else ""
    return " ".join(filter(None, (said, blind, missing, worse, _most_carried_over(rows), _taken_together(rows))))


def _counted(pairs: int) -> str:
    return "one pair of a fitted and a judged use" if pairs == 1 else f"{pairs} pairs of a fitted and a judged use"


def _taken_together(rows: Sequence[Summary]) -> str:
    """What is shown over all pairs of a row at once, which says nothing of a single use."""
    shown = dict[str, list[str]]()
    for row in rows:
        if row.lowered and row.pooled is not None:
            change = row.pooled.reduction.as_change
            cost = f"; {row.over_limit} of {row.pairs} pairs over the utility limit" if row.over_limit else ""
            figures = f"{change.value:+.0f}% [{change.low:+.0f}%, {change.high:+.0f}%]{cost}"
            shown.setdefault(row.method, []).append(f"{row.place} ({figures})")
    if not shown:
        return ""
    said = [f"repairs by {name} lower the bias {' and '.join(places)}" for name, places in shown.items()]
    return f"The counts are of single uses; over all pairs of a kind together, {', '.join(said)}."


def _most_carried_over(rows: Sequence[Summary]) -> str:
    """The methods with the largest share of proven pairs elsewhere, where several were tried."""
    counts = dict[str, tuple[int, int]]()
    for row in rows:
        if row.relation in ELSEWHERE and row.biased:
            proven, biased = counts.get(row.method, (0, 0))
            counts[row.method] = proven + row.proven, biased + row.biased
    if not counts:
        return ""
    most = max(proven / biased for proven, biased in counts.values())
    if most == 0:
        return "None is proven to carry over to a use that it was not fitted on."
    if len(counts) == 1:
        return ""
    best = [f"{name} ({p} of {b})" for name, (p, b) in counts.items() if p / b == most]
    return f"The most carried over: {', '.join(best)}."
