"""``gates``: a gate between 0 and 1 for every unit, trained so that bias falls, text stays likely and few gates close.

Gates m_u multiply the units and start at 1. Each step takes one scenario and a little neutral text and lowers

    mean over pairs of groups (gap / spread)^2  +  lambda KL(unpruned || gated)  +  mu sum_u (1 - m_u)  +
    rho sum_u m_u (1 - m_u)

by Adam, after which the gates are clamped to [0, 1]. While all gates may move, the spread is the unpruned model's: with
that under the gates, the easiest way down would be to move the answers to single names apart, which holds for no other
name. The few gates that are trained again go by the spread under the gates, that of D, so that answers which shrink as
a whole win nothing. Each step asks a part of a scenario's markers, all of them in turn, or the gates would be fitted to
a few names. The term in rho, off at first, drives gates to 0 or 1. Relaxed gates for pruning go back to Louizos et al.
(2018); without their noise, the end is as good and simpler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import kl_div

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import Batch, batch_y, pack
from secateur.measures.disparity import Table
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.attribution import pairs_of_groups
from secateur.scoring.base import Settings, UnitKind
from secateur.suites import Suite
from secateur.units import ActivationMeans, Gates, Mask, UnitSpace, gated, masked

TEXT_TOKENS = 128
# Of the unpruned model's spread: what is left of it under gates is not believed below this share.
SPREAD_FLOOR = 0.1
# The last steps are smaller and smaller, so that gates come to rest where many draws agree. Where gates are driven to
# 0 or 1 they rest there anyway: then the last steps are as large as the first, under all of rho, or many gates would be
# left on the way.
REST_SHARE = 0.4
LAST_RATE = 0.1


@dataclass(frozen=True, eq=False)
class GateScores:
    """Trained gates.

    Attributes
    ----------
    gates: (units,), from 0 to 1.
    """

    gates: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """(units,): how far a gate has closed."""
        return np.asarray(1 - self.gates)

    @property
    def values(self) -> dict[str, np.ndarray]:
        return {"gate": self.gates}


class GateTraining(Settings):
    """Train a gate for every head and neuron.

    Attributes
    ----------
    gate_steps: of the first training, from gates of 1.
    learning_rate: of Adam; about the most that a gate moves in one step, but in the last steps, where it falls to a
        tenth unless gates are driven to 0 or 1.
    damage: lambda, the weight of KL in nats per token.
    price: mu, the price of every closed gate.
    prompts: of one scenario in one step, about so many, equally many of each group and at least two markers of each;
        all of them in turn.
    windows: of the neutral text in one step, 128 tokens of each.
    seed: of the draws; that of the study unless it is set.

    All defaults are ours.
    """

    kinds: ClassVar[tuple[UnitKind, ...]] = ("heads", "neurons")
    gate_steps: Annotated[int, Field(ge=1)] = 60
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.03
    damage: Annotated[float, Field(ge=0)] = 5.0
    price: Annotated[float, Field(ge=0)] = 5e-4
    prompts: Annotated[int, Field(ge=4)] = 32
    windows: Annotated[int, Field(ge=1)] = 2
    seed: Annotated[int, Field(ge=0)] = 0

    def cheaper(self) -> dict[str, Any]:
        return {"gate_steps": 24, "learning_rate": 0.06, "prompts": 16, "windows": 1}

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Every supported model and every suite will do."""

    def work(self, fit: Evaluator) -> int:
        """Prompts of the unpruned model, then a step at a time."""
        return len(fit.prompts) + self.gate_steps

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> GateScores:
        """Train gates from 1 on the model as it is under ``mask``.

        Parameters
        ----------
        means: for mean ablation: what a unit at gate 0 gives instead of zero.
        """
        table = fit.evaluate(mask, advance).table
        start = np.ones(len(UnitSpace.of(fit.model)), dtype=np.float32)
        with masked(fit.model, mask):
            course = Course.prepare(fit, table, self.prompts, self.seed)
            return GateScores(self.train(course, start, self.gate_steps, means=means, advance=advance))

    def train(
        self,
        course: Course,
        start: np.ndarray,
        steps: int,
        *,
        free: np.ndarray | None = None,
        own_spread: bool = False,
        damage: float | None = None,
        polarity: float = 0.0,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> np.ndarray:
        """Train gates on the model as it is, (units,).

        Parameters
        ----------
        course: what to train on; it goes on where the last training left it.
        start: (units,), the gates to begin with.
        free: bool (units,), the gates that may move; None for all.
        own_spread: standardise gaps by the spread under the gates instead of the unpruned model's.
        damage: lambda, if it is not to be that of the settings.
        polarity: rho in the last steps; it rises evenly from 0 before. With it the learning rate stays as it is.
        """
        model, space = course.model, UnitSpace.of(course.model)
        gates = Gates.ones(model, (), means)
        leaves, slices = gates.leaves(), _slices(space)
        held = torch.from_numpy(start.astype(np.float32))
        moving = torch.ones(len(space), dtype=torch.bool) if free is None else torch.from_numpy(free)
        for leaf, place in zip(leaves, slices, strict=True):
            leaf.data.copy_(held[place])
        optimiser = torch.optim.Adam(leaves, lr=self.learning_rate)
        for step in range(steps):
            optimiser.zero_grad()
            optimiser.param_groups[0]["lr"] = self.learning_rate * (1.0 if polarity else _rate(step, steps))
            weight = self.damage if damage is None else damage
            with torch.enable_grad(), gated(model, gates), model.arithmetic():
                course.disparity(own_spread).backward()  # type: ignore[no-untyped-call]
                (weight * course.divergence(self.windows)).backward()  # type: ignore[no-untyped-call]
            rho = polarity * min(1.0, step / max(1.0, (1 - REST_SHARE) * steps))
            for leaf, place in zip(leaves, slices, strict=True):
                assert leaf.grad is not None
                leaf.grad += -self.price + rho * (1 - 2 * leaf.detach())
                leaf.grad[~moving[place].to(leaf.device)] = 0
            optimiser.step()
            for leaf, place in zip(leaves, slices, strict=True):
                leaf.data.clamp_(0, 1)
                still = ~moving[place].to(leaf.device)
                leaf.data[still] = held[place].to(leaf.device)[still]
            advance(1)
        return torch.cat([leaf.detach().cpu() for leaf in leaves]).numpy()


@dataclass(frozen=True, eq=False)
class LessonPart:
    """What one step asks: one scenario of some markers of each group.

    Attributes
    ----------
    batches: the prompts in one or more forward passes. markers: (prompts,), the number of each prompt's marker.
    groups: (markers,), the group of each marker.
    variance: within groups, of the unpruned model.
    """

    batches: list[Batch]
    markers: Tensor
    groups: Tensor
    variance: float

    def gaps(self, y: Tensor, own_spread: bool = False) -> Tensor:
        """Mean over pairs of groups of (gap / spread)^2, from y by prompt, (prompts,).

        Parameters
        ----------
        own_spread: that of y, as far as it is believed, instead of the unpruned model's.
        """
        owner = self.markers.to(y.device)
        total, count = (y.new_zeros(len(self.groups)).index_add(0, owner, one) for one in (y, torch.ones_like(y)))
        by_group = [(total / count)[(self.groups == group).to(y.device)] for group in self.groups.unique()]
        gaps = torch.stack([one.mean() - other.mean() for one, other in combinations(by_group, 2)])
        if not own_spread:
            return gaps.square().mean() / self.variance
        variance = torch.stack([some.var() for some in by_group]).mean()
        return gaps.square().mean() / variance.clamp_min(SPREAD_FLOOR**2 * self.variance)


@dataclass(frozen=True, eq=False)
class Lesson:
    """The prompts of a training, packed part by part."""

    fit: Evaluator
    parts: list[LessonPart]

    @classmethod
    def prepare(cls, fit: Evaluator, table: Table, prompts: int, seed: int | Sequence[int]) -> Lesson:
        """Deal the markers of every group into parts of about equal size, and all of them to every scenario.

        Parameters
        ----------
        table: answers of the unpruned model, whose spread standardises the gaps.
        prompts: in a part, about so many.
        """
        rng, known = np.random.default_rng(seed), fit.prompts
        groups = np.unique(known.groups)
        members = [np.array(known.markers)[known.groups == group] for group in groups]
        fewest = min(map(len, members))
        *_, spread = next(pairs_of_groups(table))  # (scenarios,), one for all pairs
        group_of = dict(zip(known.markers, known.groups.tolist(), strict=True))
        parts = []
        for row, scenario in enumerate(known.scenarios):
            wordings = len(known.of_scenarios([scenario])) / len(known.markers)
            wanted = round(fewest * len(groups) * wordings / prompts)
            deals = max(1, min(fewest // 2, wanted))  # a spread needs two of each
            dealt = [np.array_split(rng.permutation(some), deals) for some in members]
            for hands in zip(*dealt, strict=True):
                drawn = set(np.concatenate(hands).tolist())
                asked = known.where(np.array([p.scenario == scenario and p.marker in drawn for p in known.prompts]))
                named = sorted(drawn)
                owner = torch.tensor([named.index(prompt.marker) for prompt in asked.prompts])
                of_groups = torch.tensor([group_of[marker] for marker in named])
                variance = float(spread[row]) ** 2
                parts.append(LessonPart(pack(fit.model, asked, fit.batch_size), owner, of_groups, variance))
        return cls(fit, parts)

    def loss(self, model: LanguageModel, number: int, own_spread: bool = False) -> Tensor:
        """Mean over pairs of (gap / spread)^2 in one part; see :meth:`LessonPart.gaps`."""
        part = self.parts[number]
        y = torch.cat([batch_y(model, self.fit.prompts.suite, batch) for batch in part.batches])  # (prompts,)
        model.usage.backward += sum(batch.tokens for batch in part.batches)
        return part.gaps(y, own_spread)


@dataclass(frozen=True, eq=False)
class _Text:
    """Beginnings of windows of neutral text, and the unpruned model's hidden states there.

    Attributes
    ----------
    tokens: per window, (length,). hidden: per window, (length, hidden).
    """

    tokens: list[Tensor]
    hidden: list[Tensor]

    @classmethod
    @torch.no_grad()
    def prepare(cls, fit: Evaluator, length: int) -> _Text:
        assert fit.text is not None, "gates need neutral text"
        tokens = [window.tokens[:length] for window in fit.text.windows]
        return cls(tokens, [fit.model.hidden(one[None], None, None)[0] for one in tokens])

    def divergence(self, model: LanguageModel, windows: np.ndarray) -> Tensor:
        """KL(unpruned || as it is) in nats per token of some windows."""
        parts, count = [], 0
        for number in windows:
            hidden = model.hidden(self.tokens[number][None], None, None)[0]
            with torch.no_grad():
                before = model.log_probabilities(self.hidden[number])
            parts.append(kl_div(model.log_probabilities(hidden), before, reduction="sum", log_target=True))
            count += len(hidden)
        model.usage.backward += count
        return torch.stack(parts).sum() / count


@dataclass(frozen=True, eq=False)
class Course:
    """What gates are trained on: lessons in turn and neutral text, prepared once for several trainings in a row.

    Attributes
    ----------
    turns: numbers of the parts of the lesson, for ever. rng: of the windows of text.
    """

    lesson: Lesson
    text: _Text
    turns: Iterator[int]
    rng: np.random.Generator

    @classmethod
    def prepare(cls, fit: Evaluator, table: Table, prompts: int, seed: int | Sequence[int]) -> Course:
        """A course on the model as it is; see :meth:`Lesson.prepare`."""
        lesson, rng = Lesson.prepare(fit, table, prompts, seed), np.random.default_rng(seed)
        return cls(lesson, _Text.prepare(fit, TEXT_TOKENS), _shuffled(rng, len(lesson.parts)), rng)

    @property
    def model(self) -> LanguageModel:
        return self.lesson.fit.model

    def disparity(self, own_spread: bool = False) -> Tensor:
        """Mean over pairs of (gap / spread)^2 in the next part of the lesson; see :meth:`LessonPart.gaps`."""
        return self.lesson.loss(self.model, next(self.turns), own_spread)

    def divergence(self, windows: int) -> Tensor:
        """KL(unpruned || as it is) in nats per token of some windows, drawn anew."""
        return self.text.divergence(self.model, self.rng.permutation(len(self.text.tokens))[:windows])


def _slices(space: UnitSpace) -> list[slice]:
    layers = range(space.n_layers)
    return [*map(space.head_slice, layers), *map(space.neuron_slice, layers)]


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: all of it at first, then evenly down to a tenth."""
    left = (steps - step) / max(1.0, REST_SHARE * steps)
    return max(LAST_RATE, min(1.0, left))


def _shuffled(rng: np.random.Generator, count: int) -> Iterator[int]:
    """Numbers below ``count`` for ever, all of them in a new order each time."""
    while True:
        yield from rng.permutation(count).tolist()
