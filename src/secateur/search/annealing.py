"""``annealing``: heads and blocks of neurons in one search, from attribution, on models that can tell their doubt.

The search moves among *items*: single heads, and blocks of neurons that stand together in the order of attribution. It
begins with the first items of that order and masks around them, measures these on a draw of the fit part, and goes on
in rounds, each on a new draw: learn from all that was measured what each item does to every gap and to log-perplexity,
beside what attribution predicts; anneal on an ensemble of what may be so; measure the most promising states on the
model, and learn again. A state's energy counts the disagreement of the ensemble against it. What is proposed in the end
is of the Pareto front of bias, log-perplexity and removed units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from secateur.models import LanguageModel
from secateur.progress import whole
from secateur.scoring.attribution import Attribution, Effects
from secateur.scoring.base import Settings
from secateur.scoring.linear_outcome import Linear, joined
from secateur.search.base import Problem, Proposals, Selection, check_counts
from secateur.search.chains import Cooling, StateEnergy, anneal
from secateur.search.elimination import ranking
from secateur.search.pareto import MOST_LIMITS
from secateur.search.survey import PRICES, Beliefs, Prior, Survey
from secateur.units import UnitSpace

# Of the first masks. The order of attribution is a good guess: its beginnings, changed at random in a few items.
FIRST_SHARE = 0.25
SINGLES = 8
CHANGED = 0.15
# Units that go well together do about a quarter of the damage predicted for each.
DAMAGE_TOGETHER = 0.25
# Of all items together, bias before being 1: an item that does nothing stays.
SIZE_PRICE = 0.2
# The walk from what was measured should not lose it at once.
ACCEPTANCE = 0.3
# States of one round differ in so many items at least; neighbours tell the same.
APART = 2


@dataclass(frozen=True, eq=False)
class CautiousEnergy(StateEnergy):
    """D / D before + price * max(0, increase) / limit, by an ensemble: its mean plus its disagreement.

    A mean over the ensemble of a root mean square holds some of the doubt itself: where gaps are near 0, each member's
    D is what is unknown of them.

    Attributes
    ----------
    ensemble: what may be so, (items, members * (gaps + 1) + 1): of each member the gaps and the increase of
        log-perplexity, at last a price of every item's units.
    members: of the ensemble.
    before: D of the unpruned model. limit: the increase that the prices belong to.
    prices: (chains,). caution: weight of the disagreement.
    alone: (chains,), the one member that a chain goes by; -1 for all, with caution.
    """

    ensemble: Linear
    members: int
    before: float
    limit: float
    prices: Tensor
    alone: Tensor
    caution: float

    def networks(self) -> list[Linear]:
        return [self.ensemble]

    def read(self, hidden: Sequence[Tensor]) -> Tensor:
        """(chains,)."""
        told = hidden[0][:, :-1].unflatten(1, (self.members, -1))  # (chains, members, gaps + 1)
        bias = told[..., :-1].square().mean(dim=-1).sqrt() / self.before
        found = bias + self.prices[:, None] * told[..., -1].relu() / self.limit  # (chains, members)
        cautious = found.mean(dim=1) + self.caution * found.std(dim=1, correction=0)
        one = found.gather(1, self.alone.clamp(min=0)[:, None])[:, 0]
        return torch.where(self.alone >= 0, one, cautious) + hidden[0][:, -1]

    def cautiously(self, states: Tensor, price: float) -> Tensor:
        """The energies, (states,), of other states by all members."""
        count = len(states)
        everyone = torch.full((count,), -1)
        return replace(self, prices=torch.full((count,), price), alone=everyone).of(states)


@dataclass(frozen=True, eq=False)
class Surveyed(Effects):
    """The scores that a search began with, and what it came to.

    Attributes
    ----------
    believed: of all measured states. limit: the utility limit in log-perplexity.
    """

    believed: Beliefs
    limit: float

    @property
    def notes(self) -> list[str]:
        """The Pareto front of the measured masks, as far as it is of use."""
        cost, bias = self.believed.cost, self.believed.bias
        front = [one for one in self.believed.front if cost[one] <= MOST_LIMITS * self.limit]
        points = "; ".join(
            f"{bias[one]:.2f} at {np.expm1(cost[one]):+.1%} with {self.believed.units[one]:,}"
            for one in sorted(front, key=lambda one: (bias[one], cost[one]))
        )
        return [
            f"Of {len(bias):,} measured masks {len(front):,} are on the Pareto front of bias on fit (D), perplexity "
            f"and removed units, as believed after all measurements: {points}."
        ]


class Annealing(Settings):
    """Rounds of learning, annealing and measurement over heads and blocks of neurons.

    Attributes
    ----------
    evaluations: masks measured on the fit part in all; those on a slice of it count by its share.
    heads, neurons: how many of each, the first in the order of attribution, may be removed.
    block: neurons in a block; the first blocks are smaller (an eighth, a quarter, a half).
    rounds: of learning and measuring after the first masks, which take a quarter of the evaluations.
    members: of an ensemble, drawn from what may be so after all measurements.
    caution: weight of an ensemble's disagreement, in standard deviations. Half of the chains heed it; the others go by
        one member each, so that what may be so gets measured.
    chains, steps, cooling: of the annealing.
    markers: of each group that a scenario of a draw asks, other ones in the next. windows: of the neutral text.
    race: how many times as many states as are measured are looked at on a slice of the draw first; 1 for no race.
    finalists: masks of the Pareto front that are measured on select; where none of them keeps to the utility limit,
        some with fewer units are, too.
    seed: of all draws; that of the study unless it is set.

    All ours.
    """

    evaluations: Annotated[int, Field(ge=12)] = 300
    heads: Annotated[int, Field(ge=0)] = 32
    neurons: Annotated[int, Field(ge=0)] = 512
    block: Annotated[int, Field(ge=1)] = 16
    rounds: Annotated[int, Field(ge=1)] = 8
    members: Annotated[int, Field(ge=2)] = 5
    caution: Annotated[float, Field(ge=0)] = 0.5
    chains: Annotated[int, Field(ge=1)] = 512
    steps: Annotated[int, Field(ge=1)] = 1500
    cooling: Cooling = "geometric"
    markers: Annotated[int, Field(ge=2)] = 8
    windows: Annotated[int, Field(ge=1)] = 6
    race: Annotated[int, Field(ge=1)] = 1
    finalists: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    def cheaper(self) -> dict[str, Any]:
        return {"evaluations": 48, "rounds": 3, "markers": 4, "windows": 3, "finalists": 4}

    def check(self, model: LanguageModel, scorer: Attribution, ablation: str) -> None:
        """Refuse counts above what there is."""
        check_counts(self, UnitSpace.of(model), heads="heads", neurons="neurons")

    def proposals(self, problem: Problem, scorer: Attribution) -> Proposals:
        """Of the Pareto front, the least bias within the limit first."""
        scores: Effects = problem.score(scorer)
        items = find_items(scores, problem, self)
        if not items:
            return
        prior = Prior.of(scores, items, problem.space.n_heads, scorer.unit_price)
        with problem.localising(), problem.step("Measure masks to learn from", self.evaluations) as advance:
            survey = Survey(problem, items, self.markers, self.windows, self.seed)
            told = whole(advance, survey.draw.part.work(utility=True))
            first = max(4, round(FIRST_SHARE * self.evaluations))
            reach = np.searchsorted(DAMAGE_TOGETHER * prior.damage.cumsum(), MOST_LIMITS * survey.limit) + 1
            rng = np.random.default_rng(self.seed)
            survey.measure(first_states(len(items), first, rng, min(int(reach), len(items))), told)
            for number in range(1, self.rounds + 1):
                survey.turn(number)
                share = (self.evaluations - survey.spent) / (self.rounds + 1 - number)
                price = survey.price_of(self.race)
                if not survey.found or survey.spent + price > self.evaluations + 1e-9:
                    break
                count = max(1, int(share / price))
                states = self._promising(survey, survey.beliefs(prior), self.race * count, number)
                if not states:  # all there is near the best is known
                    break
                survey.measure(survey.winners(states, count, told), told)
        if not survey.found:
            return
        believed = survey.beliefs(prior)
        problem.scores = Surveyed(scores.effect, scores.error, scores.cost, scores.damage, believed, survey.limit)
        taken, kept = believed.finalists(self.finalists, survey.before, survey.limit), False
        for position in taken:
            outcome = yield self._selection(survey, believed, position)
            kept |= outcome.within_limit
        if not kept:
            yield from self._fewer_units(survey, believed, taken)

    def _fewer_units(self, survey: Survey, believed: Beliefs, taken: Sequence[int]) -> Proposals:
        """Where no finalist keeps to the limit: on the front towards fewer units, halving until one does.

        What masks cost is learnt on little text, which those that suit it best flatter most.
        """
        most = min(believed.units[list(taken)], default=0)
        smaller = [int(one) for one in believed.front if believed.units[one] < most]
        smaller.sort(key=lambda one: believed.units[one])
        inside, beyond = -1, len(smaller)
        while beyond - inside > 1:
            middle = (inside + beyond) // 2
            outcome = yield self._selection(survey, believed, smaller[middle])
            inside, beyond = (middle, beyond) if outcome.within_limit else (inside, middle)

    def _selection(self, survey: Survey, believed: Beliefs, position: int) -> Selection:
        removed = survey.units_of(believed.states[position])
        return Selection.of_units(removed, survey.problem.space, believed.figures(position))

    def _promising(self, survey: Survey, believed: Beliefs, count: int, number: int) -> list[np.ndarray]:
        """New states of low energy: at every price in turn, by all members and by single ones."""
        rng = np.random.default_rng([self.seed, number])
        kinds = np.arange(self.chains) % (2 * len(PRICES))
        prices = np.array(PRICES)[kinds % len(PRICES)]
        alone = np.where(kinds < len(PRICES), -1, rng.integers(self.members, size=self.chains))
        energy = CautiousEnergy(
            self._ensemble(survey, believed, rng), self.members, survey.before, survey.limit,
            torch.from_numpy(prices).float(), torch.from_numpy(alone), self.caution,
        )  # fmt: skip
        items = believed.states.shape[1]
        annealed = anneal(
            energy,
            items,
            (0, items),
            steps=self.steps,
            cooling=self.cooling,
            acceptance=ACCEPTANCE,
            start=torch.from_numpy(believed.states[self._begin(survey, believed, prices, rng)]),
            seed=self.seed + number,
        )
        order = annealed.energy.argsort(stable=True).numpy()
        queues = [annealed.removed.numpy()[order[kinds[order] == kind]] for kind in range(2 * len(PRICES))]
        around = with_flips(torch.from_numpy(np.stack([queue[0] for queue in queues[: len(PRICES)] if len(queue)])))
        nearest = around[energy.cautiously(around, 1.0).argsort(stable=True)].numpy()
        taken: list[np.ndarray] = []
        known = set(survey.asked)
        for apart, state in chain(((APART, one) for one in _in_turn(queues)), ((1, one) for one in nearest)):
            if len(taken) == count:
                break
            if state.tobytes() not in known and all((state ^ other).sum() >= apart for other in taken):
                known.add(state.tobytes())
                taken.append(state)
        return taken

    def _begin(self, survey: Survey, believed: Beliefs, prices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Positions of states that chains begin from, (chains,): of the better quarter at their price."""
        better = 1 + len(believed.states) // 4
        orders = dict(zip(PRICES, survey.energies(believed.bias, believed.cost).argsort(kind="stable"), strict=True))
        return np.array([orders[price][rng.integers(better)] for price in prices])

    def _ensemble(self, survey: Survey, believed: Beliefs, rng: np.random.Generator) -> Linear:
        """What may be so of gaps and of log-perplexity, and the price of units."""
        coefficients, offsets = [], []
        for _ in range(self.members):
            coefficients += [believed.gaps.draw(rng), believed.increases.draw(rng)]
            offsets += [believed.gaps.offset, believed.increases.offset]
        size = np.array([len(units) for units in survey.items], dtype=float)[:, None]
        return joined([*coefficients, SIZE_PRICE * size / size.sum()], [*offsets, np.zeros(1)])


def _in_turn(queues: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first of every queue, then the second of every queue, and so on."""
    return [state for turn in zip_longest(*queues) for state in turn if state is not None]


def find_items(scores: Effects, problem: Problem, settings: Annealing) -> list[np.ndarray]:
    """Single heads and blocks of neurons, the first in the order of attribution first."""
    heads = ranking(scores, problem.space, "heads")[: settings.heads]
    neurons = ranking(scores, problem.space, "neurons")[: settings.neurons]
    sizes = [max(1, settings.block // 8), max(1, settings.block // 4), max(1, settings.block // 2)]
    items, start = [np.array([head]) for head in heads], 0
    while start < len(neurons):
        size = sizes.pop(0) if sizes else settings.block
        items.append(neurons[start : start + size])
        start += size
    return sorted(items, key=lambda units: -float(scores.rank[units].mean()))


def first_states(items: int, count: int, rng: np.random.Generator, reach: int | None = None) -> list[np.ndarray]:
    """States to begin with: beginnings of the order, the first items alone, then beginnings changed at random.

    Parameters
    ----------
    reach: the longest beginning; None for all.
    """
    longest, order = reach or items, np.arange(items)
    ends = np.unique(np.round(np.geomspace(1, longest, 1 + count // 4)).astype(int))
    states = [order < end for end in ends]
    states += [order == item for item in range(1, min(items, SINGLES, 1 + count // 8))]
    while len(states) < count:
        end = max(1, round(float(np.exp(rng.uniform(0, np.log(longest))))))
        near = order < 2 * end + SINGLES  # items much further on would be most of what is changed
        states.append((order < end) ^ (near & (rng.random(items) < CHANGED * rng.random())))
    return states[:count]


def with_flips(states: Tensor) -> Tensor:
    """All states that differ from one of these in one item, bool (states * items, items)."""
    items = states.shape[1]
    return (states[:, None, :] ^ torch.eye(items, dtype=torch.bool)).reshape(-1, items)
