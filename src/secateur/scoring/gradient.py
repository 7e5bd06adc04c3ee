"""``gradient``: how strongly bias, or loss, responds to a unit's gate.

Michel, Levy and Neubig (2019), "Are Sixteen Heads Really Better than One?", rank heads by the expected
|dL/dm| at m = 1, m a multiplier of the head's output, and remove the least sensitive first; Molchanov et al.
(2017) do so for channels. Turned to bias, the same quantity of the disparity names the units to remove first.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.utility import NeutralText, window_losses
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.attribution import disparity_gradient, disparity_weights
from secateur.scoring.base import Ranking, Settings
from secateur.suites import Suite
from secateur.units import ActivationMeans, Gates, Mask, UnitSpace, gated, masked


class Gradient(Settings):
    """Absolute gradient of a unit's gate m at m = 1, for heads and neurons alike.

    Attributes
    ----------
    of: "bias" (default; ours) ranks by |dD/dm|, D the disparity of the fit prompts, the
        highest removed first; the sign is lost, so units that hold bias back are removed with those that
        carry it. "loss" (Michel et al.) ranks by the sum over windows of neutral text of
        |dL_w/dm|, L_w the window's summed loss, divided by all scored tokens, the lowest removed first: it
        knows nothing of bias.
    normalise: divide the values of each layer, heads and neurons apart, by their L2 norm, as Michel et al. and
        Molchanov et al. do; off by default (ours), since units of all layers compete for the same effect.

    Values: ``sensitivity``, (units,), at least 0, in SMD ("bias") or nats per token ("loss"). A unit that a mask
    removes has sensitivity 0.
    """

    of: Literal["bias", "loss"] = "bias"
    normalise: bool = False

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Every supported model and every suite will do."""

    def work(self, fit: Evaluator) -> int:
        """Steps that :meth:`score` reports."""
        return 2 * len(fit.prompts) if self.of == "bias" else len(_text(fit).windows)

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> Ranking:
        """Score all units of the model as it is under ``mask``.

        Parameters
        ----------
        means: for mean ablation: what a gate of 0 gives instead of zero.
        """
        if self.of == "bias":
            weights = fit.prompts.spread(disparity_weights(fit.evaluate(mask, advance).table))
            with masked(fit.model, mask):
                sensitivity = np.abs(disparity_gradient(fit, weights, means, advance).value)
        else:
            with masked(fit.model, mask):
                sensitivity = loss_sensitivity(fit.model, _text(fit), means, advance)
        if self.normalise:
            sensitivity = by_layer(sensitivity, UnitSpace.of(fit.model))
        return Ranking(sensitivity if self.of == "bias" else -sensitivity, {"sensitivity": sensitivity})


def loss_sensitivity(
    model: LanguageModel,
    text: NeutralText,
    means: ActivationMeans | None = None,
    advance: Advance = lambda _: None,
) -> np.ndarray:
    """Sum over windows of |dL_w/dm| per scored token, (units,), from one backward pass per batch of windows."""
    total: Tensor | None = None
    for numbers in text.batches():
        windows = [text.windows[n] for n in numbers]
        gates = Gates.ones(model, (len(windows), 1), means)  # a gate per window, at all of its positions
        with gated(model, gates), model.arithmetic():
            window_losses(model, windows).sum().backward()  # type: ignore[no-untyped-call]
        gradients = [gate.grad[:, 0].abs().sum(dim=0).cpu() for gate in gates.leaves() if gate.grad is not None]
        joined = torch.cat(gradients)  # (units,)
        total = joined if total is None else total + joined
        model.usage.backward += sum(len(window.tokens) for window in windows)
        advance(len(numbers))
    assert total is not None, "a neutral text has at least one window"
    return np.asarray(total.numpy().astype(float) / text.scored.sum())


def by_layer(values: np.ndarray, space: UnitSpace) -> np.ndarray:
    """Values (units,) divided by the L2 norm of those of the same layer and kind."""
    scaled = values.copy()
    for layer in range(space.n_layers):
        for part in (space.head_slice(layer), space.neuron_slice(layer)):
            scaled[part] /= max(float(np.linalg.norm(values[part])), np.finfo(float).tiny)
    return scaled


def _text(fit: Evaluator) -> NeutralText:
    assert fit.text is not None, "the gradient of the loss needs neutral text"
    return fit.text
