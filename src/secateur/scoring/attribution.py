"""``attribution``: the effect of switching every unit off, from one backward pass per batch.

Give every unit a gate m_u = 1. To first order, switching unit u off changes the disparity D by -dD/dm_u.
It changes the loss L on neutral text by -dL/dm_u + 1/2 d2L/dm_u2 to second order, the curvature being
estimated by the empirical Fisher information (the squared gradient, summed over positions). One forward and backward
pass over the prompts, and one over the text, give both for all heads and neurons at once.

The gradient of a gate as a measure of importance goes back to Molchanov et al. (2017) and, for heads, Michel
et al. (2019), the Fisher term to Theis et al. (2018); here the sign is kept, and bias is weighed against loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import batch_y
from secateur.measures.disparity import Table
from secateur.measures.utility import NeutralText, window_losses
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.base import Settings
from secateur.suites import Suite
from secateur.units import ActivationMeans, Gates, Mask, gated, masked

# Part of a predicted fall of the loss that is counted on: about half of what one text promises is
# there on another.
CREDIT = 0.5
# Standard errors that a unit's effect must keep to spare: tens of thousands of units compete, and
# the largest effects of the fit markers are in part luck.
CONFIDENCE = 1.0


@dataclass(frozen=True, eq=False)
class Effects:
    """What switching each unit off is expected to do.

    Attributes
    ----------
    effect: (units,), change of the disparity D; negative where bias falls.
    error: (units,), standard error of the effect over markers.
    cost: (units,), positive; increase of the loss to be expected, nats per token.
    damage: (units,), positive; expected KL to the unpruned model, nats per token.
    """

    effect: np.ndarray
    error: np.ndarray
    cost: np.ndarray
    damage: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """Fall of the disparity that can be counted on for other markers, (units,)."""
        return np.asarray(-self.effect - CONFIDENCE * self.error)

    @property
    def rank(self) -> np.ndarray:
        """Gain per cost, (units,): the higher, the sooner a unit is removed."""
        return np.asarray(self.gain / self.cost)

    @property
    def values(self) -> dict[str, np.ndarray]:
        return {"effect": self.effect, "error": self.error, "cost": self.cost, "damage": self.damage}


@dataclass(frozen=True, eq=False)
class LossChange:
    """What switching each unit off is predicted to do to the loss, nats per token, both (units,).

    Attributes
    ----------
    slope: first-order change; negative where the loss falls.
    curvature: second-order change, at least 0; also the expected KL to the unpruned model.
    """

    slope: np.ndarray
    curvature: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """The increase to be expected on other text, at least 0."""
        slope = np.where(self.slope < 0, CREDIT * self.slope, self.slope)
        return np.asarray(np.maximum(0.0, slope + self.curvature))


class Attribution(Settings):
    """First-order bias effect over second-order loss cost.

    Attributes
    ----------
    unit_price: added to every unit's cost, in nats per token. It keeps thousands of units with
        next to no effect and next to no cost from crowding out the few that matter; the default
        is 1 % of the loss that a perplexity increase of 2 % stands for.

    The loss is looked at by the first call, on the unpruned model, and what was seen is kept.
    """

    unit_price: Annotated[float, Field(gt=0)] = 2e-4
    _loss: LossChange | None = PrivateAttr(default=None)

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Every supported model and every suite will do."""

    def work(self, fit: Evaluator) -> int:
        """Steps that the next call of :meth:`score` reports."""
        text = 0 if self._loss is not None or fit.text is None else len(fit.text.windows)
        return 2 * len(fit.prompts) + text

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> Effects:
        """Score all units of the model as it is under ``mask``, from prompts and text of ``fit``.

        Parameters
        ----------
        means: for mean ablation: what a removed unit gives instead of zero.
        """
        if self._loss is None:
            assert fit.text is not None, "attribution needs neutral text"
            self._loss = loss_change(fit.model, fit.text, means, advance)
        table = fit.evaluate(mask, advance).table
        weights = fit.prompts.spread(disparity_weights(table))
        with masked(fit.model, mask):
            gradient = disparity_gradient(fit, weights, means, advance)
        cost, damage = self._loss.cost + self.unit_price, self._loss.curvature + self.unit_price
        return Effects(-gradient.value, gradient.error, cost, damage)


def disparity(table: Table) -> float:
    """D, the root mean square over scenarios and pairs of groups of gap / spread."""
    return float(np.sqrt(np.mean([(gap / spread) ** 2 for _, _, gap, spread in pairs_of_groups(table)])))


def disparity_weights(table: Table) -> np.ndarray:
    """dD/dy, (scenarios, markers), of :func:`disparity`.

    A unit that scales the answers of all groups alike moves gap and spread together and leaves
    D as it is, so the derivative of the spread belongs to it.
    """
    weights = np.zeros_like(table.y)
    pairs = list(pairs_of_groups(table))
    square = sum((gap / spread) ** 2 for _, _, gap, spread in pairs)  # (scenarios,)
    for in_a, in_b, gap, spread in pairs:
        for inside, sign in ((in_a, 1.0), (in_b, -1.0)):
            weights[:, inside] += sign * (2 * gap / inside.sum() / spread**2)[:, None]
    spread = pairs[0][-1]
    for group in range(table.n_groups):
        inside = table.groups == group
        deviation = table.y[:, inside] - table.y[:, inside].mean(axis=1, keepdims=True)
        weights[:, inside] -= (2 * square / spread**2 / table.n_groups / (inside.sum() - 1))[:, None] * deviation
    return weights / (2 * max(disparity(table), 1e-12) * len(pairs) * len(table.y))


def pairs_of_groups(table: Table) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """For every pair of groups: members of each (markers,), gap (scenarios,), and the spread within groups.

    The spread is one for all pairs, the root of the groups' mean variance, (scenarios,): that of two groups alone
    is hardly known from ten markers each.
    """
    members = [table.groups == group for group in range(table.n_groups)]
    variances = [table.y[:, inside].var(axis=1, ddof=1) for inside in members]
    spread = np.maximum(np.sqrt(np.mean(variances, axis=0)), 1e-9)
    for a, b in table.pairs:
        gap = table.y[:, members[a]].mean(axis=1) - table.y[:, members[b]].mean(axis=1)
        yield members[a], members[b], gap, spread


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
        collectors = [partial(_add_by_marker, part, marker) for part in parts]
        with _collecting(leaves, collectors), gated(model, gates), model.arithmetic():
            y = batch_y(model, fit.prompts.suite, batch)
            (y * torch.from_numpy(weights[start:stop]).to(y)).sum().backward()  # type: ignore[no-untyped-call]
        model.usage.backward += batch.tokens
        advance(stop - start)
        start = stop
    by_marker = torch.cat(parts, dim=1).numpy().astype(float)  # (markers + 1, units)
    return DisparityGradient(by_marker.sum(axis=0), _standard_error(by_marker[:-1], fit.prompts.groups))


@contextmanager
def _collecting(leaves: list[Tensor], collectors: Sequence[Callable[[Tensor], None]]) -> Iterator[None]:
    """Hand each gate's gradient, (positions, units), to its collector and free it: one layer is held at a time."""

    def hook(collect: Callable[[Tensor], None], gate: Tensor) -> None:
        if gate.grad is not None:
            collect(gate.grad.flatten(0, 1))
            gate.grad = None

    with ExitStack() as hooks:
        for leaf, collect in zip(leaves, collectors, strict=True):
            hooks.callback(leaf.register_post_accumulate_grad_hook(partial(hook, collect)).remove)
        yield


def _add_by_marker(part: Tensor, marker: Tensor, gradient: Tensor) -> None:
    """Add gradients, (positions, units), to the rows of their markers, (markers + 1, units)."""
    part.index_add_(0, marker, gradient.cpu())


def _standard_error(by_marker: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Standard error of the sum over markers, (units,), from parts (markers, units)."""
    variance = np.zeros(by_marker.shape[1])
    for group in np.unique(groups):
        inside = by_marker[groups == group]
        variance += len(inside) * inside.var(axis=0, ddof=1)
    return np.sqrt(variance)


def loss_change(
    model: LanguageModel,
    text: NeutralText,
    means: ActivationMeans | None = None,
    advance: Advance = lambda _: None,
) -> LossChange:
    """Slope and curvature of the loss in every gate, from one backward pass per batch of windows.

    A gate at every position gives a gradient at every position: their sum is the slope, half the sum
    of their squares the curvature. Squares of sums over a window would count dependence between
    positions, too, but there are few windows, and rare neurons would look free.
    """
    sums: list[Tensor] = []  # per gate tensor: (2, units of the layer), gradients and their squares
    for numbers in text.batches():
        windows = [text.windows[n] for n in numbers]
        gates = Gates.ones(model, (len(windows), len(windows[0].tokens)), means)
        leaves = gates.leaves()
        sums = sums or [torch.zeros(2, leaf.shape[-1]) for leaf in leaves]
        collectors = [partial(_add_squares, part) for part in sums]
        with _collecting(leaves, collectors), gated(model, gates), model.arithmetic():
            window_losses(model, windows).sum().backward()  # type: ignore[no-untyped-call]
        model.usage.backward += sum(len(window.tokens) for window in windows)
        advance(len(numbers))
    total = torch.cat(sums, dim=1).numpy().astype(float) / text.scored.sum()  # (2, units)
    return LossChange(slope=-total[0], curvature=total[1] / 2)


def _add_squares(part: Tensor, gradient: Tensor) -> None:
    """Add gradients, (positions, units), and their squares, summed over positions, to a part (2, units)."""
    part.add_(torch.stack([gradient.sum(dim=0), gradient.square().sum(dim=0)]).cpu())
