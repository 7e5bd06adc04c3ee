"""``random``: a random order of all units, the baseline that every other method has to beat."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from secateur.evaluation.evaluator import Evaluator
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.base import Ranking, Settings
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask, UnitSpace


class Random(Settings):
    """rank_u = an independent uniform draw from [0, 1) for every unit u.

    Attributes
    ----------
    seed: of the draws; equal seeds give equal orders for models with equal numbers of units. That of the study
        unless it is set (ours).

    Values: ``draw``, (units,). Prompts, text, mask and means do not matter.
    """

    seed: Annotated[int, Field(ge=0)] = 0

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Every supported model and every suite will do."""

    def work(self, fit: Evaluator) -> int:
        """Steps that :meth:`score` reports."""
        return 1

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> Ranking:
        """Draw an order of all units."""
        draw = np.random.default_rng(self.seed).random(len(UnitSpace.of(fit.model)))
        advance(1)
        return Ranking(draw, {"draw": draw})
