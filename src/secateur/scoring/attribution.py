"""``attribution``: the effect of switching every unit off, from one backward pass per batch.

Give every unit a gate m_u = 1. To first order, switching unit u off changes the disparity D by -dD/dm_u.
It changes the loss L on neutral text by -dL/dm_u + 1/2 d2L/dm_u2 to second order, the curvature being
estimated by the empirical Fisher information (the mean squared gradient). One forward and backward
pass over the prompts, and one over the text, give both for all heads and neurons at once.

The gradient of a gate as a measure of importance goes back to Molchanov et al. (2017) and, for heads, Michel
et al. (2019), the Fisher term to Theis et al. (2018); here the sign is kept, and bias is weighed against loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import batch_y
from secateur.measures.disparity import Table
from secateur.measures.utility import NeutralText, window_losses
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.base import Scores
from secateur.units import ActivationMeans, Gates, Mask, gated, masked


@dataclass(eq=False)
class Attribution:
    """First-order bias effect over second-order loss cost.

    Attributes
    ----------
    unit_price: added to every unit's cost, in nats per token. It keeps thousands of units with
        next to no effect and next to no cost from crowding out the few that matter; the default
        is 1 % of the loss that a perplexity increase of 2 % stands for.

    The cost is estimated by the first call, on the unpruned model, and kept for later ones.
    """

    unit_price: float = 2e-4
    _cost: np.ndarray | None = field(default=None, init=False)

    def work(self, fit: Evaluator) -> int:
        """Steps that the next call of :meth:`score` reports."""
        text = 0 if self._cost is not None or fit.text is None else len(fit.text.windows)
        return 2 * len(fit.prompts) + text

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> Scores:
        """Score all units of the model as it is under ``mask``, from prompts and text of ``fit``.

        Parameters
        ----------
        means: for mean ablation: what a removed unit gives instead of zero.
        """
        if self._cost is None:
            assert fit.text is not None, "attribution needs neutral text"
            self._cost = loss_increase(fit.model, fit.text, means, advance)
        table = fit.evaluate(mask, advance).table
        weights = fit.prompts.spread(disparity_weights(table))
        with masked(fit.model, mask):
            gradient = disparity_gradient(fit, weights, means, advance)
        return Scores(-gradient.value, gradient.error, self._cost + self.unit_price)


def disparity(table: Table) -> float:
    """D, the root mean square SMD over scenarios and pairs of groups."""
    return float(np.sqrt(np.mean([smd**2 for _, _, _, smd, _ in _pairs(table)])))


def disparity_weights(table: Table) -> np.ndarray:
    """dD/dy, (scenarios, markers), of :func:`disparity`.

    A unit that scales the answers of all groups alike moves gap and spread together and leaves
    SMD as it is, so the derivative of the spread belongs to it.
    """
    weights = np.zeros_like(table.y)
    pairs = list(_pairs(table))
    for in_a, in_b, gap, smd, spread in pairs:
        for inside, sign in ((in_a, 1.0), (in_b, -1.0)):
            n = inside.sum()
            deviation = table.y[:, inside] - table.y[:, inside].mean(axis=1, keepdims=True)
            weights[:, inside] += sign * (2 * gap / n / spread**2)[:, None]
            weights[:, inside] -= (smd**2 / spread**2 / (n - 1))[:, None] * deviation
    return weights / (2 * max(disparity(table), 1e-12) * len(pairs) * len(table.y))


def _pairs(table: Table) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """For every pair of groups: members of each (markers,), and gap, SMD and spread (scenarios,)."""
    for a, b in table.pairs:
        in_a, in_b = table.groups == a, table.groups == b
        gap = table.y[:, in_a].mean(axis=1) - table.y[:, in_b].mean(axis=1)
        spread = np.sqrt((table.y[:, in_a].var(axis=1, ddof=1) + table.y[:, in_b].var(axis=1, ddof=1)) / 2)
        spread = np.maximum(spread, 1e-9)
        yield in_a, in_b, gap, gap / spread, spread


@dataclass(frozen=True, eq=False)
class DisparityGradient:
    """dD/dm of every unit and its standard error over markers, both (units,)."""

    value: np.ndarray
    error: np.ndarray


def disparity_gradient(
    fit: Evaluator, weights: np.ndarray, means: ActivationMeans | None = None, advance: Advance = lambda _: None
) -> DisparityGradient:
    """dD/dm of every unit for D = sum of ``weights`` (prompts,) times y, in one backward pass per batch.

    A position that belongs to one prompt alone influences no other prompt's y, so the gradient at
    these positions splits into one part per marker, at no extra cost. The spread of the parts
    within groups gives the standard error: a unit that matters through a few markers only, as neurons
    that recognise single words do, has a large one. Positions shared by prompts carry no marker.
    """
    model = fit.model
    column = {marker: i for i, marker in enumerate(fit.prompts.markers)}
    shared = len(column)
    parts: list[Tensor] = []  # per gate tensor: (markers + 1, units of the layer), the last row shared
    start = 0
    for batch in fit.batches:
        stop = start + len(batch.prompts)
        by_prompt = torch.tensor([*(column[prompt.marker] for prompt in batch.prompts), shared])
        marker = by_prompt[batch.owner.flatten()]  # (positions,); owner -1 picks the last entry
        gates = Gates.ones(model, tuple(batch.layout.input_ids.shape), means)
        leaves = gates.leaves()
        parts = parts or [torch.zeros(shared + 1, leaf.shape[-1]) for leaf in leaves]
        hooks = [
            leaf.register_post_accumulate_grad_hook(_collector(part, marker))
            for leaf, part in zip(leaves, parts, strict=True)
        ]
        with gated(model, gates):
            y = batch_y(model, fit.prompts.suite, batch)
            (y * torch.from_numpy(weights[start:stop]).to(y)).sum().backward()  # type: ignore[no-untyped-call]
        for hook in hooks:
            hook.remove()
        model.usage.backward += batch.tokens
        advance(stop - start)
        start = stop
    by_marker = torch.cat(parts, dim=1).numpy().astype(float)  # (markers + 1, units)
    return DisparityGradient(by_marker.sum(axis=0), _standard_error(by_marker[:-1], fit.prompts.groups))


def _collector(part: Tensor, marker: Tensor) -> Callable[[Tensor], None]:
    """Adds a gate's gradient to its markers' rows and frees it: one layer is held at a time."""

    def collect(gate: Tensor) -> None:
        if gate.grad is not None:
            part.index_add_(0, marker, gate.grad.flatten(0, 1).cpu())
            gate.grad = None

    return collect


def _standard_error(by_marker: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Standard error of the sum over markers, (units,), from parts (markers, units)."""
    variance = np.zeros(by_marker.shape[1])
    for group in np.unique(groups):
        inside = by_marker[groups == group]
        variance += len(inside) * inside.var(axis=0, ddof=1)
    return np.sqrt(variance)


def loss_gradients(
    model: LanguageModel,
    text: NeutralText,
    means: ActivationMeans | None = None,
    advance: Advance = lambda _: None,
) -> np.ndarray:
    """d(summed loss)/dm of every unit for every window of neutral text, (windows, units)."""
    gradients: dict[int, np.ndarray] = {}
    for numbers in text.batches():
        windows = [text.windows[n] for n in numbers]
        gates = Gates.ones(model, (len(windows), 1), means)
        with gated(model, gates):
            window_losses(model, windows).sum().backward()  # type: ignore[no-untyped-call]
        model.usage.backward += sum(len(window.tokens) for window in windows)
        parts = [gate.grad[:, 0].cpu() for gate in gates.leaves() if gate.grad is not None]
        gradients.update(zip(numbers, torch.cat(parts, dim=1).numpy(), strict=True))
        advance(len(numbers))
    return np.stack([gradients[n] for n in range(len(text.windows))])


def loss_increase(
    model: LanguageModel,
    text: NeutralText,
    means: ActivationMeans | None = None,
    advance: Advance = lambda _: None,
) -> np.ndarray:
    """Predicted increase of the loss when each unit is switched off, nats per token, (units,).

    max(0, -dL/dm) + 1/2 sum over windows of (dL_w/dm)^2 / tokens. A predicted gain is not credited:
    it would be fitted to the text at hand.
    """
    gradients = loss_gradients(model, text, means, advance)
    tokens = text.scored.sum()
    return np.asarray(np.maximum(0.0, -gradients.sum(axis=0)) / tokens + 0.5 * (gradients**2).sum(axis=0) / tokens)
