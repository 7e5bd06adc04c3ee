"""From scores of several scenarios to one set of units: what carries over within a domain.

The published set-difference method (Ma et al., FAccT 2025) takes the units found under every scenario; the mean score
and the mean place are the usual ways to combine rankings. Which one holds on a scenario left out is an open question,
so all three are here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def by_intersection(ranks: np.ndarray, count: int) -> np.ndarray:
    """Positions among the first ``count`` of every scenario, ascending."""
    return np.flatnonzero((places(ranks) < count).all(axis=0))


def by_mean_score(ranks: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` positions by the mean score, in order."""
    return first(ranks.mean(axis=0), count)


def by_mean_place(ranks: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` positions by the mean place in the scenarios' rankings (Borda), in order."""
    return first(-places(ranks).mean(axis=0), count)


def places(ranks: np.ndarray) -> np.ndarray:
    """The place of every unit in every scenario's ranking, 0 for the highest score, (scenarios, units).

    Ties go to the lower position; units that are not scored (NaN) come last.
    """
    order = np.argsort(-ranks, axis=1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.arange(ranks.shape[1])[None], axis=1)
    return found


def first(score: np.ndarray, count: int) -> np.ndarray:
    """Positions of the ``count`` highest scores, the highest first."""
    return np.argsort(-score, kind="stable")[:count]


RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "intersection": by_intersection,
    "mean score": by_mean_score,
    "mean place": by_mean_place,
}
