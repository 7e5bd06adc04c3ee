"""What a search over items measures, and what it believes after all that it has measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import nnls

from secateur.evaluation.evaluator import Measurement
from secateur.evaluation.racing import Race
from secateur.progress import Advance
from secateur.scoring.attribution import Effects
from secateur.scoring.linear_outcome import Posterior, learn
from secateur.search import pareto
from secateur.search.base import Problem
from secateur.search.draw import Draw, Estimate, Gaps

# What an increase of log-perplexity by the limit costs, bias before being 1: each gives its part of the Pareto front.
PRICES = (0.1, 0.3, 1.0, 3.0)
# Masks far from the best at every price say little of those near it: half of the weight at this much more energy.
NEAR = 0.3
# A mask with gaps far above the unpruned model's, or far over the limit, is one to keep away from, however far.
MOST_GAPS = 3.0
# Sums of first-order effects promise too much more often than too little.
MOST_EFFECT = 1.5


@dataclass(frozen=True, eq=False)
class Measured:
    """A state that was measured.

    Attributes
    ----------
    state: bool (items,), what is removed. gaps: as estimated for all of fit. increase: of log-perplexity, nats per
    token. units: removed.
    """

    state: np.ndarray
    gaps: Gaps
    increase: Estimate
    units: int


@dataclass(frozen=True, eq=False)
class Prior:
    """What attribution predicts of each item, (items,).

    Attributes
    ----------
    effect: change of D. damage: of log-perplexity, nats per token. heads: bool, whether it is a head.
    """

    effect: np.ndarray
    damage: np.ndarray
    heads: np.ndarray

    @classmethod
    def of(cls, scores: Effects, items: Sequence[np.ndarray], n_heads: int, unit_price: float) -> Prior:
        """From scores whose damage holds a price for every unit, which no mask pays on the model."""
        return cls(
            np.array([scores.effect[units].sum() for units in items]),
            np.array([(scores.damage[units] - unit_price).sum() for units in items]),
            np.array([units[0] < n_heads for units in items], dtype=bool),
        )


@dataclass(frozen=True, eq=False)
class Beliefs:
    """What all measured states together say.

    Attributes
    ----------
    gaps, increases: posteriors over the items' coefficients, of (items, pairs * scenarios) and (items, 1).
    states: bool (states, items). bias, cost, units: of each, (states,); of what a measurement says beyond the
        linear model that share is believed which chance does not explain, and all of a cost far over the limit.
    """

    gaps: Posterior
    increases: Posterior
    states: np.ndarray
    bias: np.ndarray
    cost: np.ndarray
    units: np.ndarray

    def figures(self, position: int) -> dict[str, Any]:
        """What is believed of a state, by name: D, increase of log-perplexity in nats per token, removed units."""
        bias, cost = (round(float(values[position]), 4) for values in (self.bias, self.cost))
        return {"fit_bias": bias, "fit_cost": cost, "fit_units": int(self.units[position])}

    @property
    def front(self) -> np.ndarray:
        """Positions of the states that remove something and that none dominates in bias, cost and units."""
        front = pareto.front(np.column_stack([self.bias, self.cost, self.units]))
        return np.asarray(front[self.units[front] > 0])

    def finalists(self, count: int, before: float, limit: float) -> list[int]:
        """Positions of states of the front that together dominate most, the least bias within the limit first.

        Parameters
        ----------
        before: D of the unpruned model. limit: the utility limit in log-perplexity.
        """
        points = np.column_stack([self.bias, self.cost])
        taken = pareto.promising(points, self.front, count, before, limit)
        return sorted(taken, key=lambda one: (self.cost[one] > limit, self.bias[one], self.units[one]))


@dataclass(eq=False)
class Survey:
    """Measures states over items, on other markers and other text from turn to turn.

    Attributes
    ----------
    items: the units of each item, flat positions.
    markers, windows, seed: of the draws.
    draw: of this turn. race: on a slice of it.
    found: the states with finite answers, in the order of measurement. asked: all states, by their bytes.
    spent: evaluations so far; those on the slice count by its share.
    """

    problem: Problem
    items: Sequence[np.ndarray]
    markers: int
    windows: int
    seed: int
    draw: Draw = field(init=False)
    race: Race = field(init=False)
    found: list[Measured] = field(init=False, default_factory=list)
    asked: set[bytes] = field(init=False, default_factory=set)
    spent: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.turn(0)

    def turn(self, number: int) -> None:
        """Take the next draw: a mask that suits one by luck does not stay ahead."""
        self.draw = Draw.staggered(self.problem.fit, self.markers, self.windows, self.seed, number)
        self.race = Race.on(self.draw.part, [self.seed, number])

    @property
    def before(self) -> float:
        """D of the unpruned model."""
        return max(self.draw.unpruned.disparity, 1e-6)

    @property
    def limit(self) -> float:
        """The increase of log-perplexity that the prices are relative to."""
        return self.problem.log_limit

    def energies(self, bias: np.ndarray | float, cost: np.ndarray | float) -> np.ndarray:
        """D / D before + price * cost / limit, (prices,) or (prices, states)."""
        return np.array([bias / self.before + price * cost / self.limit for price in PRICES])

    def price_of(self, race: int) -> float:
        """Evaluations that one state on the whole draw takes, with those looked at on the slice for it."""
        return 1 + (race * self.race.share if race > 1 else 0)

    def winners(self, states: Sequence[np.ndarray], count: int, advance: Advance = lambda _: None) -> list[np.ndarray]:
        """The most promising of states, as a slice of the draw tells; all where there is no more than ``count``.

        Parameters
        ----------
        advance: told of prompts and windows.
        """
        if len(states) <= count:
            return list(states)
        draw = self.draw.on(self.race.first)

        def energies(found: Measurement) -> np.ndarray:
            gaps, increase = draw.estimates(found)
            return self.energies(gaps.disparity, max(0.0, float(increase.value)))  # a fall on so little text is luck

        masks = [self.problem.mask(self.units_of(state)) for state in states]
        self.spent += len(states) * self.race.share
        winners = self.race.winners(masks, count, energies, advance)
        self.asked.update(state.tobytes() for number, state in enumerate(states) if number not in winners)
        return [states[number] for number in winners]

    def units_of(self, state: np.ndarray) -> np.ndarray:
        """Flat positions of what a state removes."""
        chosen = [self.items[item] for item in np.flatnonzero(state).tolist()]
        return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=int)

    def measure(self, states: Sequence[np.ndarray], advance: Advance = lambda _: None) -> None:
        """Measure states on the model, each once; ``advance`` is told of prompts and windows."""
        new = {state.tobytes(): state for state in states if state.tobytes() not in self.asked}
        self.asked.update(new)
        self.spent += len(new)
        drawn, masks = list(new.values()), [self.problem.mask(self.units_of(state)) for state in new.values()]
        for number, found in self.draw.part.evaluate_walking(masks, advance, utility=True):
            if found is not None:
                gaps, increase = self.draw.estimates(found)
                self.found.append(Measured(drawn[number], gaps, increase, len(masks[number].removed)))
                self.problem.saw(gaps.disparity, float(increase.value))

    def beliefs(self, prior: Prior) -> Beliefs:
        """What all measurements so far say, beside what attribution predicts.

        States near the best count most, near by what is believed when all count alike: by what was measured of
        themselves, those that were lucky would.
        """
        return self.learnt(prior, self.nearness(self.learnt(prior, np.ones(len(self.found)))))

    def learnt(self, prior: Prior, weights: np.ndarray) -> Beliefs:
        """What the measurements say if they count by weights, (states,)."""
        removed = np.stack([one.state for one in self.found])
        most, start = MOST_GAPS * self.before, self.draw.unpruned.value.ravel()
        gaps = np.clip([one.gaps.value.ravel() for one in self.found], -most, most)
        expected = prior.effect[:, None] * start / self.before
        scale = _scales([removed @ expected], gaps - start, weights, MOST_EFFECT)[0]
        of_gaps = learn(removed, gaps, start, scale * expected, weights)
        measured = np.array([[float(one.increase.value)] for one in self.found])
        beyond = pareto.MOST_LIMITS * self.limit
        increases = np.minimum(measured, beyond)
        kinds = [np.where(kind, prior.damage, 0.0)[:, None] for kind in (prior.heads, ~prior.heads)]
        scales = _scales([removed @ kind for kind in kinds], increases, weights, np.inf)
        damage = sum(scale * kind for scale, kind in zip(scales, kinds, strict=True))
        of_increases = learn(removed, increases, np.zeros(1), damage, weights)
        of_chance = np.array([one.gaps.variance.ravel() for one in self.found])
        believed_gaps = _believed(of_gaps, removed, gaps, of_chance, weights)
        of_chance = np.array([[float(one.increase.variance)] for one in self.found])
        cost = _believed(of_increases, removed, increases, of_chance, weights)[:, 0]
        return Beliefs(
            gaps=of_gaps,
            increases=of_increases,
            states=removed,
            bias=np.sqrt((believed_gaps**2).mean(axis=1)),
            cost=np.where(measured[:, 0] > beyond, measured[:, 0], np.maximum(0.0, cost)),
            units=np.array([one.units for one in self.found]),
        )

    def nearness(self, believed: Beliefs) -> np.ndarray:
        """Of each state to the best, (states,), at most 1: at the price at which it comes nearest."""
        energies = self.energies(believed.bias, believed.cost)
        return np.asarray((1 / (1 + ((energies - energies.min(axis=1, keepdims=True)) / NEAR) ** 2)).max(axis=0))


def _scales(predicted: Sequence[np.ndarray], outcomes: np.ndarray, weights: np.ndarray, most: float) -> np.ndarray:
    """By what to multiply predictions, each (states, outcomes), so that together they come nearest: 0 to ``most``."""
    root = np.sqrt(weights)[:, None]
    columns = np.column_stack([(root * one).ravel() for one in predicted])
    return np.asarray(np.minimum(nnls(columns, (root * outcomes).ravel())[0], most))


def _believed(
    posterior: Posterior, removed: np.ndarray, measured: np.ndarray, variance: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """What is believed of the states themselves, (states, outcomes)."""
    fitted = posterior.of(removed)
    chance = float(np.average(variance, axis=0, weights=weights).sum())
    share = max(0.0, 1 - chance / max(1e-12, float((posterior.deviation**2).sum())))
    return np.asarray(fitted + share * (measured - fitted))
