"""``SurrogateAnnealing``: anneal on surrogates of bias and log-perplexity, then measure the best on the model."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.models import LanguageModel
from secateur.scoring.base import Settings
from secateur.scoring.sampled_masks import SampledMasks, SurrogateScores
from secateur.search import pareto
from secateur.search.base import Problem, Proposals, Selection
from secateur.search.chains import Annealed, Cooling, Energy, anneal

EPSILONS = (0.1, 0.25, 0.5, 0.75)


class SurrogateAnnealing(Settings):
    """Dasu et al. (arXiv 2503.15815): minimise epsilon · bias + (1 − epsilon) · log-perplexity over sets of heads.

    Attributes
    ----------
    epsilon: weight of bias against log-perplexity, both as predicted by the surrogates, each divided by its
        standard deviation over the sampled masks (ours, so that epsilon means the same for every suite);
        None tries .1, .25, .5 and .75 (ours; the paper's is not at hand).
    chains, steps: parallel chains, and flips in each; one head flips per step. Ours.
    cooling: "logarithmic", T0 / ln(2 + i), as published, or "geometric".
    acceptance: probability with which T0 accepts the average rise of a random walk; .75 as published.
    finalists: states per epsilon that are measured on the model, on the same draw as the sampled masks, those of the
        lowest predicted energy. Ours.
    proposed: of these, how many are measured on select, those of the lowest measured energy. Ours.
    front: where it is not 0, so many masks are measured on select instead, of the Pareto front of all that was measured
        on the draw: the finalists of one epsilon are much alike, and the best of the sampled masks may be better or
        cheaper. Ours; as published only states that were annealed are looked at.

    The number of removed heads stays within the bounds of the sampled masks, outside of which a surrogate has seen
    nothing.
    """

    epsilon: Annotated[float | None, Field(ge=0, le=1)] = None
    chains: Annotated[int, Field(ge=1)] = 1000
    steps: Annotated[int, Field(ge=1)] = 10_000
    cooling: Cooling = "logarithmic"
    acceptance: Annotated[float, Field(gt=0, lt=1)] = 0.75
    finalists: Annotated[int, Field(ge=1)] = 5
    proposed: Annotated[int, Field(ge=1)] = 1
    front: Annotated[int, Field(ge=0)] = 0

    def cheaper(self) -> dict[str, Any]:
        return {"chains": 200, "steps": 2000, "finalists": 2}

    def check(self, model: LanguageModel, scorer: SampledMasks, ablation: str) -> None:
        """Every model will do."""

    def proposals(self, problem: Problem, scorer: SampledMasks) -> Proposals:
        """The best finalists of every epsilon, or the front; equal masks are measured and proposed once."""
        scores: SurrogateScores = problem.score(scorer)
        sampled = [tuple(np.flatnonzero(state).tolist()) for state in scores.removed]
        measured = dict(zip(sampled, zip(scores.bias, scores.log_perplexity, strict=True), strict=True))
        seen: set[tuple[int, ...]] = set()
        for epsilon in EPSILONS if self.epsilon is None else (self.epsilon,):
            weights = (epsilon / _spread(scores.bias), (1 - epsilon) / _spread(scores.log_perplexity))
            energy = Energy((scores.of_bias, scores.of_log_perplexity), weights)
            with problem.step(f"Anneal {self.chains:,} chains, epsilon {epsilon:g}", self.steps) as advance:
                found = anneal(
                    energy,
                    problem.space.n_heads,
                    scores.bounds,
                    chains=self.chains,
                    steps=self.steps,
                    cooling=self.cooling,
                    acceptance=self.acceptance,
                    seed=scorer.seed,
                    advance=advance,
                )
            finalists = [state for state in best_states(found, self.finalists) if state not in seen]
            figures = self._measure(problem, scorer, scores, finalists)
            seen.update(finalists)
            measured.update(zip(finalists, figures, strict=True))
            if not self.front:
                for number in np.argsort(figures @ np.array(weights))[: self.proposed]:
                    if np.isfinite(figures[number]).all():
                        yield Selection("heads", np.array(finalists[number]), {"epsilon": epsilon})
        if self.front:
            yield from self._front(problem, scores, measured)

    def _measure(
        self, problem: Problem, scorer: SampledMasks, scores: SurrogateScores, states: list[tuple[int, ...]]
    ) -> np.ndarray:
        """D and log-perplexity on the draw, (states, 2)."""
        masks = [problem.mask(removed) for removed in states]
        with problem.localising(), problem.step("Measure the finalists", len(masks)) as advance:
            figures = scorer.measure(problem.fit, masks, advance, problem.saw, scores.unpruned_log_perplexity)
        return np.column_stack(figures)

    def _front(
        self, problem: Problem, scores: SurrogateScores, measured: dict[tuple[int, ...], tuple[float, float]]
    ) -> Proposals:
        """Of the Pareto front of all that was measured, the least bias first."""
        states = [state for state, figures in measured.items() if np.isfinite(figures).all()]
        points = np.array([measured[state] for state in states])
        points[:, 1] = np.maximum(0.0, points[:, 1] - scores.unpruned_log_perplexity)
        taken = pareto.promising(points, pareto.front(points), self.front, scores.unpruned_bias, problem.log_limit)
        for number in sorted(taken, key=lambda one: points[one, 0]):
            bias, cost = points[number].round(4).tolist()
            yield Selection("heads", np.array(states[number]), {"fit_bias": bias, "fit_cost": cost})


def best_states(found: Annealed, count: int) -> list[tuple[int, ...]]:
    """The distinct states of lowest energy, as flat positions of removed heads."""
    states: dict[tuple[int, ...], None] = {}
    for chain in found.energy.argsort(stable=True).tolist():
        states.setdefault(tuple(np.flatnonzero(found.removed[chain].numpy()).tolist()))
        if len(states) == count:
            break
    return list(states)


def _spread(values: np.ndarray) -> float:
    return max(float(values.std()), 1e-9)
