"""Simulated annealing over sets of removed units, thousands of chains at a time.

Every chain flips one unit per step, stays within bounds on how many are removed, and keeps the best state it has seen.
T0 comes from a random walk: the temperature at which a move that raises the energy by as much as those of the walk do
on average is accepted with probability chi0, T0 = -mean(rise) / ln(chi0). Cooling is logarithmic, T_i = T0 / ln(2 + i)
as in Attention Pruning (Dasu et al., arXiv 2503.15815), or geometric, from T0 to a thousandth of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from secateur.progress import Advance
from secateur.scoring.surrogate import Surrogate, draw_states

Cooling = Literal["logarithmic", "geometric"]
WALK_STEPS = 50
LAST_SHARE = 1e-3
REFRESHED_EVERY = 500


class Additive(Protocol):
    """Predicts from a layer to which every removed unit adds its own row."""

    @property
    def inward(self) -> Tensor:
        """(units, width)."""
        ...

    def hidden(self, removed: Tensor) -> Tensor:
        """The layer, (states, width), of states (states, units)."""
        ...


class StateEnergy(ABC):
    """What chains lower: a number per state from surrogates' predictions, cheap to update after a flip."""

    @abstractmethod
    def networks(self) -> Sequence[Additive]:
        """The surrogates."""

    @abstractmethod
    def read(self, hidden: Sequence[Tensor]) -> Tensor:
        """The energies, (chains,), from :meth:`hidden`."""

    def hidden(self, removed: Tensor) -> list[Tensor]:
        """Per surrogate, the hidden layer's input, (chains, width), of states, bool (chains, units)."""
        return [surrogate.hidden(removed) for surrogate in self.networks()]

    def of(self, removed: Tensor) -> Tensor:
        """The energies, (chains,), of states."""
        return self.read(self.hidden(removed))

    def flipped(self, hidden: Sequence[Tensor], unit: Tensor, sign: Tensor) -> list[Tensor]:
        """Per surrogate, the hidden layer's input after one flip per chain.

        Parameters
        ----------
        unit: (chains,), which unit flips. sign: (chains,), +1 where it is removed, -1 where it comes back.
        """
        return [h + sign[:, None] * one.inward[unit] for h, one in zip(hidden, self.networks(), strict=True)]


@dataclass(frozen=True, eq=False)
class Energy(StateEnergy):
    """A weighted sum of surrogates' predictions.

    Attributes
    ----------
    surrogates: what is predicted. weights: of each.
    """

    surrogates: Sequence[Surrogate]
    weights: Sequence[float]

    def networks(self) -> Sequence[Surrogate]:
        return self.surrogates

    def read(self, hidden: Sequence[Tensor]) -> Tensor:
        """(chains,)."""
        return torch.stack(
            [weight * one.read(h) for weight, one, h in zip(self.weights, self.surrogates, hidden, strict=True)]
        ).sum(dim=0)


@dataclass(frozen=True, eq=False)
class Annealed:
    """Where the chains came to.

    Attributes
    ----------
    removed: bool (chains, units), the best state of every chain. energy: (chains,), its energy.
    start_temperature: T0. accepted: share of all moves that were accepted.
    """

    removed: Tensor
    energy: Tensor
    start_temperature: float
    accepted: float


@dataclass(frozen=True, eq=False)
class _Moves:
    """One flip for every chain.

    Attributes
    ----------
    unit, sign: see :meth:`StateEnergy.flipped`. hidden, energy: of the chain after it.
    allowed: bool (chains,), whether it stays within the bounds.
    """

    unit: Tensor
    sign: Tensor
    hidden: list[Tensor]
    energy: Tensor
    allowed: Tensor


@dataclass(eq=False)
class _Chains:
    """Where the chains are.

    Attributes
    ----------
    of: what they lower. bounds: on the number of removed units. generator: of all luck.
    state: bool (chains, units). hidden, energy, removed: of it; the last is the number of removed units, (chains,).
    """

    of: StateEnergy
    bounds: tuple[int, int]
    generator: torch.Generator
    state: Tensor
    hidden: list[Tensor] = field(init=False)
    energy: Tensor = field(init=False)
    removed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.removed = self.state.sum(dim=1)
        self.refresh()

    def refresh(self) -> None:
        """Compute anew what flips have only added to: sums of many drift."""
        self.hidden = self.of.hidden(self.state)
        self.energy = self.of.read(self.hidden)

    def propose(self) -> _Moves:
        """Flip a unit drawn at random in every chain."""
        chains, units = self.state.shape
        unit = torch.randint(units, (chains,), generator=self.generator)
        sign = 1 - 2 * self.state[torch.arange(chains), unit].long()
        after = self.of.flipped(self.hidden, unit, sign.to(self.energy))
        least, most = self.bounds
        count = self.removed + sign
        return _Moves(unit, sign, after, self.of.read(after), (count >= least) & (count <= most))

    def take(self, taken: Tensor, moves: _Moves) -> None:
        """Make the moves of some chains, bool (chains,)."""
        rows, unit = taken.nonzero()[:, 0], moves.unit[taken]
        self.state[rows, unit] = ~self.state[rows, unit]
        self.hidden = [
            torch.where(taken[:, None], new, old) for new, old in zip(moves.hidden, self.hidden, strict=True)
        ]
        self.energy = torch.where(taken, moves.energy, self.energy)
        self.removed = self.removed + torch.where(taken, moves.sign, 0)


@torch.no_grad()
def anneal(
    energy: StateEnergy,
    units: int,
    bounds: tuple[int, int],
    *,
    chains: int = 1000,
    steps: int = 10_000,
    cooling: Cooling = "logarithmic",
    acceptance: float = 0.75,
    start: Tensor | None = None,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Annealed:
    """Lower an energy by simulated annealing.

    Parameters
    ----------
    units: in a state. bounds: the least and the greatest number of removed units.
    acceptance: chi0, the probability with which T0 accepts the average rise of a random walk.
    start: bool (chains, units) within the bounds; None draws counts evenly within the bounds, and units evenly.
    advance: told of the steps as they are made.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = draw_states(units, bounds, chains, generator) if start is None else start
    first = _start_temperature(_Chains(energy, bounds, generator, begin.clone()), acceptance)
    now = _Chains(energy, bounds, generator, begin.clone())
    best, least = begin.clone(), now.energy
    moved = 0
    for step in range(steps):
        moves = now.propose()
        luck = torch.rand(len(begin), generator=generator)
        temperature = _temperature(first, step, steps, cooling)
        taken = moves.allowed & (luck < ((now.energy - moves.energy) / temperature).exp())
        now.take(taken, moves)
        moved += int(taken.sum())
        better = now.energy < least
        least = torch.where(better, now.energy, least)
        best[better] = now.state[better]
        if (step + 1) % REFRESHED_EVERY == 0:
            now.refresh()
        advance(1)
    return Annealed(best, energy.of(best), first, moved / max(1, steps * len(begin)))


def _temperature(start: float, step: int, steps: int, cooling: Cooling) -> float:
    if cooling == "logarithmic":
        return start / float(torch.log(torch.tensor(2.0 + step)))
    return start * float(LAST_SHARE ** (step / max(1, steps - 1)))


def _start_temperature(walk: _Chains, acceptance: float) -> float:
    """T0 from the rises of energy along a random walk, which takes every move within the bounds."""
    rises = []
    for _ in range(WALK_STEPS):
        moves = walk.propose()
        rise = (moves.energy - walk.energy)[moves.allowed]
        rises.append(rise[rise > 0])
        walk.take(moves.allowed, moves)
    found = torch.cat(rises)
    if not len(found):
        return 1e-6
    return max(1e-6, float(-found.mean() / torch.log(torch.tensor(acceptance))))
