"""A quick look at the damage that a mask does, before it is measured in full."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from secateur.measures.utility import NeutralText, hidden_states, kl_divergence
from secateur.models import LanguageModel
from secateur.units import Mask, masked


@dataclass(eq=False)
class Divergence:
    """KL(unpruned || masked) on the first batch of windows of a neutral text.

    Unlike the loss, KL needs few tokens to see a small damage: it compares whole distributions.
    """

    model: LanguageModel
    text: NeutralText
    _unpruned: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.text.first_batch()
        self._unpruned = hidden_states(self.model, self.text)

    def of(self, mask: Mask) -> float:
        """Nats per token."""
        with masked(self.model, mask):
            states = hidden_states(self.model, self.text)
        return kl_divergence(self.model, self._unpruned, states)
