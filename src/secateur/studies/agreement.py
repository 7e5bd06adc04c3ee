"""Whether repairs that were fitted on different suites remove the same units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from secateur.measures.disparity import holm
from secateur.measures.overlap import overlap
from secateur.studies.reach import Agreement
from secateur.units import Mask, UnitSpace
from secateur.weights import AnyMask, WeightMask


def agreements(method: str, masks: Mapping[str, AnyMask], suites: Sequence[str], space: UnitSpace) -> list[Agreement]:
    """Every two suites' units side by side; nothing for masks of single weights.

    Parameters
    ----------
    masks: of one method, by source; those of other sources than suites are left out.
    """
    found, units_by_suite = [], units_of({suite: masks[suite] for suite in suites if suite in masks})
    for (one, a), (other, b) in combinations(units_by_suite.items(), 2):
        kinds = [[units[units < space.n_heads], units[units >= space.n_heads]] for units in (a, b)]
        agreement = overlap(kinds[0], kinds[1], (space.n_heads, space.n_neurons))
        found.append(Agreement(method, one, other, agreement, per_layer(space, np.intersect1d(a, b))))
    return found


def layers(masks: Mapping[str, AnyMask], space: UnitSpace) -> dict[str, list[int]]:
    """Units of every source, by layer."""
    return {source: per_layer(space, units) for source, units in units_of(masks).items()}


def units_of(masks: Mapping[str, AnyMask]) -> dict[str, np.ndarray]:
    """Flat positions of what each mask removes or attenuates; masks of single weights are left out."""
    return {
        source: np.asarray(mask.removed if isinstance(mask, Mask) else mask.changed)
        for source, mask in masks.items()
        if not isinstance(mask, WeightMask)
    }


def per_layer(space: UnitSpace, units: np.ndarray) -> list[int]:
    """How many of some flat positions lie in every layer, (layers,)."""
    layers = range(space.n_layers)
    parts = [(space.head_slice(layer), space.neuron_slice(layer)) for layer in layers]
    return [int(sum(((units >= part.start) & (units < part.stop)).sum() for part in both)) for both in parts]


def with_holm(found: Sequence[Agreement]) -> list[Agreement]:
    """The same with p-values corrected for all pairs."""
    adjusted = holm(np.array([one.found.p_value for one in found]))
    return [replace(one, p_holm=float(p)) for one, p in zip(found, adjusted, strict=True)]
