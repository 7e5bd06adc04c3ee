"""From scores to candidate masks: ranked once, or removed in rounds and scored again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.progress import Advance
from secateur.scoring import Scores
from secateur.units import UnitSpace

CandidateKind = Literal["heads", "neurons", "both"]
MAX_STEP = 80
# A first-order prediction promises too much, so a step aims at less than all of the disparity.
STEP_SHARE = 0.8
# Loss increase in nats per token that is not worth looking into: units always cost a little more
# together than the sum of their costs.
TOLERANCE = 5e-4
MAX_TRIALS = 24


@dataclass(frozen=True, eq=False)
class Selection:
    """Units to remove, as flat positions, of one kind or of both."""

    kind: CandidateKind
    removed: np.ndarray


def ranking(scores: Scores, space: UnitSpace, kind: CandidateKind, excluded: np.ndarray | None = None) -> np.ndarray:
    """Flat positions in the order of removal: the largest fall of the disparity per cost first.

    Units with no gain to count on, and the excluded ones, are left out. Ties go to the lower
    position, so the order is determined by the scores.
    """
    eligible = scores.gain > 0
    if kind == "heads":
        eligible[space.n_heads :] = False
    elif kind == "neurons":
        eligible[: space.n_heads] = False
    if excluded is not None:
        eligible[excluded] = False
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
    excluded: np.ndarray,
    disparity: float,
    largest: int = MAX_STEP,
) -> np.ndarray:
    """The units to remove next: those predicted to take away most of the disparity, at most ``largest``.

    Parameters
    ----------
    excluded: units that are removed already or not to be removed.
    disparity: the disparity D that ``scores.effect`` refers to, as it is now.
    """
    order = ranking(scores, space, kind, excluded)
    predicted = np.cumsum(-scores.effect[order])
    count = min(int(np.searchsorted(predicted, STEP_SHARE * disparity)) + 1, largest, len(order))
    return order[:count]


@dataclass(frozen=True, eq=False)
class Trial:
    """What became of a step: all units removed by now, those refused, and the damage done so far."""

    removed: np.ndarray
    refused: np.ndarray
    damage: float


def try_step(
    removed: np.ndarray,
    step: np.ndarray,
    cost: np.ndarray,
    damage: Callable[[np.ndarray], float],
    damage_before: float,
    advance: Advance = lambda _: None,
) -> Trial:
    """Remove the units of a step that do no more damage together than their costs say.

    A cost is a second-order estimate for one unit alone. A few units do many times that damage,
    or do it only together with others. A part of the step that does is halved until such units
    stand alone, and these are refused; after :data:`MAX_TRIALS` measurements, whole parts are.

    Parameters
    ----------
    removed, step: flat positions.
    cost: (units,), predicted loss increase of each unit in nats per token.
    damage: measures a set of removed units, in nats per token.
    damage_before: of ``removed``.
    """
    refused: list[np.ndarray] = []
    parts = [step] if len(step) else []
    trials = 0
    while parts:
        part = parts.pop(0)
        together = np.concatenate([removed, part]).astype(int)
        measured = damage(together)
        trials += 1
        if measured - damage_before <= cost[part].sum() + TOLERANCE:
            removed, damage_before = together, measured
            advance(len(part))
        elif len(part) == 1 or trials >= MAX_TRIALS:
            refused.append(part)
            advance(len(part))
        else:
            half = len(part) // 2
            parts = [part[:half], part[half:], *parts]
    return Trial(removed, np.concatenate([*refused, np.zeros(0)]).astype(int), damage_before)
