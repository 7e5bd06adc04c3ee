"""What every scorer gives, and the interface that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from secateur.evaluation.evaluator import Evaluator
from secateur.progress import Advance
from secateur.units import ActivationMeans, Mask

# Standard errors that a unit's effect must keep to spare: tens of thousands of units compete, and
# the largest effects of the fit markers are in part luck.
CONFIDENCE = 1.0


@dataclass(frozen=True, eq=False)
class Scores:
    """What switching each unit off is expected to do.

    Attributes
    ----------
    effect: (units,), change of the disparity D; negative where bias falls.
    error: (units,), standard error of the effect over markers; zero where a scorer has none.
    cost: (units,), positive; what removing the unit costs in utility.
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


class Scorer(Protocol):
    """Scores every unit of a model from the fit part of the data."""

    def score(self, fit: Evaluator, mask: Mask | None, means: ActivationMeans | None, advance: Advance) -> Scores:
        """Score all units of the model as it is under ``mask``."""
        ...

    def work(self, fit: Evaluator) -> int:
        """Steps that one call reports to ``advance``."""
        ...
