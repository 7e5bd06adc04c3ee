"""``PercentDifference``: what is at the top under the minority's prompts and not under the majority's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from secateur.errors import SettingError
from secateur.models import LanguageModel
from secateur.scoring.base import Settings
from secateur.scoring.wanda_difference import MAJORITY, MINORITY, WandaDifference, WandaScores
from secateur.search.base import Problem, Proposals, Selection
from secateur.units import UnitSpace
from secateur.weights import WeightMask, linear_layers, weight_matrix

# Published for neurons: (40, 35). The earlier prototype, for weights: (15, 15). The smaller ones are ours.
GRID = ((0.3, 0.3), (1.0, 1.0), (5.0, 5.0), (15.0, 15.0), (40.0, 35.0))
PUBLISHED = {"neuron": (40.0, 35.0), "weight": (15.0, 15.0)}
PATIENCE = 2
NO_UNITS = np.zeros(0, dtype=int)

Percent = Annotated[float | None, Field(ge=0, le=100)]


class PercentDifference(Settings):
    """Prune the top p % under the minority's prompts, except the top q % under the majority's.

    Attributes
    ----------
    p, q: percentages, to be set together. Published (Ma et al., FAccT 2025): p = 40, q = 35 for neurons; an earlier
        prototype had p = q = 15 for weights. The two sets differ, so p = q still leaves what is in
        the one and not in the other. Default: a small grid from few to many removed; after two
        proposals in a row that break the utility limit only the published pairs are still proposed.

    Weights are ranked within their output row, which is Wanda's comparison group. Ranking neurons within
    their layer, rounding the size of a top set down, and giving ties to the lower position are our choices.
    Where the scorer keeps scenarios apart, what is taken is in the difference under every one of them.
    """

    p: Percent = None
    q: Percent = None

    def model_post_init(self, context: object) -> None:
        if (self.p is None) != (self.q is None):
            raise SettingError("p and q belong together: set both, or neither for a small grid.")

    def check(self, model: LanguageModel, scorer: WandaDifference, ablation: str) -> None:
        """Refuse mean ablation of single weights, and a top so small that it is empty.

        Raises
        ------
        SettingError: says to use zero ablation, or names the least p.
        """
        if scorer.granularity == "weight" and ablation == "mean":
            raise SettingError("single weights have no mean to stand in for them; use --ablation zero.")
        inputs = [weight_matrix(layer).shape[1] for layer in linear_layers(model).values()]
        ranked = model.neurons_per_layer if scorer.granularity == "neuron" else inputs
        if self.p is not None and not any(_share(count, self.p) for count in ranked):
            raise SettingError(
                f"p = {self.p:g} % of {max(ranked):,} is less than one {scorer.granularity}; set p to "
                f"{math.ceil(1e4 / max(ranked)) / 100:g} or more."
            )

    def proposals(self, problem: Problem, scorer: WandaDifference) -> Proposals:
        """One proposal for every p and q that remove anything."""
        scores: WandaScores = problem.score(scorer)
        over = 0
        for p, q in GRID if self.p is None or self.q is None else ((self.p, self.q),):
            if over >= PATIENCE and (p, q) != PUBLISHED[scores.granularity]:
                continue
            selection = _selection(problem.model, scores, p, q)
            if selection is None:
                continue
            outcome = yield selection
            over = 0 if outcome.within_limit else over + 1


def _selection(model: LanguageModel, scores: WandaScores, p: float, q: float) -> Selection | None:
    knobs = {"p": p, "q": q}
    if scores.granularity == "weight":
        mask = weight_difference(model, scores, p, q)
        return (
            None if mask.is_empty else Selection("weights", NO_UNITS, {**knobs, "weights": mask.weights_removed}, mask)
        )
    removed = neuron_difference(UnitSpace.of(model), scores, p, q)
    return Selection("neurons", removed, knobs) if len(removed) else None


def neuron_difference(space: UnitSpace, scores: WandaScores, p: float, q: float) -> np.ndarray:
    """Flat positions of the neurons in the difference, layer by layer, ascending."""
    removed = []
    for layer in range(space.n_layers):
        part = space.neuron_slice(layer)
        by_group = torch.from_numpy(scores.neurons[:, :, part.start - space.n_heads : part.stop - space.n_heads])
        off = difference(zip(by_group[MINORITY], by_group[MAJORITY], strict=True), p, q)
        removed.append(part.start + np.flatnonzero(off.numpy()))
    return np.concatenate(removed)


@torch.no_grad()
def weight_difference(model: LanguageModel, scores: WandaScores, p: float, q: float) -> WeightMask:
    """The weights in the difference, output row by output row."""
    removed = {}
    for name, module in linear_layers(model).items():
        magnitude = weight_matrix(module).abs().float()
        norms = torch.from_numpy(scores.norms[name]).to(magnitude.device)
        by_scenario = (
            (magnitude * norms[MINORITY, number], magnitude * norms[MAJORITY, number])
            for number in range(scores.scenarios)
        )
        removed[name] = difference(by_scenario, p, q).cpu().numpy()
    return WeightMask.removing(model, removed)


def difference(by_scenario: Iterator[tuple[Tensor, Tensor]], p: float, q: float) -> Tensor:
    """What is in the top p % of the first and not in the top q % of the second scores, for every pair of a sequence.

    Parameters
    ----------
    by_scenario: pairs of scores (..., n) under the minority's and the majority's prompts.
    """
    taken: Tensor | None = None
    for minority, majority in by_scenario:
        off = top(minority, p) & ~top(majority, q)
        taken = off if taken is None else taken & off
    assert taken is not None, "a suite has at least one scenario"
    return taken


def top(scores: Tensor, percent: float) -> Tensor:
    """Which entries of the last dimension are its top ``percent``, bool (..., n); ties go to the lower position."""
    count = _share(scores.shape[-1], percent)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def _share(count: int, percent: float) -> int:
    return int(count * percent / 100)
