"""``annealing``: heads and blocks of neurons in one search, from attribution, on models that can tell their doubt.

The search moves among *items*: single heads, and blocks of neurons that stand together in the order of attribution. It
begins with the first items of that order and masks around them, measures these on a draw of the fit part, and goes on
in rounds: learn from all that was measured what each item does to every gap and to log-perplexity, beside what
attribution predicts; anneal on an ensemble of what may be so; measure the most promising states on the model, and
learn again. A state's energy counts the disagreement of the ensemble against it. What is proposed in the end is of the
Pareto front of bias, log-perplexity and removed units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from secateur.evaluation.evaluator import Measurement
from secateur.evaluation.racing import Race
from secateur.evaluation.walk import walking_order
from secateur.models import LanguageModel
from secateur.progress import Advance, whole
from secateur.scoring.attribution import Attribution, Effects
from secateur.scoring.base import Settings
from secateur.scoring.linear_outcome import Linear, learn
from secateur.search.base import Problem, Proposals, Selection, check_counts
from secateur.search.chains import Cooling, StateEnergy, anneal
from secateur.search.draw import Draw, Gaps
from secateur.search.elimination import ranking
from secateur.units import UnitSpace
from secateur.weights import AnyMask

# What an increase of log-perplexity by the limit costs, bias before being 1: each gives its part of the Pareto front.
PRICES = (0.1, 0.3, 1.0, 3.0)
NEIGHBOURHOODS = 8
# Of the first masks. The order of attribution is a good guess: its beginnings, changed at random in a few items.
FIRST_SHARE = 0.25
SINGLES = 8
CHANGED = 0.15
# Masks far from the best say little of those near it: half of the weight at this much more energy than the best.
NEAR = 0.3
# A mask far over the limit is one to keep away from, however far.
MOST_LIMITS = 5.0


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
    increase: float
    units: int

    @property
    def bias(self) -> float:
        """D on all of fit, without what chance adds to it."""
        return self.gaps.disparity

    @property
    def cost(self) -> float:
        """The increase, at least 0: a fall on a few windows of text is luck."""
        return max(0.0, self.increase)

    def dominates(self, other: Measured) -> bool:
        """Whether it is at least as good in everything, and better in something."""
        mine, yours = (self.bias, self.cost, self.units), (other.bias, other.cost, other.units)
        return all(a <= b for a, b in zip(mine, yours, strict=True)) and mine != yours


@dataclass(frozen=True, eq=False)
class CautiousEnergy(StateEnergy):
    """D / D before + price * max(0, increase) / limit, by an ensemble: its mean plus its disagreement.

    Attributes
    ----------
    gaps, increases: what may be so, members of an ensemble; of (items, gaps) and (items, 1).
    before: D of the unpruned model. limit: the increase that price belongs to. caution: weight of the disagreement.
    """

    gaps: Sequence[Linear]
    increases: Sequence[Linear]
    before: float
    limit: float
    price: float
    caution: float

    def networks(self) -> list[Linear]:
        return [*self.gaps, *self.increases]

    def read(self, hidden: Sequence[Tensor]) -> Tensor:
        """(chains,)."""
        gaps, increases = torch.stack(list(hidden[: len(self.gaps)])), torch.stack(list(hidden[len(self.gaps) :]))
        bias = gaps.square().mean(dim=-1).sqrt() / self.before  # (members, chains)
        found = bias + self.price * increases[..., 0].relu() / self.limit
        return found.mean(dim=0) + self.caution * found.std(dim=0, correction=0)


class Annealing(Settings):
    """Rounds of learning, annealing and measurement over heads and blocks of neurons.

    Attributes
    ----------
    evaluations: masks measured on the fit part in all; those on a slice of it count by its share.
    heads, neurons: how many of each, the first in the order of attribution, may be removed.
    block: neurons in a block; the first blocks are smaller (an eighth, a quarter, a half).
    rounds: of learning and measuring after the first masks, which take a quarter of the evaluations.
    members: of an ensemble, drawn from what may be so after all measurements.
    caution: weight of an ensemble's disagreement, in standard deviations.
    chains, steps, cooling: of the annealing.
    markers: of each group that a scenario of the draw asks, other ones in the next. windows: of the neutral text.
    race: how many times as many states as are measured are looked at on a slice of the draw first; 1 for no race.
    finalists: masks of the Pareto front that are measured on select.
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
    chains: Annotated[int, Field(ge=1)] = 256
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
        """The Pareto front, the least bias first; one end of a range of counts where too much is proposed."""
        scores: Effects = problem.score(scorer)
        items = find_items(scores, problem, self)
        if not items:
            return
        survey, prior = Survey.prepare(problem, items, self), Prior.of(scores, items)
        with problem.step("Measure masks to learn from", self.evaluations) as advance:
            first = max(4, round(FIRST_SHARE * self.evaluations))
            survey.measure(first_states(len(items), first, np.random.default_rng(self.seed)), advance)
            for number in range(self.rounds):
                share = (self.evaluations - survey.spent) / (self.rounds - number)
                price = survey.price_of(self.race)
                if survey.spent + price > self.evaluations + 1e-9:
                    break
                count = max(1, int(share / price))
                states = self._promising(survey, prior, self.race * count, number)
                if not states:  # all there is near the best is known
                    break
                survey.measure(survey.winners(states, count), advance)
        for found in survey.finalists(self.finalists):
            removed = survey.units_of(found.state)
            yield Selection.of_units(removed, problem.space, {"fit_bias": found.bias})

    def _promising(self, survey: Survey, prior: Prior, count: int, number: int) -> list[np.ndarray]:
        """New states of low energy, the prices taking turns."""
        rng = np.random.default_rng([self.seed, number])
        removed = np.stack([one.state for one in survey.found])
        gaps, increases = self._ensembles(survey, prior, rng)
        queues = []
        for price in PRICES:
            energy = CautiousEnergy(gaps, increases, survey.before, survey.limit, price, self.caution)
            best = np.argsort([survey.energy(one, price) for one in survey.found], kind="stable")
            begin = best[rng.integers(1 + len(best) // 4, size=self.chains)]
            annealed = anneal(
                energy,
                removed.shape[1],
                (0, removed.shape[1]),
                steps=self.steps,
                cooling=self.cooling,
                start=torch.from_numpy(removed[begin]),
                seed=self.seed + number,
            )
            found = annealed.removed[annealed.energy.argsort(stable=True)].unique_consecutive(dim=0)
            # Chains that have cooled end alike; one flip away from where they end there is more to see.
            around = torch.cat([found, with_flips(found[:NEIGHBOURHOODS])])
            queues.append(around[energy.of(around).argsort(stable=True)].numpy())
        taken: dict[bytes, np.ndarray] = {}
        for turn in zip_longest(*queues):
            for state in turn:
                if state is not None and state.tobytes() not in survey.asked and len(taken) < count:
                    taken.setdefault(state.tobytes(), state)
        return list(taken.values())

    def _ensembles(self, survey: Survey, prior: Prior, rng: np.random.Generator) -> tuple[list[Linear], list[Linear]]:
        """What may be so of gaps and of log-perplexity, after all that was measured."""
        removed = np.stack([one.state for one in survey.found])
        energies = np.array([survey.energy(one) for one in survey.found])
        weights = 1 / (1 + ((energies - energies.min()) / NEAR) ** 2)
        start = survey.draw.unpruned.value.ravel()
        gaps = learn(
            removed,
            np.stack([one.gaps.value.ravel() for one in survey.found]),
            start,
            prior.effect[:, None] * start / survey.before,
            weights,
        )
        measured = np.array([min(one.increase, MOST_LIMITS * survey.limit) for one in survey.found])
        damage = removed @ prior.damage
        scale = max(0.0, float((weights * damage) @ measured / max(1e-12, (weights * damage) @ damage)))
        increases = learn(removed, measured[:, None], np.zeros(1), scale * prior.damage[:, None], weights)
        return gaps.draw(self.members, rng), increases.draw(self.members, rng)


@dataclass(frozen=True, eq=False)
class Prior:
    """What attribution predicts of each item: effect, its change of D, and damage, nats per token; both (items,)."""

    effect: np.ndarray
    damage: np.ndarray

    @classmethod
    def of(cls, scores: Effects, items: list[np.ndarray]) -> Prior:
        return cls(
            np.array([scores.effect[units].sum() for units in items]),
            np.array([scores.damage[units].sum() for units in items]),
        )


@dataclass(eq=False)
class Survey:
    """What was measured of states over items.

    Attributes
    ----------
    draw: of the fit part. items: the units of each item, flat positions.
    before: D of the unpruned model. limit: the increase of log-perplexity that the prices are relative to.
    race: on a slice of the part.
    found: the states with finite answers, in the order of measurement. asked: all states, by their bytes.
    spent: evaluations so far; those on the slice count by its share.
    """

    problem: Problem
    draw: Draw
    items: list[np.ndarray]
    before: float
    limit: float
    unpruned: float
    race: Race
    found: list[Measured] = field(default_factory=list)
    asked: set[bytes] = field(default_factory=set)
    spent: float = 0.0

    @classmethod
    def prepare(cls, problem: Problem, items: list[np.ndarray], settings: Annealing) -> Survey:
        draw = Draw.staggered(problem.fit, settings.markers, settings.windows, settings.seed)
        limit, unpruned = float(np.log1p(problem.limit)), float(np.log(draw.part.perplexity()))
        before = max(draw.unpruned.disparity, 1e-6)
        return cls(problem, draw, items, before, limit, unpruned, Race.on(draw.part, settings.seed))

    def energy(self, one: Measured, price: float = 1.0) -> float:
        """D / D before + price * cost / limit, as measured."""
        return one.bias / self.before + price * one.cost / self.limit

    def price_of(self, race: int) -> float:
        """Evaluations that one state on the whole part takes, with those looked at on the slice for it."""
        return 1 + (race * self.race.share if race > 1 else 0)

    def winners(self, states: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        """The most promising of states, as a slice of the part tells; all where there is no more than ``count``."""
        if len(states) <= count:
            return list(states)
        first = self.race.first
        draw, unpruned = self.draw.on(first), float(np.log(first.perplexity()))

        def energy(mask: AnyMask, found: Measurement) -> float:
            increase = float(np.log(first.perplexity(mask))) - unpruned
            return draw.read(found.table).disparity / self.before + max(0.0, increase / self.limit)

        masks = [self.problem.mask(self.units_of(state)) for state in states]
        self.spent += len(states) * self.race.share
        winners = self.race.winners(masks, count, energy)
        lost = [state.tobytes() for number, state in enumerate(states) if number not in winners]
        self.asked.update(lost)  # and not proposed again
        return [states[number] for number in winners]

    def units_of(self, state: np.ndarray) -> np.ndarray:
        """Flat positions of what a state removes."""
        chosen = [self.items[item] for item in np.flatnonzero(state)]
        return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=int)

    def measure(self, states: Sequence[np.ndarray], advance: Advance = lambda _: None) -> None:
        """Measure states on the model, each once; ``advance`` is told of the states."""
        new = {state.tobytes(): state for state in states if state.tobytes() not in self.asked}
        self.asked.update(new)
        self.spent += len(new)
        drawn, all_masks = list(new.values()), [self.problem.mask(self.units_of(state)) for state in new.values()]
        order = walking_order(all_masks)
        masks = [all_masks[number] for number in order]
        part = self.draw.part
        measured = part.evaluate_each(masks, whole(advance, part.work(utility=True)), utility=True)
        for state, mask, found in zip([drawn[number] for number in order], masks, measured, strict=True):
            if found is not None:
                increase = float(np.log(part.perplexity(mask))) - self.unpruned
                self.found.append(Measured(state, self.draw.read(found.table), increase, len(mask.removed)))
            if self.found:
                best = min(self.found, key=self.order)
                self.problem.status(f"best so far D {best.bias:.2f} at {np.expm1(best.increase):+.1%}")

    def front(self) -> list[Measured]:
        """The states that no other dominates and that remove something, the least bias within the limit first."""
        best = [one for one in self.found if one.units and not any(other.dominates(one) for other in self.found)]
        return sorted(best, key=self.order)

    def finalists(self, count: int) -> list[Measured]:
        """Of the front, those that together dominate most of what lies below bias before and some limits of cost."""
        left, taken = self.front(), list[Measured]()
        while left and len(taken) < count:
            gained = [self._volume([*taken, one]) for one in left]
            taken.append(left.pop(int(np.argmax(gained))))
        return sorted(taken, key=self.order)

    def _volume(self, front: Sequence[Measured]) -> float:
        """The area that is dominated, in units of bias before and the limit."""
        area, lowest = 0.0, self.before
        for one in sorted(front, key=lambda one: (one.cost, one.bias)):
            room = MOST_LIMITS * self.limit - one.cost
            if one.bias < lowest and room > 0:
                area += (lowest - one.bias) * room
                lowest = one.bias
        return area

    def order(self, one: Measured) -> tuple[bool, float, int]:
        """What measured states are sorted by: the least bias within the limit first."""
        return one.increase > self.limit, one.bias, one.units


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


def first_states(items: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """States to begin with: none, beginnings of the order, the first items alone, then beginnings changed at random."""
    order = np.arange(items)
    ends = np.unique(np.round(np.geomspace(1, items, 1 + count // 4)).astype(int))
    states = [order < end for end in (0, *ends)]
    states += [order == item for item in range(min(items, SINGLES, count // 8))]
    while len(states) < count:
        begun = order < round(float(np.exp(rng.uniform(0, np.log(items)))))
        states.append(begun ^ (rng.random(items) < CHANGED * rng.random()))
    return states[:count]


def with_flips(states: Tensor) -> Tensor:
    """All states that differ from one of these in one item, bool (states * items, items)."""
    items = states.shape[1]
    return (states[:, None, :] ^ torch.eye(items, dtype=torch.bool)).reshape(-1, items)
