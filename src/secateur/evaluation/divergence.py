"""A quick look at the damage that a mask does, before it is measured in full."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from secateur.errors import NumericalError
from secateur.measures.utility import NeutralText, hidden_states
from secateur.models import LanguageModel
from secateur.units import Mask, masked


@dataclass(eq=False)
class Divergence:
    """KL(unpruned || masked) on the beginnings of the first windows of a neutral text.

    Unlike the loss, KL needs few tokens to see a small damage: it compares whole distributions. The
    unpruned model's are kept, (tokens, vocabulary) in fp32.
    """

    model: LanguageModel
    text: NeutralText
    windows: int = 3
    length: int = 96
    _unpruned: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.text.first(self.windows, self.length)
        self._unpruned = self._log_probabilities()

    def of(self, mask: Mask) -> float:
        """Nats per token; infinite where the model gives no finite answers under the mask."""
        try:
            with masked(self.model, mask):
                after = self._log_probabilities()
        except NumericalError:
            return math.inf
        return float(kl_div(after, self._unpruned, reduction="batchmean", log_target=True))

    def _log_probabilities(self) -> Tensor:
        with torch.no_grad():
            return self.model.log_probabilities(torch.cat(hidden_states(self.model, self.text)))
