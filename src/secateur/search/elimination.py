"""From scores to candidate masks: ranked once, or removed in rounds and scored again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.scoring import Scores
from secateur.units import UnitSpace

CandidateKind = Literal["heads", "neurons", "both"]
MAX_STEP = 80


@dataclass(frozen=True, eq=False)
class Selection:
    """Units to remove, as flat positions, of one kind or of both."""

    kind: CandidateKind
    removed: np.ndarray


def ranking(scores: Scores, space: UnitSpace, kind: CandidateKind, removed: np.ndarray | None = None) -> np.ndarray:
    """Flat positions in the order of removal: the largest fall of the disparity per cost first.

    Units with no gain to count on, and those removed already, are left out. Ties
    go to the lower position, so the order is determined by the scores.
    """
    eligible = scores.gain > 0
    if kind == "heads":
        eligible[space.n_heads :] = False
    elif kind == "neurons":
        eligible[: space.n_heads] = False
    if removed is not None:
        eligible[removed] = False
    order = np.argsort(-scores.rank, kind="stable")
    return np.asarray(order[eligible[order]])


def geometric_counts(largest: int, steps: int = 2, factor: int = 4) -> list[int]:
    """Up to ``steps`` counts that grow by ``factor`` and end at the largest: 16, 64 for 64."""
    counts = [largest // factor**step for step in range(steps)]
    return sorted(count for count in counts if count >= 1)


def top_units(scores: Scores, space: UnitSpace, kind: CandidateKind, counts: list[int]) -> Iterator[Selection]:
    """The first units of one ranking, for each of several ascending counts."""
    order = ranking(scores, space, kind)
    for count in counts:
        if count <= len(order):
            yield Selection(kind, order[:count])


def next_step(
    scores: Scores,
    space: UnitSpace,
    kind: CandidateKind,
    removed: np.ndarray,
    disparity: float,
    largest: int = MAX_STEP,
) -> np.ndarray:
    """Add to ``removed`` the units that are predicted to take away the disparity, at most ``largest``.

    A first-order prediction promises too much, so scores are computed anew before the next step.

    Parameters
    ----------
    disparity: the disparity D that ``scores.effect`` refers to, as it is now.
    """
    order = ranking(scores, space, kind, removed)
    predicted = np.cumsum(-scores.effect[order])
    count = min(int(np.searchsorted(predicted, disparity)) + 1, largest, len(order))
    return np.concatenate([removed, order[:count]]).astype(int)
