"""Forward passes of the same inputs under one mask after another, each begun where the masks begin to differ."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from secateur.models import LanguageModel
from secateur.models.restart import Entries, Forward, recorded, restarted
from secateur.units import Mask
from secateur.weights import AnyMask


@dataclass(eq=False)
class Walk:
    """Remembers, for every batch of inputs, what entered the layers under the mask before.

    A walk that changes one unit at a time runs half of the blocks on average; unrelated masks run all.

    Attributes
    ----------
    model: the model.
    layers: the layers whose entries are kept, ascending from 0; fewer take less memory and restart earlier.
    """

    model: LanguageModel
    layers: tuple[int, ...]
    _entries: dict[Hashable, Entries] = field(default_factory=dict)
    _masks: dict[Hashable, Mask | None] = field(default_factory=dict)

    @classmethod
    def within(cls, model: LanguageModel, tokens: int, limit: int) -> Walk | None:
        """A walk over inputs of so many tokens in all that keeps at most ``limit`` bytes; None where it cannot."""
        layers, width = len(model.blocks), model.model.config.get_text_config().hidden_size
        per_layer = tokens * width * model.dtype.itemsize
        kept = min(layers, limit // max(1, per_layer))
        if kept < 2:  # the entry of the first layer alone saves nothing
            return None
        return cls(model, tuple(sorted({number * layers // kept for number in range(kept)})))

    def run(self, batch: Hashable, mask: AnyMask | None, forward: Forward) -> Tensor:
        """One pass of a batch, always of the same inputs, of the model with ``mask`` applied.

        Parameters
        ----------
        batch: whatever stands for the inputs.
        """
        if mask is not None and not isinstance(mask, Mask):
            return forward()
        # Taken out first: a pass that fails halfway leaves states of two masks.
        entries = self._entries.pop(batch, Entries())
        with ExitStack() as changes:
            if entries.states:
                layer = first_difference(self._masks[batch], mask, len(self.model.blocks))
                changes.enter_context(restarted(self.model, entries.before(layer), entries))
            changes.enter_context(recorded(self.model, entries, self.layers))
            result = forward()
        self._entries[batch], self._masks[batch] = entries, mask
        return result


def walking_order(masks: Sequence[AnyMask]) -> list[int]:
    """An order, as positions, in which masks that do the same in the first layers follow one another."""

    def layers(mask: AnyMask) -> bytes:
        if not isinstance(mask, Mask):
            return b""
        space, keep = mask.space, mask.keep
        return b"".join(
            np.packbits(keep[part]).tobytes()
            for layer in range(space.n_layers)
            for part in (space.head_slice(layer), space.neuron_slice(layer))
        )

    keys = [layers(mask) for mask in masks]
    return sorted(range(len(masks)), key=keys.__getitem__)


def first_difference(one: Mask | None, other: Mask | None, layers: int) -> int:
    """The first layer in which two masks do not do the same; the last layer where they never differ."""
    given = one if one is not None else other
    if given is None:
        return layers - 1
    if one is not None and other is not None and one.means is not other.means:
        return 0
    space, everything = given.space, np.ones(len(given.space), dtype=bool)
    differ = (everything if one is None else one.keep) != (everything if other is None else other.keep)
    for layer in range(layers):
        if differ[space.head_slice(layer)].any() or differ[space.neuron_slice(layer)].any():
            return layer
    return layers - 1
