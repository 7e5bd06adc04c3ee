"""``annealing``: heads and blocks of neurons in one search, from attribution, on surrogates that can tell their doubt.

The search moves among *items*: single heads, and blocks of neurons that stand together in the order of attribution. It
begins with masks around that order, measures them on a draw of the fit part, and goes on in rounds: train an
ensemble of surrogates for bias and one for log-perplexity on all that was measured, anneal, measure the most
promising states on the model, train again. A state's energy counts the disagreement of an ensemble against it. What
is proposed in the end is the Pareto front of bias, log-perplexity and removed units.
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

from secateur.evaluation.evaluator import Evaluator, Measurement
from secateur.evaluation.racing import Race
from secateur.evaluation.walk import walking_order
from secateur.measures.prompts import PromptDraw
from secateur.models import LanguageModel
from secateur.progress import Advance, whole
from secateur.scoring.attribution import Attribution, Effects, disparity
from secateur.scoring.base import Settings
from secateur.scoring.surrogate import Surrogate, train
from secateur.search.base import Problem, Proposals, Selection, check_counts
from secateur.search.chains import Cooling, StateEnergy, anneal
from secateur.search.elimination import ranking
from secateur.units import UnitSpace
from secateur.weights import AnyMask

# Prices of log-perplexity against bias: each gives its own end of the Pareto front.
PRICES = (0.5, 1.0, 2.0)
NEIGHBOURHOODS = 8


@dataclass(frozen=True, eq=False)
class Measured:
    """A state that was measured.

    Attributes
    ----------
    state: bool (items,), what is removed. bias: D. increase: of log-perplexity, nats per token. units: removed.
    """

    state: np.ndarray
    bias: float
    increase: float
    units: int

    def dominates(self, other: Measured) -> bool:
        """Whether it is at least as good in everything, and better in something."""
        mine, yours = (self.bias, self.increase, self.units), (other.bias, other.increase, other.units)
        return all(a <= b for a, b in zip(mine, yours, strict=True)) and mine != yours


@dataclass(frozen=True, eq=False)
class CautiousEnergy(StateEnergy):
    """bias + price · max(0, increase) per limit, each by an ensemble: its mean plus its disagreement.

    Attributes
    ----------
    bias, increase: ensembles of surrogates, trained on standardised figures.
    price: of the increase. caution: weight of an ensemble's standard deviation.
    """

    bias: Sequence[Surrogate]
    increase: Sequence[Surrogate]
    price: float
    caution: float

    def networks(self) -> list[Surrogate]:
        return [*self.bias, *self.increase]

    def read(self, hidden: Sequence[Tensor]) -> Tensor:
        """(chains,)."""
        predicted = torch.stack([one.read(h) for one, h in zip(self.networks(), hidden, strict=True)])
        bias, increase = predicted[: len(self.bias)], predicted[len(self.bias) :]
        cautious = [part.mean(dim=0) + self.caution * part.std(dim=0, correction=0) for part in (bias, increase)]
        return cautious[0] + self.price * cautious[1].relu()


class Annealing(Settings):
    """Rounds of surrogates, annealing and measurement over heads and blocks of neurons.

    Attributes
    ----------
    evaluations: masks measured on the fit part in all; those on a slice of it count by its share.
    heads, neurons: how many of each, the first in the order of attribution, may be removed.
    block: neurons in a block; the first blocks are smaller (an eighth, a quarter, a half).
    rounds: of training and measuring after the first masks, which take a third of the evaluations.
    members: surrogates in an ensemble, each trained on masks drawn with replacement.
    caution: weight of an ensemble's disagreement, in standard deviations.
    chains, steps, cooling: of the annealing.
    markers: of each group in the draw of prompts, from all scenarios. windows: of the neutral text.
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
        survey = Survey.prepare(problem, items, self)
        with problem.step("Measure masks to learn from", self.evaluations) as advance:
            rng = np.random.default_rng(self.seed)
            first = max(4, self.evaluations // 3)
            survey.measure(first_states(len(items), first, rng), advance)
            for number in range(self.rounds):
                share = (self.evaluations - survey.spent) / (self.rounds - number)
                price = survey.price_of(self.race)
                if survey.spent + price > self.evaluations + 1e-9:
                    break
                count = max(1, int(share / price))
                states = self._promising(survey, self.race * count, number)
                if not states:  # all there is near the best is known
                    break
                survey.measure(survey.winners(states, count), advance)
        for found in survey.front()[: self.finalists]:
            removed = survey.units_of(found.state)
            yield Selection.of_units(removed, problem.space, {"fit_bias": found.bias})

    def _promising(self, survey: Survey, count: int, number: int) -> list[np.ndarray]:
        """New states of low energy, the prices taking turns."""
        removed = np.stack([one.state for one in survey.found])
        bias = np.array([one.bias for one in survey.found])
        increase = np.array([one.increase for one in survey.found]) / survey.limit
        ensembles = [self._ensemble(removed, figures, number) for figures in (bias, np.minimum(increase, 10.0))]
        queues = []
        for price in PRICES:
            energy = CautiousEnergy(ensembles[0], ensembles[1], price * max(bias.std(), 1e-6), self.caution)
            begin = np.random.default_rng([self.seed, number]).integers(len(removed), size=self.chains)
            annealed = anneal(
                energy,
                removed.shape[1],
                (0, removed.shape[1]),
                steps=self.steps,
                cooling=self.cooling,
                start=torch.from_numpy(removed[begin]),
                seed=self.seed + number,
            )
            best = annealed.removed[annealed.energy.argsort(stable=True)].unique_consecutive(dim=0)
            # Chains that have cooled end alike; one flip away from where they end there is more to see.
            around = torch.cat([best, with_flips(best[:NEIGHBOURHOODS])])
            queues.append(around[energy.of(around).argsort(stable=True)].numpy())
        taken: dict[bytes, np.ndarray] = {}
        for turn in zip_longest(*queues):
            for state in turn:
                if state is not None and state.tobytes() not in survey.asked and len(taken) < count:
                    taken.setdefault(state.tobytes(), state)
        return list(taken.values())

    def _ensemble(self, removed: np.ndarray, figures: np.ndarray, number: int) -> list[Surrogate]:
        rng = np.random.default_rng([self.seed, number])
        drawn = [rng.integers(len(figures), size=len(figures)) for _ in range(self.members)]
        return [train(removed[rows], figures[rows], self.seed + member) for member, rows in enumerate(drawn)]


@dataclass(eq=False)
class Survey:
    """What was measured of states over items.

    Attributes
    ----------
    part: the draw of the fit part. items: the units of each item, flat positions.
    limit: the increase of log-perplexity that the prices are relative to.
    race: on a slice of the part.
    found: the states with finite answers, in the order of measurement. asked: all states, by their bytes.
    spent: evaluations so far; those on the slice count by its share.
    """

    problem: Problem
    part: Evaluator
    items: list[np.ndarray]
    limit: float
    unpruned: float
    race: Race
    found: list[Measured] = field(default_factory=list)
    asked: set[bytes] = field(default_factory=set)
    spent: float = 0.0

    @classmethod
    def prepare(cls, problem: Problem, items: list[np.ndarray], settings: Annealing) -> Survey:
        fit = problem.fit
        assert fit.text is not None, "annealing needs neutral text"
        prompts = PromptDraw.stratified(fit.prompts, settings.markers, None, settings.seed).of(fit.prompts)
        text = fit.text.first(settings.windows)
        part = fit.on(prompts, text, walk=True)
        race = Race.on(part, settings.seed)
        return cls(problem, part, items, float(np.log1p(problem.limit)), float(np.log(part.perplexity())), race)

    def price_of(self, race: int) -> float:
        """Evaluations that one state on the whole part takes, with those looked at on the slice for it."""
        return 1 + (race * self.race.share if race > 1 else 0)

    def winners(self, states: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        """The most promising of states, as a slice of the part tells; all where there is no more than ``count``."""
        if len(states) <= count:
            return list(states)
        first = self.race.first
        before, unpruned = disparity(first.evaluate().table), float(np.log(first.perplexity()))

        def energy(mask: AnyMask, found: Measurement) -> float:
            increase = float(np.log(first.perplexity(mask))) - unpruned
            return disparity(found.table) / max(before, 1e-9) + max(0.0, increase / self.limit)

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
        measured = self.part.evaluate_each(masks, whole(advance, self.part.work(utility=True)), utility=True)
        for state, mask, found in zip([drawn[number] for number in order], masks, measured, strict=True):
            if found is not None:
                increase = float(np.log(self.part.perplexity(mask))) - self.unpruned
                self.found.append(Measured(state, disparity(found.table), increase, len(mask.removed)))
            if self.found:
                best = min(self.found, key=self.order)
                self.problem.status(f"best so far D {best.bias:.2f} at {np.expm1(best.increase):+.1%}")

    def front(self) -> list[Measured]:
        """The states that no other dominates and that remove something, the least bias within the limit first."""
        best = [one for one in self.found if one.units and not any(other.dominates(one) for other in self.found)]
        return sorted(best, key=self.order)

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
    """States to begin with: none, each item alone as far as there is room, then random ones that favour first items."""
    states = [np.zeros(items, dtype=bool)]
    for item in range(min(items, (count - 1) // 2)):
        states.append(np.arange(items) == item)
    favour = np.exp(-2 * np.arange(items) / max(1, items))
    while len(states) < count:
        states.append(rng.random(items) < rng.uniform(0.05, 0.5) * favour)
    return states


def with_flips(states: Tensor) -> Tensor:
    """All states that differ from one of these in one item, bool (states * items, items)."""
    items = states.shape[1]
    return (states[:, None, :] ^ torch.eye(items, dtype=torch.bool)).reshape(-1, items)
