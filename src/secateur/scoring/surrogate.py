"""Small networks that predict what a mask does from its 0/1 vector, so that a search need not ask the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

WIDTH = 64
EPOCHS = 400
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
HELD_OUT = 0.2


@dataclass(frozen=True)
class Quality:
    """How well a surrogate predicts masks that it was not trained on.

    Attributes
    ----------
    r2: 1 - the mean squared error over the variance; at most 1, below 0 where the mean would do better.
    spearman: rank correlation of prediction and measurement.
    masks: how many masks that is.
    """

    r2: float = float("nan")
    spearman: float = float("nan")
    masks: int = 0


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A network with one hidden layer, y = w2 . relu(W1 x + b1) + b2, for x = 1 where a unit is removed.

    One hidden layer makes a flip of one unit cheap: it adds one row of W1 to the hidden layer's input.

    Attributes
    ----------
    inward: (units, width) W1. offset: (width,) b1. outward: (width,) w2. base: b2.
    quality: of such a network on masks that were held out from its training.
    """

    inward: Tensor
    offset: Tensor
    outward: Tensor
    base: float
    quality: Quality = Quality()

    @property
    def units(self) -> int:
        return int(self.inward.shape[0])

    def hidden(self, removed: Tensor) -> Tensor:
        """The hidden layer's input, (masks, width), for masks (masks, units), 1 where a unit is removed."""
        return removed.to(self.inward) @ self.inward + self.offset

    def read(self, hidden: Tensor) -> Tensor:
        """Predictions, (masks,), from :meth:`hidden`."""
        return hidden.relu() @ self.outward + self.base

    def predict(self, removed: Tensor) -> Tensor:
        """Predictions, (masks,), for masks (masks, units)."""
        return self.read(self.hidden(removed))


def train(
    removed: np.ndarray, measured: np.ndarray, seed: int = 0, width: int = WIDTH, epochs: int = EPOCHS
) -> Surrogate:
    """Fit a surrogate to measured masks; one fitted without a fifth of them, drawn by the seed, tells its quality.

    Parameters
    ----------
    removed: (masks, units), 1 or True where a unit is removed.
    measured: (masks,), what is to be predicted.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(measured)))
    held = max(1, round(HELD_OUT * len(order)))
    inside, outside = order[held:], order[:held]
    x, y = torch.from_numpy(removed.astype(np.float32)), torch.from_numpy(measured.astype(np.float32))
    judged = _fit(x[inside], y[inside], seed, width, epochs)
    quality = _quality(judged.predict(x[outside]).numpy(), y[outside].numpy())
    return replace(_fit(x, y, seed, width, epochs), quality=quality)


@torch.enable_grad()
def _fit(x: Tensor, y: Tensor, seed: int, width: int, epochs: int) -> Surrogate:
    """A network trained on masks x, (masks, units), and their figures y, (masks,)."""
    centre, scale = y.mean(), y.std().clamp_min(1e-6)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(x.shape[1], width, generator=generator) / x.shape[1] ** 0.5
    last = torch.randn(width, generator=generator) / width**0.5
    parameters = [nn.Parameter(p) for p in (first, torch.zeros(width), last, torch.zeros(()))]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    target = (y - centre) / scale
    for _ in range(epochs):
        optimiser.zero_grad()
        predicted = (x @ parameters[0] + parameters[1]).relu() @ parameters[2] + parameters[3]
        (predicted - target).square().mean().backward()
        optimiser.step()
    inward, offset, outward, base = (p.detach() for p in parameters)
    return Surrogate(inward, offset, outward * scale, float(base * scale + centre))


def _quality(predicted: np.ndarray, measured: np.ndarray) -> Quality:
    spread = float(((measured - measured.mean()) ** 2).mean())
    error = float(((predicted - measured) ** 2).mean())
    known = len(measured) > 2 and np.ptp(measured) > 0 and np.ptp(predicted) > 0
    rank = float(spearmanr(predicted, measured).statistic) if known else float("nan")
    return Quality(1 - error / spread if spread > 0 else float("nan"), rank, len(measured))


def draw_states(units: int, bounds: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """Random states, bool (count, units): how many units are removed, even within the bounds, then which."""
    least, most = bounds
    sizes = torch.randint(least, most + 1, (count, 1), generator=generator)
    order = torch.rand(count, units, generator=generator).argsort(dim=1).argsort(dim=1)
    return order < sizes
