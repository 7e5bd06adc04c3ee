"""What a mask does, as a linear function of what it removes, learnt from measured masks beside a prior.

Gaps are close to linear in what is removed, where disparity, their root mean square, has a kink at zero: so gaps are
predicted, and disparity is made of them. The coefficients have the prior N(prior, tau^2) and are learnt from residuals
of equal variance: ridge regression towards the prior, its strength chosen by leaving out one mask at a time. Draws
from the posterior tell how sure a prediction is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Relative to the mean square of the singular values: from all but the data's word to next to none of it.
STRENGTHS = np.geomspace(1e-3, 1e2, 16)


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
    mean: (items, outcomes). offset: (outcomes,), the unpruned model's.
    root: (items, items), a root R of the covariance R R' of one outcome's coefficients, for residuals of variance 1.
    residuals: (masks, outcomes), scaled so that residuals' residuals is the covariance of one residual.
    """

    mean: np.ndarray
    offset: np.ndarray
    root: np.ndarray
    residuals: np.ndarray

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of a residual, (outcomes,)."""
        return np.asarray(np.sqrt((self.residuals**2).sum(axis=0)))

    def of(self, removed: np.ndarray) -> np.ndarray:
        """The outcomes to be expected, (masks, outcomes), of masks (masks, items)."""
        return np.asarray(self.offset + removed @ self.mean)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Coefficients from the posterior, (items, outcomes). What is unknown of the outcomes goes together as their
        residuals do: an item that does more than was expected does so in many scenarios."""
        together = rng.standard_normal((len(self.mean), len(self.residuals))) @ self.residuals  # (items, outcomes)
        return np.asarray(self.mean + self.root @ together)


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
    scale = max(float((values**2).mean()), 1e-12)
    fits = []
    for strength in scale * STRENGTHS:
        shrunk = values**2 / (values**2 + strength)
        missed = rest - left @ (shrunk[:, None] * projected)
        free = 1 - (left**2) @ shrunk  # (masks,), what a mask's own outcome leaves of its residual
        fits.append((float(((missed / free[:, None]) ** 2).sum()), strength, missed, free))
    _, strength, missed, free = min(fits, key=lambda fit: fit[0])
    change = right.T @ ((values / (values**2 + strength))[:, None] * projected)
    # (X'X + strength I)^-1 = V diag(1 / (d^2 + strength)) V' + (I - V V') / strength
    inside = right.T @ np.diag((values**2 + strength) ** -0.5) @ right
    outside = (np.eye(x.shape[1]) - right.T @ right) / np.sqrt(strength)
    return Posterior(prior + change, offset, inside + outside, missed / np.sqrt(max(1e-12, float(weights @ free))))


def joined(coefficients: list[np.ndarray], offsets: list[np.ndarray]) -> Linear:
    """Several sets of coefficients, each (items, some outcomes), as one with all outcomes side by side."""
    inward, offset = np.concatenate(coefficients, axis=1), np.concatenate(offsets)
    return Linear(torch.from_numpy(inward).float(), torch.from_numpy(offset).float())
