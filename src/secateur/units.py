"""Units, masks, and masking as a reversible context manager on a live model.

A *unit* is the smallest thing pruned: an attention head or an MLP neuron. All units of a model form
one flat order (all heads layer by layer, then all neurons layer by layer), so that scores, masks and
searches are plain vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from secateur.errors import MaskError, SettingError
from secateur.models import LanguageModel

Kind = Literal["head", "neuron"]
Ablation = Literal["zero", "mean"]
MASK_FORMAT = "secateur-mask-1"
HEADER = "secateur"


@dataclass(frozen=True, order=True)
class Unit:
    """An attention head or an MLP neuron: kind, layer and index within the layer, all from 0."""

    kind: Kind
    layer: int
    index: int


@dataclass(frozen=True)
class UnitSpace:
    """How many units each layer has.

    Attributes
    ----------
    heads, kv_heads, neurons: counts per layer.
    head_dim: width of one head.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]
    head_dim: int

    @classmethod
    def of(cls, model: LanguageModel) -> UnitSpace:
        return cls(
            heads=tuple(model.heads_per_layer),
            kv_heads=tuple(model.kv_heads_per_layer),
            neurons=tuple(model.neurons_per_layer),
            head_dim=model.head_dim,
        )

    def __len__(self) -> int:
        return self.n_heads + self.n_neurons

    @property
    def n_layers(self) -> int:
        return len(self.heads)

    @property
    def n_heads(self) -> int:
        return sum(self.heads)

    @property
    def n_neurons(self) -> int:
        return sum(self.neurons)

    @cached_property
    def _head_starts(self) -> list[int]:
        return [0, *np.cumsum(self.heads).tolist()]

    @cached_property
    def _neuron_starts(self) -> list[int]:
        return [self.n_heads + start for start in [0, *np.cumsum(self.neurons).tolist()]]

    def head_slice(self, layer: int) -> slice:
        """Where a layer's heads stand in the flat order."""
        return slice(self._head_starts[layer], self._head_starts[layer + 1])

    def neuron_slice(self, layer: int) -> slice:
        """Where a layer's neurons stand in the flat order."""
        return slice(self._neuron_starts[layer], self._neuron_starts[layer + 1])

    def flat(self, unit: Unit) -> int:
        """Position of a unit in the flat order.

        Raises
        ------
        MaskError: the model has no such unit.
        """
        counts = self.heads if unit.kind == "head" else self.neurons
        if not (0 <= unit.layer < self.n_layers and 0 <= unit.index < counts[unit.layer]):
            raise MaskError(f"The model has no {unit.kind} {unit.index} in layer {unit.layer}.")
        start = self._head_starts if unit.kind == "head" else self._neuron_starts
        return start[unit.layer] + unit.index

    def unit(self, flat: int) -> Unit:
        """The unit at a position of the flat order."""
        kind: Kind = "head" if flat < self.n_heads else "neuron"
        starts = self._head_starts if kind == "head" else self._neuron_starts
        layer = int(np.searchsorted(starts, flat, side="right")) - 1
        return Unit(kind, layer, int(flat) - starts[layer])


@dataclass(frozen=True, eq=False)
class ActivationMeans:
    """Mean input of every output projection over neutral text, the value of mean ablation.

    Attributes
    ----------
    heads: per layer, fp32 (heads, head_dim).
    neurons: per layer, fp32 (neurons,).
    """

    heads: tuple[np.ndarray, ...]
    neurons: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Mask:
    """On/off for every unit of one model, with the constants that stand in for removed units.

    Attributes
    ----------
    space: the units of the model.
    keep: bool array (units,), False where a unit is removed.
    fingerprint: of the model that the mask was made for.
    means: what removed units give instead of their activations; None for zero ablation.
    """

    action: ClassVar[str] = "removed"

    space: UnitSpace
    keep: np.ndarray
    fingerprint: str
    means: ActivationMeans | None = None

    def __post_init__(self) -> None:
        keep = np.asarray(self.keep, dtype=bool).copy()
        if keep.shape != (len(self.space),):
            raise MaskError(f"A mask of this model has {len(self.space)} entries, not {keep.shape}.")
        keep.setflags(write=False)
        object.__setattr__(self, "keep", keep)

    @classmethod
    def none(cls, model: LanguageModel) -> Mask:
        """The mask that removes nothing."""
        space = UnitSpace.of(model)
        return cls(space, np.ones(len(space), dtype=bool), model.fingerprint)

    @classmethod
    def removing(cls, model: LanguageModel, units: Iterable[Unit | int], means: ActivationMeans | None = None) -> Mask:
        """The mask that removes the given units, as :class:`Unit` or flat positions."""
        space = UnitSpace.of(model)
        keep = np.ones(len(space), dtype=bool)
        for unit in units:
            flat = space.flat(unit) if isinstance(unit, Unit) else int(unit)
            if not 0 <= flat < len(space):
                raise MaskError(f"The model has no unit at position {flat}; it has {len(space)} units.")
            keep[flat] = False
        return cls(space, keep, model.fingerprint, means)

    @property
    def ablation(self) -> Ablation:
        return "zero" if self.means is None else "mean"

    @property
    def removed(self) -> np.ndarray:
        """Flat positions of the removed units, ascending."""
        return np.flatnonzero(~self.keep)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is removed."""
        return bool(self.keep.all())

    @property
    def summary(self) -> str:
        """What is removed, in words."""
        return f"{self.heads_removed} heads, {self.neurons_removed} neurons"

    @property
    def units(self) -> list[Unit]:
        return [self.space.unit(flat) for flat in self.removed]

    @property
    def heads_removed(self) -> int:
        return int((~self.keep[: self.space.n_heads]).sum())

    @property
    def neurons_removed(self) -> int:
        return int((~self.keep[self.space.n_heads :]).sum())

    @property
    def weights_removed(self) -> int:
        """A mask of units removes no single weights."""
        return 0

    def random_like(self, rng: np.random.Generator) -> Mask:
        """A mask that removes as many heads and as many neurons, drawn at random."""
        keep = np.ones(len(self.space), dtype=bool)
        keep[rng.choice(self.space.n_heads, size=self.heads_removed, replace=False)] = False
        keep[self.space.n_heads + rng.choice(self.space.n_neurons, size=self.neurons_removed, replace=False)] = False
        return Mask(self.space, keep, self.fingerprint, self.means)

    def __and__(self, other: Mask) -> Mask:
        """The mask that removes what either removes."""
        if self.space != other.space or self.fingerprint != other.fingerprint:
            raise MaskError("Masks of different models cannot be combined.")
        if self.ablation != other.ablation:
            raise MaskError("A mask with zero ablation and one with mean ablation cannot be combined.")
        return Mask(self.space, self.keep & other.keep, self.fingerprint, _joined_means(self, other))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        same = self.space == other.space and self.fingerprint == other.fingerprint
        return same and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> bytes:
        """Bytes that identify the mask for one model: what a store of results is keyed by."""
        means = hashlib.sha256()
        for values in self._removed_means().values():
            means.update(values.tobytes())
        return self.ablation.encode() + np.packbits(self.keep).tobytes() + means.digest()

    def check(self, model: LanguageModel) -> None:
        """Refuse a mask that was made for another model.

        Raises
        ------
        MaskError: the fingerprints or the unit counts differ.
        """
        check_made_for(model, self.fingerprint, self.space, "mask")

    @contextmanager
    def applied(self, model: LanguageModel) -> Iterator[None]:
        """Remove the mask's units from a live model while the context lasts.

        Raises
        ------
        MaskError: the mask was made for another model.
        """
        self.check(model)
        with gated(model, gates_of(self.space, self.keep, self.means)):
            yield

    def save(self, path: str | Path) -> None:
        """Write the mask to one small safetensors file; equal masks give equal bytes."""
        tensors = {"removed": self.removed.astype(np.int32), **self._removed_means()}
        header = {
            "format": MASK_FORMAT,
            "fingerprint": self.fingerprint,
            "ablation": self.ablation,
            "space": asdict(self.space),
        }
        # One entry only: safetensors writes several in an order that changes from run to run.
        save_file(tensors, str(path), metadata={HEADER: json.dumps(header, sort_keys=True)})

    def _removed_means(self) -> dict[str, np.ndarray]:
        """The means of the removed units by layer, as the mask's file holds them; empty for zero ablation."""
        if self.means is None:
            return {}
        tensors = {}
        for layer in range(self.space.n_layers):
            off = ~self.keep[self.space.head_slice(layer)]
            tensors[f"head_means.{layer}"] = np.ascontiguousarray(self.means.heads[layer][off])
            off = ~self.keep[self.space.neuron_slice(layer)]
            tensors[f"neuron_means.{layer}"] = np.ascontiguousarray(self.means.neurons[layer][off])
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask file.

        Raises
        ------
        MaskError: the file is missing or is not a mask.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(header, dict) or header.get("format") != MASK_FORMAT:
                raise MaskError(f"'{path}' is not a Secateur mask.")
            space = space_from(header["space"])
            keep = np.ones(len(space), dtype=bool)
            if (tensors["removed"] < 0).any() or header["ablation"] not in ("zero", "mean"):
                raise ValueError("it has a negative unit or an unknown ablation")
            keep[tensors["removed"]] = False
            means = _means_from(tensors, space, keep) if header["ablation"] == "mean" else None
            return cls(space, keep, str(header["fingerprint"]), means)
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise MaskError(f"The mask file '{path}' cannot be read: {error}.") from error


def check_made_for(model: LanguageModel, fingerprint: str, space: UnitSpace | None, what: str) -> None:
    """Refuse what was made for another model.

    Parameters
    ----------
    space: the units that it was made for, where it has any. what: its name in the message.

    Raises
    ------
    MaskError: the fingerprints or the unit counts differ.
    """
    if fingerprint != model.fingerprint or (space is not None and space != UnitSpace.of(model)):
        raise MaskError(
            f"This {what} was made for another model (fingerprint {fingerprint}) than '{model.source}' "
            f"(fingerprint {model.fingerprint}); load the model it was made for."
        )


def space_from(fields: dict[str, Any]) -> UnitSpace:
    """The inverse of ``dataclasses.asdict`` after a way through JSON."""
    return UnitSpace(
        heads=tuple(fields["heads"]),
        kv_heads=tuple(fields["kv_heads"]),
        neurons=tuple(fields["neurons"]),
        head_dim=int(fields["head_dim"]),
    )


def _means_from(tensors: dict[str, np.ndarray], space: UnitSpace, keep: np.ndarray) -> ActivationMeans:
    heads, neurons = [], []
    for layer in range(space.n_layers):
        head = np.zeros((space.heads[layer], space.head_dim), dtype=np.float32)
        head[~keep[space.head_slice(layer)]] = tensors[f"head_means.{layer}"]
        neuron = np.zeros(space.neurons[layer], dtype=np.float32)
        neuron[~keep[space.neuron_slice(layer)]] = tensors[f"neuron_means.{layer}"]
        heads.append(head)
        neurons.append(neuron)
    return ActivationMeans(tuple(heads), tuple(neurons))


def _joined_means(one: Mask, other: Mask) -> ActivationMeans | None:
    """For every unit that one of two masks removes, the mean from the mask that removes it."""
    if one.means is None or other.means is None:
        return None

    def join(part: slice, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        off, also_off = ~one.keep[part], ~other.keep[part]
        if not np.array_equal(first[off & also_off], second[off & also_off]):
            raise MaskError("Masks with different means for the same unit cannot be combined.")
        joined = second.copy()
        joined[off] = first[off]
        return joined

    space, layers = one.space, range(one.space.n_layers)
    return ActivationMeans(
        heads=tuple(join(space.head_slice(i), one.means.heads[i], other.means.heads[i]) for i in layers),
        neurons=tuple(join(space.neuron_slice(i), one.means.neurons[i], other.means.neurons[i]) for i in layers),
    )


@dataclass
class Gates:
    """Multipliers for every unit: 1 leaves it as it is, 0 removes it.

    Attributes
    ----------
    heads: per layer, a tensor (..., heads), or None for a layer that is left alone.
    neurons: per layer, a tensor (..., neurons), or None.
    means: what a unit at gate 0 gives; None for zero.

    Leading dimensions broadcast against (batch, tokens): a gate of shape (batch, tokens, units) gives every
    position its own, one of shape (n, 1, units) each n-th part of the rows, the first part first. Gates may
    require gradients.
    """

    heads: Sequence[Tensor | None]
    neurons: Sequence[Tensor | None]
    means: ActivationMeans | None = None

    @classmethod
    def ones(cls, model: LanguageModel, leading: tuple[int, ...] = (), means: ActivationMeans | None = None) -> Gates:
        """Gates of 1 that require gradients, with the given leading dimensions."""

        def leaf(module: nn.Module, width: int) -> Tensor:
            weight: Tensor = module.weight  # type: ignore[assignment]
            return torch.ones((*leading, width), dtype=torch.float32, device=weight.device, requires_grad=True)

        heads = [leaf(m, n) for m, n in zip(model.attention_outputs, model.heads_per_layer, strict=True)]
        neurons = [leaf(m, n) for m, n in zip(model.mlp_outputs, model.neurons_per_layer, strict=True)]
        return cls(heads, neurons, means)

    def leaves(self) -> list[Tensor]:
        """All gate tensors in the flat order of the units."""
        return [gate for gate in (*self.heads, *self.neurons) if gate is not None]


@contextmanager
def gated(model: LanguageModel, gates: Gates) -> Iterator[None]:
    """Multiply every unit by its gate while the context lasts; the model is restored on any exit.

    Contexts nest: the inner gates multiply what the outer ones left.
    """
    with ExitStack() as hooks:
        for layer, module in enumerate(model.attention_outputs):
            gate = gates.heads[layer]
            if gate is not None:
                mean = None if gates.means is None else gates.means.heads[layer]
                hooks.callback(module.register_forward_pre_hook(_gate_hook(gate, mean, model.head_dim)).remove)
        for layer, module in enumerate(model.mlp_outputs):
            gate = gates.neurons[layer]
            if gate is not None:
                mean = None if gates.means is None else gates.means.neurons[layer]
                hooks.callback(module.register_forward_pre_hook(_gate_hook(gate, mean, 1)).remove)
        yield


class Applicable(Protocol):
    """A mask of any kind: of units, or of single weights."""

    def applied(self, model: LanguageModel) -> AbstractContextManager[None]:
        """Remove from a live model, while the context lasts, what the mask removes."""
        ...


def masked(model: LanguageModel, mask: Applicable | None) -> AbstractContextManager[None]:
    """Remove from a live model, while the context lasts, what a mask removes; None removes nothing.

    Raises
    ------
    MaskError: the mask was made for another model.
    """
    return nullcontext() if mask is None else mask.applied(model)


@contextmanager
def masked_each(model: LanguageModel, masks: Sequence[Mask]) -> Iterator[None]:
    """Apply each of several masks to its equal part of the rows of every batch, the first mask to the first rows.

    Raises
    ------
    MaskError: a mask was made for another model, or the masks put different means in place of units.
    """
    for mask in masks:
        mask.check(model)
        if mask.means is not masks[0].means:
            raise MaskError("Masks with different means cannot be applied at once.")
    keep = np.stack([mask.keep for mask in masks])[:, None]  # (masks, 1, units)
    with gated(model, gates_of(masks[0].space, keep, masks[0].means)):
        yield


def gates_of(space: UnitSpace, values: np.ndarray, means: ActivationMeans | None = None) -> Gates:
    """Gates from one array (..., units), of bools or of numbers from 0 to 1; None for layers with gates of 1 alone."""

    def gate(part: np.ndarray) -> Tensor | None:
        return None if (part == 1).all() else torch.from_numpy(part.astype(np.float32))

    layers = range(space.n_layers)
    return Gates(
        heads=[gate(values[..., space.head_slice(layer)]) for layer in layers],
        neurons=[gate(values[..., space.neuron_slice(layer)]) for layer in layers],
        means=means,
    )


def _gate_hook(gate: Tensor, mean: np.ndarray | None, width: int) -> Any:
    """Scale the input of an output projection, unit by unit; ``width`` values belong to one unit."""
    constant = None if mean is None else torch.from_numpy(mean.reshape(-1))

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activation = args[0]
        scale = gate.to(activation.device)
        if width > 1:
            scale = scale.repeat_interleave(width, dim=-1)  # (..., heads) -> (..., heads * head_dim)
        # (batch, tokens, units), or (batch * tokens, units) in OPT's MLP, to what broadcasts against the gate
        parted = _parted(activation, scale) if scale.dim() == 3 else activation
        scaled = parted * scale  # in fp32, as the gates are: in bf16 a gate of 0.998 would be 1
        if constant is not None:
            scaled = scaled + constant.to(activation) * (1 - scale)
        return (scaled.reshape(activation.shape).to(activation.dtype), *args[1:])

    return hook


def _parted(activation: Tensor, scale: Tensor) -> Tensor:
    """Rows and columns of an activation arranged as those of a gate (parts or 1, tokens or 1, units)."""
    parts, columns, width = scale.shape
    return activation.reshape(parts, -1, width) if parts > 1 else activation.reshape(-1, columns, width)


def check_ablation(ablation: str) -> Ablation:
    """Validate the name of an ablation value."""
    if ablation not in ("zero", "mean"):
        raise SettingError(f"Unknown ablation '{ablation}'; choose zero or mean.")
    return ablation  # type: ignore[return-value]
