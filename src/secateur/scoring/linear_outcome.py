"""What a mask does, as a linear function of what it removes, learnt from measured masks beside a prior.

Gaps are close to linear in what is removed, where disparity, their root mean square, has a kink at zero: so gaps are
predicted, and disparity is made of them. The coefficients have the prior N(prior, tau^2) and are learnt from residuals
of equal variance: ridge regression towards the prior, its strength chosen by generalised cross-validation (Golub,
Heath and Wahba, 1979). Draws from the posterior tell how sure a prediction is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STRENGTHS = np.geomspace(1e-2, 1e4, 19)


@dataclass(frozen=True, eq=False)
class Linear:
    """One set of coefficients: outcomes = x inward + offset for x = 1 where an item is removed.

    Attributes
    ----------
    inward: (items, outcomes). offset: (outcomes,), the unpruned model's.
    """

    inward: Tensor
    offset: Tensor

    def hidden(self, removed: Tensor) -> Tensor:
        """The outcomes, (masks, outcomes), of masks (masks, items)."""
        return removed.to(self.inward) @ self.inward + self.offset


@dataclass(frozen=True, eq=False)
class Posterior:
    """Of the coefficients.

    Attributes
    ----------
    mean: (items, outcomes). root: (items, items), a root R of the covariance of one outcome with variance 1.
    deviation: (outcomes,), standard deviation of the residuals. offset: (outcomes,).
    """

    mean: np.ndarray
    root: np.ndarray
    deviation: np.ndarray
    offset: np.ndarray

    def draw(self, count: int, rng: np.random.Generator) -> list[Linear]:
        """Coefficients from the posterior."""
        return [self._linear(self.mean + self.root @ self._noise(rng)) for _ in range(count)]

    def _noise(self, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(rng.standard_normal(self.mean.shape) * self.deviation)

    def _linear(self, coefficients: np.ndarray) -> Linear:
        return Linear(torch.from_numpy(coefficients).float(), torch.from_numpy(self.offset).float())


def learn(
    removed: np.ndarray, outcomes: np.ndarray, offset: np.ndarray, prior: np.ndarray, weights: np.ndarray
) -> Posterior:
    """Learn the coefficients from measured masks.

    Parameters
    ----------
    removed: bool (masks, items). outcomes: (masks, outcomes). offset: (outcomes,), those of no mask.
    prior: (items, outcomes), what each item is expected to change.
    weights: (masks,), how much each counts.
    """
    root = np.sqrt(weights)[:, None]
    x = root * removed.astype(float)
    rest = root * (outcomes - offset - removed @ prior)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    projected = left.T @ rest  # (rank, outcomes)
    outside = (rest**2).sum() - (projected**2).sum()
    scores = []
    for strength in STRENGTHS:
        shrunk = values**2 / (values**2 + strength)
        error = outside + (((1 - shrunk)[:, None] * projected) ** 2).sum()
        scores.append(error / max(1e-9, len(x) - shrunk.sum()) ** 2)
    strength = float(STRENGTHS[int(np.argmin(scores))])
    shrunk = values**2 / (values**2 + strength)
    change = right.T @ ((values / (values**2 + strength))[:, None] * projected)
    missed = rest - left @ (shrunk[:, None] * projected)
    deviation = np.sqrt((missed**2).sum(axis=0) / max(1.0, len(x) - shrunk.sum()))
    # (X'X + strength I)^-1 = V diag(1 / (d^2 + strength)) V' + (I - V V') / strength
    inside = right.T @ np.diag((values**2 + strength) ** -0.5) @ right
    outside_root = (np.eye(x.shape[1]) - right.T @ right) / np.sqrt(strength)
    return Posterior(prior + change, inside + outside_root, deviation, offset)
