"""What a search measures its masks on: a draw of the fit part, read as an estimate for all of it.

Every scenario of a draw asks other markers, so that many are heard at the price of a few, and the next draw asks
others again: a mask fitted to eight names alone would do its best for these. The unpruned model's answers to all of
fit are known, so that only what a mask changes is estimated: with y the answers of the unpruned and y' those of the
pruned model, both in units of the unpruned model's spread within groups, b the slope of y' on y within groups, and
e = y' - b y, the gap of a scenario under the mask is

    gap' = b gap(all of fit) + mean_A e - mean_B e

with the variance (1 - n_A / N_A) var_A e / n_A + (1 - n_B / N_B) var_B e / n_B, n of N markers being asked: the
regression estimator of survey sampling (Cochran, *Sampling Techniques*, chapter 7). Slope, variance of e, and how far
the spread within groups has changed are one for all scenarios, each of which asks a few markers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.evaluation.evaluator import Evaluator, Measurement
from secateur.measures.disparity import Table
from secateur.measures.prompts import PromptSet
from secateur.scoring.attribution import pairs_of_groups


@dataclass(frozen=True, eq=False)
class Estimate:
    """Figures and the variance of each, of one shape."""

    value: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True, eq=False)
class Gaps(Estimate):
    """Standardised gaps, gap / spread, under a mask, (pairs, scenarios)."""

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
    before: the unpruned model's answers to the draw, in units of ``spread``; NaN where a marker is not asked.
    gaps: (pairs, scenarios), the unpruned model's on all of fit, likewise. spread: (scenarios,), within groups.
    nll: (windows,), the unpruned model's on the text of the draw.
    scenarios: the numbers of the rows.
    """

    part: Evaluator
    before: Table
    gaps: np.ndarray
    spread: np.ndarray
    nll: np.ndarray
    scenarios: list[int]

    @classmethod
    def staggered(cls, fit: Evaluator, markers: int, windows: int, seed: int, turn: int = 0) -> Draw:
        """Some markers of each group in every scenario, other ones in the next, and some windows of the text.

        Parameters
        ----------
        markers: of each group, all if it has fewer.
        turn: draws of other turns have other markers, and the windows that follow.
        """
        known = fit.evaluate(None, utility=True)
        assert fit.text is not None, "a search needs neutral text"
        assert known.nll is not None
        read = [(turn * windows + k) % len(fit.text.windows) for k in range(min(windows, len(fit.text.windows)))]
        prompts = staggered(fit.prompts, markers, [seed, turn])
        part = fit.on(prompts, fit.text.some(read), walk=True)
        pairs = list(pairs_of_groups(known.table))
        spread = pairs[0][-1]
        asked = ~np.isnan(prompts.table(np.zeros(len(prompts))))
        before = Table(np.where(asked, known.table.y, np.nan) / spread[:, None], known.table.groups)
        gaps = np.array([gap for _, _, gap, _ in pairs]) / spread
        return cls(part, before, gaps, spread, known.nll[read], fit.prompts.scenarios)

    def on(self, part: Evaluator) -> Draw:
        """The same on some of the scenarios, and the first windows."""
        rows = [self.scenarios.index(scenario) for scenario in part.prompts.scenarios]
        before = Table(self.before.y[rows], self.before.groups)
        windows = 0 if part.text is None else len(part.text.windows)
        return Draw(part, before, self.gaps[:, rows], self.spread[rows], self.nll[:windows], part.prompts.scenarios)

    @property
    def unpruned(self) -> Gaps:
        """Of the unpruned model, which all of fit tells."""
        return Gaps(self.gaps, np.zeros_like(self.gaps))

    def estimates(self, found: Measurement) -> tuple[Gaps, Estimate]:
        """What a measurement on the draw says of gaps and of the increase of log-perplexity."""
        assert found.nll is not None, "a draw is measured with its text"
        return self.read(found.table), self.increase(found.nll)

    def read(self, after: Table) -> Gaps:
        """The gaps on all of fit that the answers to the draw stand for."""
        y, answers = self.before.y, after.y / self.spread[:, None]
        members = [after.groups == group for group in range(after.n_groups)]
        centred = [(_centred(y[:, inside]), _centred(answers[:, inside])) for inside in members]
        square = max(sum(float(np.nansum(one**2)) for one, _ in centred), 1e-12)
        slope = sum(float(np.nansum(one * other)) for one, other in centred) / square
        ratio = max(float(np.sqrt(sum(float(np.nansum(other**2)) for _, other in centred) / square)), 1e-6)
        rest = answers - slope * y  # e, (scenarios, markers)
        mean = [np.nanmean(rest[:, inside], axis=1) for inside in members]
        noise = [_variance_of_mean(rest[:, inside]) for inside in members]
        value = [(slope * gap + mean[a] - mean[b]) / ratio for gap, (a, b) in zip(self.gaps, after.pairs, strict=True)]
        variance = [(noise[a] + noise[b]) / ratio**2 for a, b in after.pairs]
        return Gaps(np.array(value), np.array(variance))

    def increase(self, nll: np.ndarray) -> Estimate:
        """Of log-perplexity, nats per token, on the text of the draw, from negative log-likelihoods (windows,)."""
        text = self.part.text
        assert text is not None
        change = nll - self.nll
        rates = change / text.scored
        variance = rates.var(ddof=1) / len(rates) if len(rates) > 1 else 0.0
        return Estimate(np.array(change.sum() / text.scored.sum()), np.array(variance))


def staggered(prompts: PromptSet, markers: int, seed: int | list[int]) -> PromptSet:
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
