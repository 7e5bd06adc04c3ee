"""Weight masks: single weights of the linear layers, removed reversibly on a live model.

Units are masked by hooks on activations; a single weight has none of its own, so it is set to zero in
place, and put back when the context ends. In scope is every linear layer inside the decoder blocks;
embeddings and the output head are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.attenuation import ATTENUATION_FORMAT, Attenuation
from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.units import HEADER, Ablation, Mask, check_made_for

WEIGHT_MASK_FORMAT = "secateur-weight-mask-1"


def linear_layers(model: LanguageModel) -> dict[str, nn.Module]:
    """Every linear layer inside the decoder blocks, by its path in the causal LM."""
    return {
        f"{model.family.blocks}.{number}.{name}": module
        for number, block in enumerate(model.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def weight_matrix(module: nn.Module) -> Tensor:
    """A linear layer's weight as (out, in), a view: Conv1D stores its transpose."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


@dataclass(frozen=True, eq=False)
class WeightMask:
    """Which single weights of one model are removed.

    Attributes
    ----------
    shapes: (out, in) of every linear layer with a removed weight, by its path, in sorted order.
    bits: uint8 arrays, one bit per weight in row-major order of (out, in), set where it is removed;
        the last byte is filled up with zeros.
    fingerprint: of the model that the mask was made for.
    """

    action: ClassVar[str] = "removed"

    shapes: Mapping[str, tuple[int, int]]
    bits: Mapping[str, np.ndarray]
    fingerprint: str

    def __post_init__(self) -> None:
        if self.shapes.keys() != self.bits.keys():
            raise MaskError("A weight mask needs one shape and one array of bits for each of its modules.")
        for name, (rows, columns) in self.shapes.items():
            bits, size = self.bits[name], rows * columns
            if rows < 1 or columns < 1 or bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
                raise MaskError(f"The bits of the module '{name}' do not fit its shape ({rows}, {columns}).")
            if size % 8 and bits[-1] & (0xFF >> size % 8):
                raise MaskError(f"The bits of the module '{name}' go beyond its last weight.")
        # Equal masks are equal in form: sorted, and without modules that lose nothing.
        kept = [name for name in sorted(self.bits) if self.bits[name].any()]
        object.__setattr__(self, "shapes", {name: tuple(self.shapes[name]) for name in kept})
        object.__setattr__(self, "bits", {name: self.bits[name] for name in kept})

    @classmethod
    def removing(cls, model: LanguageModel, removed: Mapping[str, np.ndarray]) -> WeightMask:
        """The mask that removes weights given as bool arrays (out, in) by module; others are kept.

        Raises
        ------
        MaskError: the model has no such linear layer, or it has another shape.
        """
        arrays = {name: np.asarray(array, dtype=bool) for name, array in removed.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        _check_shapes(model, shapes)
        return cls(shapes, {name: np.packbits(array) for name, array in arrays.items()}, model.fingerprint)

    def of(self, name: str) -> np.ndarray:
        """The removed weights of one module with any, bool (out, in)."""
        rows, columns = self.shapes[name]
        return np.unpackbits(self.bits[name], count=rows * columns).view(bool).reshape(rows, columns)

    @property
    def ablation(self) -> Ablation:
        """A removed weight is always zero."""
        return "zero"

    @cached_property
    def counts(self) -> dict[str, int]:
        """Removed weights by module, modules without any left out."""
        return {name: int(np.count_nonzero(np.unpackbits(bits))) for name, bits in self.bits.items()}

    @property
    def heads_removed(self) -> int:
        """A mask of single weights removes no whole head."""
        return 0

    @property
    def neurons_removed(self) -> int:
        """A mask of single weights removes no whole neuron."""
        return 0

    @property
    def weights_removed(self) -> int:
        """Number of removed weights."""
        return sum(self.counts.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is removed."""
        return not self.bits

    @property
    def summary(self) -> str:
        """What is removed, in words."""
        return f"{self.weights_removed:,} weights"

    def __and__(self, other: WeightMask) -> WeightMask:
        """The mask that removes what either removes."""
        shared = self.shapes.keys() & other.shapes.keys()
        if self.fingerprint != other.fingerprint or any(self.shapes[name] != other.shapes[name] for name in shared):
            raise MaskError("Masks of different models cannot be combined.")
        both = {name: self.bits[name] | other.bits[name] for name in shared}
        return WeightMask({**self.shapes, **other.shapes}, {**self.bits, **other.bits, **both}, self.fingerprint)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask):
            return NotImplemented
        return self.fingerprint == other.fingerprint and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def key(self) -> bytes:
        """Bytes that identify the mask for one model: what a store of results is keyed by."""
        digest = hashlib.sha256()
        for name, bits in self.bits.items():
            digest.update(f"{name}{self.shapes[name]}".encode())
            digest.update(bits.tobytes())
        return b"weights" + digest.digest()

    def random_like(self, rng: np.random.Generator) -> WeightMask:
        """A mask that removes as many weights of every module, drawn at random."""
        drawn = {}
        for name, (rows, columns) in self.shapes.items():
            flat = np.zeros(rows * columns, dtype=bool)
            flat[rng.choice(rows * columns, size=self.counts[name], replace=False, shuffle=False)] = True
            drawn[name] = np.packbits(flat)
        return WeightMask(self.shapes, drawn, self.fingerprint)

    def check(self, model: LanguageModel) -> None:
        """Refuse a mask that was made for another model.

        Raises
        ------
        MaskError: the fingerprints differ, or the model lacks a module or has it in another shape.
        """
        check_made_for(model, self.fingerprint, None, "mask")
        _check_shapes(model, self.shapes)

    @contextmanager
    def applied(self, model: LanguageModel) -> Iterator[None]:
        """Set the removed weights to zero while the context lasts; they are restored on any exit.

        Only the removed values are held meanwhile. Contexts nest, also with those of unit masks.

        Raises
        ------
        MaskError: the mask was made for another model, or a weight is not in memory.
        """
        self.check(model)
        layers = linear_layers(model)
        if any(weight_matrix(layers[name]).is_meta for name in self.bits):
            raise MaskError("Weights that are offloaded cannot be masked; load the model without --device-map.")
        # The last is restored first, so modules that share one weight get it back as it was.
        with ExitStack() as restored:
            for name in self.bits:
                weight = weight_matrix(layers[name])
                off = self._off(name, weight.device)
                restored.callback(partial(self._restore, name, weight, weight[off]))
                weight.masked_fill_(off, 0)
            yield

    def _off(self, name: str, device: torch.device) -> Tensor:
        return torch.from_numpy(self.of(name)).to(device)

    def _restore(self, name: str, weight: Tensor, values: Tensor) -> None:
        weight[self._off(name, weight.device)] = values

    def save(self, path: str | Path) -> None:
        """Write the mask to one safetensors file, one bit per weight; equal masks give equal bytes."""
        header = {
            "format": WEIGHT_MASK_FORMAT,
            "fingerprint": self.fingerprint,
            "shapes": self.shapes,
            "digest": self.key.hex(),
        }
        # One entry only: safetensors writes several in an order that changes from run to run.
        save_file(dict(self.bits), str(path), metadata={HEADER: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> WeightMask:
        """Read a weight mask's file.

        Raises
        ------
        MaskError: the file is missing, damaged or not a weight mask.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                if not isinstance(header, dict) or header.get("format") != WEIGHT_MASK_FORMAT:
                    raise MaskError(f"'{path}' is not a Secateur weight mask.")
                bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shapes = {str(name): (int(rows), int(columns)) for name, (rows, columns) in header["shapes"].items()}
            mask = cls(shapes, bits, str(header["fingerprint"]))
            if mask.key.hex() != header["digest"]:
                raise ValueError("its content does not match its digest")
            return mask
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise MaskError(f"The weight mask '{path}' cannot be read: {error}.") from error


AnyMask = Mask | WeightMask | Attenuation


def load_mask(path: str | Path) -> AnyMask:
    """Read a mask of any kind, told apart by the format that its file names.

    Raises
    ------
    MaskError: the file is missing or is no mask.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = (file.metadata() or {}).get(HEADER, "")
    except (OSError, SafetensorError):
        header = ""  # the error is told by the one place that reads masks
    for name, kind in ((WEIGHT_MASK_FORMAT, WeightMask), (ATTENUATION_FORMAT, Attenuation)):
        if name in header:
            return kind.load(path)
    return Mask.load(path)


def _check_shapes(model: LanguageModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    layers = linear_layers(model)
    for name, shape in shapes.items():
        if name not in layers:
            raise MaskError(f"The model '{model.source}' has no linear layer '{name}' inside its blocks.")
        actual = tuple(weight_matrix(layers[name]).shape)
        if actual != tuple(shape):
            raise MaskError(f"The layer '{name}' of the model '{model.source}' has the shape {actual}, not {shape}.")
