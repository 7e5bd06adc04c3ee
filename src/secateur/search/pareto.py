"""Pareto fronts of things to be lowered."""

from __future__ import annotations

import numpy as np

# Beyond so many utility limits nothing is of use.
MOST_LIMITS = 5.0


def front(points: np.ndarray) -> np.ndarray:
    """Positions of the points, (points, objectives), that no other dominates, ascending; of equal points all."""
    no_worse = (points[:, None] <= points[None]).all(axis=2)  # (one, other)
    better = (points[:, None] < points[None]).any(axis=2)
    return np.flatnonzero(~(no_worse & better).any(axis=0))


def dominated_area(points: np.ndarray, worst: tuple[float, float]) -> float:
    """The area that points, (points, 2), dominate of the rectangle from (0, 0) to ``worst``."""
    area, lowest = 0.0, worst[0]
    for first, second in sorted(points.tolist(), key=lambda point: (point[1], point[0])):
        room = worst[1] - second
        if first < lowest and room > 0:
            area += (lowest - max(0.0, first)) * room
            lowest = max(0.0, first)
    return area


def promising(points: np.ndarray, eligible: np.ndarray, count: int, before: float, limit: float) -> list[int]:
    """What a search proposes of all that it has measured, as positions of eligible ones.

    Half of them dominate most of what lies within the limit; the others, of :data:`MOST_LIMITS` limits.

    Parameters
    ----------
    points: (points, 2), bias and increase of log-perplexity. eligible: positions.
    before: bias of the unpruned model. limit: the utility limit in log-perplexity.
    """
    taken = greedy(points, eligible, (count + 1) // 2, (before, limit))
    rest = np.array([one for one in eligible if one not in taken], dtype=int)
    return taken + greedy(points, rest, count - len(taken), (before, MOST_LIMITS * limit))


def greedy(points: np.ndarray, eligible: np.ndarray, count: int, worst: tuple[float, float]) -> list[int]:
    """Of eligible positions those that dominate most, each the one that adds most: (1 - 1/e) of the best at least.

    Fewer than ``count`` where the others add nothing.
    """
    taken: list[int] = []
    while len(taken) < min(count, len(eligible)):
        left = [int(one) for one in eligible if one not in taken]
        areas = [dominated_area(points[[*taken, one]], worst) for one in left]
        if max(areas) <= dominated_area(points[taken], worst):
            break
        taken.append(left[int(np.argmax(areas))])
    return taken
