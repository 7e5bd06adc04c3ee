"""Simulated annealing over sets of removed units, thousands of chains at a time.

Every chain flips one unit per step, stays within bounds on how many are removed, and keeps the best state it
has seen. T0 comes from a random walk: the temperature at which a share chi0 of its moves would be accepted,
T0 = -mean(rise) / ln(chi0) over the moves that raise the energy. Cooling is logarithmic, T_i = T0 / ln(2 + i) as in
Attention Pruning (Dasu et al., arXiv 2503.15815), or geometric, from T0 to a thousandth of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    acceptance: chi0, the share of the moves of a random walk that T0 accepts.
    start: bool (chains, units) within the bounds; None draws counts evenly within the bounds, and units evenly.
    advance: told of the steps as they are made.
    """
    generator = torch.Generator().manual_seed(seed)
    least, most = bounds
    state = draw_states(units, bounds, chains, generator) if start is None else start.clone()
    hidden, count = energy.hidden(state), state.sum(dim=1)
    now = energy.read(hidden)
    best, best_state = now.clone(), state.clone()
    rows = torch.arange(len(state))

    def propose() -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
        """A unit per chain, the sign of its flip, what becomes of the chain, and whether it stays within the bounds."""
        unit = torch.randint(units, (len(state),), generator=generator)
        sign = 1 - 2 * state[rows, unit].long()
        allowed = (count + sign >= least) & (count + sign <= most)
        after = energy.flipped(hidden, unit, sign.to(now))
        return unit, sign, after, energy.read(after), allowed

    def accept(taken: Tensor, unit: Tensor, sign: Tensor, after: list[Tensor], value: Tensor) -> None:
        nonlocal hidden, now, count, best
        chosen = unit[taken]
        state[rows[taken], chosen] = ~state[rows[taken], chosen]
        hidden = [torch.where(taken[:, None], new, old) for new, old in zip(after, hidden, strict=True)]
        now = torch.where(taken, value, now)
        count = count + torch.where(taken, sign, 0)
        better = now < best
        best = torch.where(better, now, best)
        best_state[better] = state[better]

    begin = state.clone(), hidden, now, count
    temperature = _start_temperature(propose, accept, lambda: now, acceptance)
    state.copy_(begin[0])  # the walk measures; the chains begin where they were told to
    _, hidden, now, count = begin
    moved = 0
    for step in range(steps):
        unit, sign, after, value, allowed = propose()
        luck = torch.rand(len(state), generator=generator)
        taken = allowed & (luck < ((now - value) / _temperature(temperature, step, steps, cooling)).exp())
        accept(taken, unit, sign, after, value)
        moved += int(taken.sum())
        if (step + 1) % REFRESHED_EVERY == 0:  # sums of many flips drift
            hidden = energy.hidden(state)
            now = energy.read(hidden)
        advance(1)
    return Annealed(best_state, energy.of(best_state), temperature, moved / max(1, steps * len(state)))


def _temperature(start: float, step: int, steps: int, cooling: Cooling) -> float:
    if cooling == "logarithmic":
        return start / float(torch.log(torch.tensor(2.0 + step)))
    return start * float(LAST_SHARE ** (step / max(1, steps - 1)))


def _start_temperature(
    propose: Callable[[], tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]],
    accept: Callable[[Tensor, Tensor, Tensor, list[Tensor], Tensor], None],
    now: Callable[[], Tensor],
    acceptance: float,
) -> float:
    """T0 from the rises of energy along a random walk of all chains, which takes every move within the bounds."""
    rises = []
    for _ in range(WALK_STEPS):
        unit, sign, after, value, allowed = propose()
        rise = (value - now())[allowed]
        rises.append(rise[rise > 0])
        accept(allowed, unit, sign, after, value)
    found = torch.cat(rises)
    if not len(found):
        return 1e-6
    return max(1e-6, float(-found.mean() / torch.log(torch.tensor(acceptance))))
