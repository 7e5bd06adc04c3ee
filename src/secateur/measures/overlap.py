"""How far two sets of units agree, and how far sets of their sizes agree by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import hypergeom


@dataclass(frozen=True)
class Overlap:
    """Two sets of units side by side.

    Attributes
    ----------
    shared: units in both. union: units in either.
    jaccard: shared / union; 0 for two empty sets.
    by_chance: the mean of the same for sets drawn at random, as many units of each kind.
    p_value: chance that such sets share as many units or more.
    """

    shared: int
    union: int
    jaccard: float
    by_chance: float
    p_value: float


def overlap(one: Sequence[np.ndarray], other: Sequence[np.ndarray], totals: Sequence[int]) -> Overlap:
    """Compare two sets of units, kind by kind.

    Under chance the shared number of every kind is hypergeometric, and kinds are independent: a head is never drawn
    for a neuron, of which there are many more.

    Parameters
    ----------
    one, other: positions of the chosen units of every kind (heads, neurons), each (chosen,).
    totals: units that there are of every kind.
    """
    shared = sum(len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True))
    sizes = [(len(a), len(b)) for a, b in zip(one, other, strict=True)]
    total = sum(a + b for a, b in sizes)
    chance = np.ones(1)  # chance[n]: probability of n shared units
    for (a, b), there in zip(sizes, totals, strict=True):
        chance = np.convolve(chance, hypergeom.pmf(np.arange(min(a, b) + 1), there, a, b))
    possible = np.arange(len(chance))
    by_chance = float((chance * _jaccard(possible, total)).sum())
    return Overlap(
        shared=shared,
        union=total - shared,
        jaccard=float(_jaccard(np.array(shared), total)),
        by_chance=by_chance,
        p_value=float(min(1.0, chance[shared:].sum())),
    )


def _jaccard(shared: np.ndarray, total: int) -> np.ndarray:
    """Jaccard's index of sets that have ``total`` members together, those in both counted twice."""
    return np.asarray(shared / max(total, 1) / (1 - shared / max(total, 1)))
