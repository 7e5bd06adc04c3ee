"""Measure masks: the disparity of a set of prompts and the likelihood of a neutral text."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from secateur.measures.answers import DEFAULT_BATCH_SIZE, Batch, measure_y, pack
from secateur.measures.disparity import Interval, Table
from secateur.measures.prompts import PromptSet
from secateur.measures.utility import (
    NeutralText,
    hidden_states,
    kl_divergence,
    negative_log_likelihood,
    perplexity,
    perplexity_increase,
)
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.units import masked
from secateur.weights import AnyMask


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a mask does to one part of the data.

    Attributes
    ----------
    table: y by scenario and marker.
    nll: (windows,) negative log-likelihood of the neutral text; None where it was not asked for.
    """

    table: Table
    nll: np.ndarray | None = None


@dataclass(eq=False)
class Evaluator:
    """Measures masks on one part of the data; a mask measured before costs nothing.

    Attributes
    ----------
    model: the model, unpruned.
    prompts: what is asked.
    text: neutral text for the utility, or None.
    batch_size: prompts in one forward pass.
    divergence: also measure KL(unpruned || masked) with the utility; keeps the unpruned model's
        hidden states, (tokens, hidden).
    """

    model: LanguageModel
    prompts: PromptSet
    text: NeutralText | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    divergence: bool = False
    _y: dict[bytes, np.ndarray] = field(init=False, default_factory=dict)
    _nll: dict[bytes, np.ndarray] = field(init=False, default_factory=dict)
    _kl: dict[bytes, float] = field(init=False, default_factory=dict)
    _unpruned: list[Tensor] = field(init=False, default_factory=list)

    @cached_property
    def batches(self) -> list[Batch]:
        """The prompts, packed for the model; packed when they are first needed."""
        return pack(self.model, self.prompts, self.batch_size)

    def work(self, utility: bool = False) -> int:
        """Steps that one evaluation reports to ``advance``."""
        return len(self.prompts) + (len(self.text.windows) if utility and self.text else 0)

    def evaluate(
        self, mask: AnyMask | None = None, advance: Advance = lambda _: None, *, utility: bool = False
    ) -> Measurement:
        """Measure a mask; None is the unpruned model.

        Parameters
        ----------
        utility: also the likelihood of the neutral text.
        """
        key = _key(mask)
        if utility and self.divergence and key and not self._unpruned:
            self.evaluate(None, utility=True)
        with masked(self.model, mask):
            if key not in self._y:
                self._y[key] = measure_y(self.model, self.prompts, self.batches, advance).numpy().astype(float)
            else:
                advance(len(self.prompts))
            if utility and key not in self._nll:
                states = hidden_states(self.model, self._text, advance)
                self._nll[key] = negative_log_likelihood(self.model, self._text, states)
                if self.divergence and key:
                    self._kl[key] = kl_divergence(self.model, self._unpruned, states)
                elif self.divergence:
                    self._unpruned, self._kl[key] = states, 0.0
            elif utility:
                advance(len(self._text.windows))
        table = Table(self.prompts.table(self._y[key]), self.prompts.groups)
        return Measurement(table, self._nll[key] if utility else None)

    def y(self, mask: AnyMask | None = None) -> np.ndarray:
        """y of every prompt under a mask, (prompts,)."""
        self.evaluate(mask)
        return self._y[_key(mask)]

    def perplexity(self, mask: AnyMask | None = None) -> float:
        """Perplexity of the neutral text under a mask."""
        return perplexity(self._likelihood(mask), self._text)

    def perplexity_increase(self, mask: AnyMask, seed: int = 0) -> Interval:
        """Relative increase over the unpruned model, with its interval over windows."""
        return perplexity_increase(self._likelihood(None), self._likelihood(mask), self._text, seed)

    def kl_divergence(self, mask: AnyMask) -> float:
        """KL(unpruned || masked) on the neutral text, nats per token; see ``divergence``."""
        self.evaluate(None, utility=True)
        self.evaluate(mask, utility=True)
        return self._kl[_key(mask)]

    @property
    def _text(self) -> NeutralText:
        assert self.text is not None, "this evaluator has no neutral text"
        return self.text

    def _likelihood(self, mask: AnyMask | None) -> np.ndarray:
        nll = self.evaluate(mask, utility=True).nll
        assert nll is not None
        return nll


def _key(mask: AnyMask | None) -> bytes:
    return b"" if mask is None or mask.is_empty else mask.key
