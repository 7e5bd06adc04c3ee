"""From scores of several scenarios to one set of units: what carries over within a domain.

The published set-difference method (Ma et al., FAccT 2025) takes the units found under every scenario; the mean score
and the mean rank (Borda's count) are the usual ways to aggregate rankings. Which one holds on a scenario left out is an
open question, so all three are here. Each gives as many units as are asked for, so that they can be set side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def by_intersection(scores: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` positions by the worst rank in any scenario, in order.

    They are the intersection of the scenarios' first k, for the least k at which it holds so many. At a fixed k,
    rankings that share little would leave next to nothing.
    """
    return first(-ranks(scores).max(axis=0), count)


def by_mean_score(scores: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` positions by the mean score, in order."""
    return first(scores.mean(axis=0), count)


def by_mean_rank(scores: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` positions by the mean rank in the scenarios' rankings (Borda), in order."""
    return first(-ranks(scores).mean(axis=0), count)


def ranks(scores: np.ndarray) -> np.ndarray:
    """The rank of every unit in every scenario, 0 for the highest score, (scenarios, units).

    Ties go to the lower position; units that are not scored (NaN) come last.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.arange(scores.shape[1])[None], axis=1)
    return found


def first(score: np.ndarray, count: int) -> np.ndarray:
    """Positions of the ``count`` highest scores, the highest first."""
    return np.argsort(-score, kind="stable")[:count]


RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "intersection": by_intersection,
    "mean score": by_mean_score,
    "mean rank": by_mean_rank,
}
