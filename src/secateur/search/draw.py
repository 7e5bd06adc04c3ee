"""What a search measures its masks on: a draw of the fit part, read as an estimate for all of it.

Every scenario of the draw asks other markers, so that many are heard at the price of a few: a mask fitted to eight
names alone would do its best for these. And the unpruned model's answers to all of fit are known, so that only what a
mask changes is estimated: with y the answers of the unpruned and y' those of the pruned model, b the slope of y' on y
within groups, and e = y' - b y, the gap of a scenario under the mask is

    gap' = b gap(all of fit) + mean_A e - mean_B e

with the variance (1 - n_A / N_A) var_A e / n_A + (1 - n_B / N_B) var_B e / n_B, n of N markers being asked: the
regression estimator of survey sampling (Cochran, *Sampling Techniques*, chapter 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.disparity import Table
from secateur.measures.prompts import PromptSet
from secateur.scoring.attribution import pairs_of_groups


@dataclass(frozen=True, eq=False)
class Gaps:
    """Standardised gaps, gap / spread, under a mask, and the variance of each, both (pairs, scenarios)."""

    value: np.ndarray
    variance: np.ndarray

    @property
    def disparity(self) -> float:
        """D without what chance adds to its square; 0 below the noise."""
        return float(np.sqrt(max(0.0, float(np.mean(self.value**2 - self.variance)))))


@dataclass(frozen=True, eq=False)
class Draw:
    """A draw of the fit part.

    Attributes
    ----------
    part: measures on the draw.
    before: the unpruned model's answers to the draw; NaN where a scenario does not ask a marker.
    gaps: (pairs, scenarios), the unpruned model's on all of fit. spread: (scenarios,), likewise.
    scenarios: the numbers of the rows.
    """

    part: Evaluator
    before: Table
    gaps: np.ndarray
    spread: np.ndarray
    scenarios: list[int]

    @classmethod
    def staggered(cls, fit: Evaluator, markers: int, windows: int, seed: int) -> Draw:
        """Some markers of each group in every scenario, other ones in the next, and the first windows of the text.

        Parameters
        ----------
        markers: of each group, all if it has fewer.
        """
        assert fit.text is not None, "a search needs neutral text"
        part = fit.on(staggered(fit.prompts, markers, seed), fit.text.first(windows), walk=True)
        pairs = list(pairs_of_groups(fit.evaluate().table))
        gaps = np.array([gap for _, _, gap, _ in pairs])
        return cls(part, part.evaluate().table, gaps, pairs[0][-1], fit.prompts.scenarios)

    def on(self, part: Evaluator) -> Draw:
        """The same on some of the scenarios."""
        rows = [self.scenarios.index(scenario) for scenario in part.prompts.scenarios]
        before = Table(self.before.y[rows], self.before.groups)
        return Draw(part, before, self.gaps[:, rows], self.spread[rows], part.prompts.scenarios)

    @property
    def unpruned(self) -> Gaps:
        """Of the unpruned model, which all of fit tells; its variance is that of the gaps there."""
        return Gaps(self.gaps / self.spread, np.zeros_like(self.gaps))

    def read(self, after: Table) -> Gaps:
        """The gaps on all of fit that the answers to the draw stand for."""
        y, answers = self.before.y, after.y
        members = [after.groups == group for group in range(after.n_groups)]
        centred = [(_centred(y[:, inside]), _centred(answers[:, inside])) for inside in members]
        square = sum(float(np.nansum(one**2)) for one, _ in centred)
        slope = sum(float(np.nansum(one * other)) for one, other in centred) / max(square, 1e-12)
        ratio = np.sqrt(sum(float(np.nansum(other**2)) for _, other in centred) / max(square, 1e-12))
        rest = answers - slope * y  # e, (scenarios, markers)
        mean = [np.nanmean(rest[:, inside], axis=1) for inside in members]
        noise = [_variance_of_mean(rest[:, inside]) for inside in members]
        scale = self.spread * max(float(ratio), 1e-6)
        value = [(slope * gap + mean[a] - mean[b]) / scale for gap, (a, b) in zip(self.gaps, after.pairs, strict=True)]
        variance = [(noise[a] + noise[b]) / scale**2 for a, b in after.pairs]
        return Gaps(np.array(value), np.array(variance))


def staggered(prompts: PromptSet, markers: int, seed: int) -> PromptSet:
    """The prompts of some markers of each group, other ones from scenario to scenario until all had their turn."""
    rng, asked = np.random.default_rng(seed), set[tuple[int, int]]()
    for group in np.unique(prompts.groups):
        order = rng.permutation(np.array(prompts.markers)[prompts.groups == group])
        count = min(markers, len(order))
        for turn, scenario in enumerate(prompts.scenarios):
            asked.update((scenario, int(order[(turn * count + k) % len(order)])) for k in range(count))
    return prompts.where(np.array([(one.scenario, one.marker) in asked for one in prompts.prompts]))


def _centred(y: np.ndarray) -> np.ndarray:
    return np.asarray(y - np.nanmean(y, axis=1, keepdims=True))


def _variance_of_mean(values: np.ndarray) -> np.ndarray:
    """Of the mean over drawn markers, (scenarios,), about that over all; pooled, as each has a few markers only."""
    count = (~np.isnan(values)).sum(axis=1)
    pooled = float(np.nansum(_centred(values) ** 2)) / max(1, int((count - 1).sum()))
    return np.asarray((1 - count / values.shape[1]) * pooled / np.maximum(count, 1))
