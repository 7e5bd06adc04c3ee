"""Which heads and neurons of each layer stay, and the weights without the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.models import LanguageModel
from secateur.units import UnitSpace


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of one layer, as ascending indices: query heads, KV heads and neurons."""

    heads: np.ndarray
    kv_heads: np.ndarray
    neurons: np.ndarray

    def heads_by_group(self, heads_per_group: int) -> list[int]:
        """Number of query heads of every KV head that stays."""
        groups = self.heads // heads_per_group
        return [int((groups == group).sum()) for group in self.kv_heads]


def exactly(
    space: UnitSpace, keep: np.ndarray, heads_shrink: bool, *, multiple: int = 1, even_groups: bool = False
) -> list[Kept]:
    """Per layer, just the units that a mask keeps; a layer that would lose all keeps one.

    A KV head stays as long as one of its query heads does.

    Parameters
    ----------
    keep: bool (units,). heads_shrink: off to leave all heads where they are.
    multiple: neurons of every layer are filled up to one of it, as far as there are so many, with the first that the
        mask removes. even_groups: KV heads of a layer are filled up in the same way to equal numbers of query heads.
    """
    layers = []
    for layer in range(space.n_layers):
        of_heads, of_neurons = keep[space.head_slice(layer)], keep[space.neuron_slice(layer)]
        by_group: list[np.ndarray] = np.split(of_heads, space.kv_heads[layer])
        per_group = len(by_group[0])
        heads = _at_least_one(of_heads) if heads_shrink else np.arange(len(of_heads))
        groups = np.unique(heads // per_group)
        if even_groups and heads_shrink:
            most = max(1, max(int(group.sum()) for group in by_group))
            heads = np.concatenate([group * per_group + _filled(by_group[group], most) for group in groups])
        least = -(-max(1, int(of_neurons.sum())) // multiple) * multiple
        layers.append(Kept(heads, groups, _filled(of_neurons, least)))
    return layers


def evenly(space: UnitSpace, keep: np.ndarray, kv_heads: int, neurons: int) -> list[Kept]:
    """Per layer, so many whole KV groups and neurons: those that a mask keeps, filled up with the first it removes."""
    layers = []
    for layer in range(space.n_layers):
        per_group = space.heads[layer] // space.kv_heads[layer]
        used = np.asarray(keep[space.head_slice(layer)].reshape(-1, per_group).any(axis=1))
        groups = _filled(used, kv_heads)
        heads = spread(groups, per_group)
        layers.append(Kept(heads, groups, _filled(keep[space.neuron_slice(layer)], neurons)))
    return layers


def widest(space: UnitSpace, keep: np.ndarray) -> tuple[int, int]:
    """The most KV groups with a head left, and the most neurons left, of any layer; at least one each."""
    layers = exactly(space, keep, heads_shrink=True)
    return max(len(layer.kv_heads) for layer in layers), max(len(layer.neurons) for layer in layers)


def shrink(model: LanguageModel, state: dict[str, Tensor], layers: Sequence[Kept]) -> None:
    """Take from a state dict, in place, the rows and columns of all units that do not stay."""
    family, space = model.family, UnitSpace.of(model)
    ins, outs = (1, 0) if family.transposed else (0, 1)  # axes of a weight's output features and of its inputs
    for layer, kept in enumerate(layers):
        prefix = f"{family.blocks}.{layer}."
        if len(kept.neurons) < space.neurons[layer]:
            for path in family.mlp_in:
                _take(state, prefix + path, ins, _repeated(state, prefix + path, ins, kept.neurons, space, layer))
            _take_inputs(state, prefix + family.mlp_out, outs, kept.neurons)
        if len(kept.heads) < space.heads[layer]:
            rows = _attention_rows(kept, space, layer)
            joined = [np.concatenate(rows)] if len(family.attention_in) == 1 else rows
            starts = [0] if len(joined) == 1 else [0, space.heads[layer], space.heads[layer] + space.kv_heads[layer]]
            for path, index, start in zip(family.attention_in, joined, starts, strict=True):
                _take(state, prefix + path, ins, index - start * space.head_dim)
            _take_inputs(state, prefix + family.attention_out, outs, rows[0])


def _attention_rows(kept: Kept, space: UnitSpace, layer: int) -> list[np.ndarray]:
    """Rows of query, key and value that stay, counted as if the three were one below the other."""
    heads, groups = space.heads[layer], space.kv_heads[layer]
    starts = (kept.heads, heads + kept.kv_heads, heads + groups + kept.kv_heads)
    return [spread(start, space.head_dim) for start in starts]


def _repeated(
    state: dict[str, Tensor], path: str, axis: int, neurons: np.ndarray, space: UnitSpace, layer: int
) -> np.ndarray:
    """Rows of the neurons in a projection that has them once, or as often as it fuses gate and up."""
    times = state[f"{path}.weight"].shape[axis] // space.neurons[layer]
    return np.concatenate([neurons + part * space.neurons[layer] for part in range(times)])


def _take(state: dict[str, Tensor], path: str, axis: int, index: np.ndarray) -> None:
    """Keep some output features of a projection."""
    for name, along in ((f"{path}.weight", axis), (f"{path}.bias", 0)):
        if name in state:
            state[name] = state[name].index_select(along, torch.from_numpy(index).to(state[name].device))


def _take_inputs(state: dict[str, Tensor], path: str, axis: int, index: np.ndarray) -> None:
    """Keep some input features of a projection."""
    weight = state[f"{path}.weight"]
    state[f"{path}.weight"] = weight.index_select(axis, torch.from_numpy(index).to(weight.device))


def spread(index: np.ndarray, width: int) -> np.ndarray:
    """Positions of what blocks of ``width`` hold, given the blocks."""
    return np.asarray((index[:, None] * width + np.arange(width)).reshape(-1))


def _at_least_one(keep: np.ndarray) -> np.ndarray:
    return np.flatnonzero(keep) if keep.any() else np.array([0])


def _filled(keep: np.ndarray, size: int) -> np.ndarray:
    """The indices that are kept, with the first of the others until there are ``size``, ascending."""
    return np.sort(np.argsort(~keep, kind="stable")[:size])
