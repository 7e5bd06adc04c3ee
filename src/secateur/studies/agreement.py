"""Whether repairs that were fitted on different suites remove the same units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from secateur.measures.disparity import holm
from secateur.measures.overlap import Overlap, overlap
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
    everywhere = slice(0, space.n_heads), slice(space.n_heads, len(space))
    layers = [(space.head_slice(layer), space.neuron_slice(layer)) for layer in range(space.n_layers)]
    for (one, a), (other, b) in combinations(units_by_suite.items(), 2):
        by_layer = [_overlap(a, b, layer) for layer in layers]
        found.append(Agreement(method, one, other, _overlap(a, b, everywhere), by_layer))
    return found


def _overlap(one: np.ndarray, other: np.ndarray, kinds: tuple[slice, slice]) -> Overlap:
    """Two sets of flat positions side by side, as far as they lie among some heads and neurons."""
    a, b = ([units[(units >= kind.start) & (units < kind.stop)] for kind in kinds] for units in (one, other))
    return overlap(a, b, [kind.stop - kind.start for kind in kinds])


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
