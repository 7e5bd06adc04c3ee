"""What a study of where repairs hold comes to: means over pairs, and one sentence for who reads no tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.measures.disparity import Interval
from secateur.studies.reach import PLACES, Cell, Summary
from secateur.studies.relations import Relation

# Judged on what was not fitted.
ELSEWHERE: tuple[Relation, ...] = ("across", "attributes", "languages", "joint")


def summarise(method: str, cells: Sequence[Cell], replicates: Mapping[tuple[str, str], np.ndarray]) -> list[Summary]:
    """One row for everything that a method's repairs were judged on, and one for random masks.

    A change of more than +100 % counts as +100 %, or one use whose bias is close to nothing in a resample would decide.

    Parameters
    ----------
    cells: of the method.
    replicates: of the reduction, (replicates,), by source and target of the cells with a bias; under the same resamples
        for all of them.
    """
    rows = []
    for how in PLACES:
        judged = [cell for cell in cells if cell.relation == how]
        counted = [cell for cell in judged if cell.differs_in_one]
        if not judged:
            continue
        biased = [cell for cell in counted if cell.bias_shown]
        costs = {cell.source: cell.perplexity_increase.value for cell in counted if cell.perplexity_increase}
        rows.append(
            Summary(
                method=method,
                relation=how,
                pairs=len(counted),
                set_aside=len(judged) - len(counted),
                biased=len(biased),
                proven=sum(cell.proven for cell in counted),
                change_percent=_mean(biased, replicates).as_change if biased else None,
                interval=judged[0].interval,
                perplexity_increase=float(np.median([*costs.values()])) if costs else None,
            )
        )
    return rows


def _mean(cells: list[Cell], replicates: Mapping[tuple[str, str], np.ndarray]) -> Interval:
    """The mean reduction, with its interval; of random masks with the smallest and the largest draw of all."""
    value = float(np.mean([max(-1.0, cell.reduction.value) for cell in cells]))
    if cells[0].relation == "random":
        return Interval(value, min(c.reduction.low for c in cells), max(c.reduction.high for c in cells))
    drawn = np.clip([replicates[cell.source, cell.target] for cell in cells], -1, 1)
    return Interval.of(value, drawn.mean(axis=0))


def verdict_of(summaries: Sequence[Summary], compared: bool) -> str:
    """Where repairs are proven to help, in a sentence or two.

    Parameters
    ----------
    compared: whether random masks were judged, without which nothing is proven.
    """
    rows = [row for row in summaries if row.relation != "random"]
    pairs, biased = (sum(getattr(row, name) for row in rows) for name in ("pairs", "biased"))
    if not pairs:
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
    return f"{said} {_most_carried_over(rows)}".strip()


def _counted(pairs: int) -> str:
    return "one pair of a repair and a use" if pairs == 1 else f"{pairs} pairs of a repair and a use"


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
