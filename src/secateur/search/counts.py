"""``Counts``: the first units of one ranking, for a geometric range of counts."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from secateur.errors import SettingError
from secateur.scoring.base import Ranking, Scorer, Settings
from secateur.search.base import CandidateKind, Problem, Proposals, Selection

PATIENCE = 2


class Counts(Settings):
    """Remove the first k units of a ranking: heads alone and neurons alone, for growing k.

    Attributes
    ----------
    heads, neurons: try this count only; 0 leaves the kind out; None tries a geometric range.
    head_start, neuron_start: the smallest counts of the range.
    factor: ratio of one count to the one before.

    A range ends at half of the units of its kind, or after two counts in a row that break the utility limit.
    """

    heads: Annotated[int | None, Field(ge=0)] = None
    neurons: Annotated[int | None, Field(ge=0)] = None
    head_start: Annotated[int, Field(ge=1)] = 2
    neuron_start: Annotated[int, Field(ge=1)] = 16
    factor: Annotated[float, Field(gt=1)] = 4.0

    def proposals(self, problem: Problem, scorer: Scorer) -> Proposals:
        """Heads alone, then neurons alone, fewest first."""
        space = problem.space
        limits: tuple[tuple[CandidateKind, int | None, int], ...] = (
            ("heads", self.heads, space.n_heads),
            ("neurons", self.neurons, space.n_neurons),
        )
        for kind, asked, largest in limits:
            if asked is not None and asked > largest:
                raise SettingError(f"The model has {largest:,} {kind}, so {asked:,} of them cannot be removed.")
        ranking: Ranking = problem.score(scorer)
        order = ranking.order()
        for kind, asked, _ in limits:
            of_kind = order[order < space.n_heads] if kind == "heads" else order[order >= space.n_heads]
            start = self.head_start if kind == "heads" else self.neuron_start
            counts = geometric(start, len(of_kind) // 2, self.factor) if asked is None else [asked] if asked else []
            over = 0
            for count in counts:
                outcome = yield Selection(kind, of_kind[:count], {"count": count})
                over = 0 if outcome.within_limit else over + 1
                if over == PATIENCE:
                    break


def geometric(start: int, largest: int, factor: float) -> list[int]:
    """Whole counts from ``start`` up to ``largest``, each about ``factor`` times the one before."""
    steps = np.arange(0, 64)
    counts = np.unique(np.round(start * factor ** steps[: _steps(start, largest, factor)]).astype(int))
    return [int(count) for count in counts if count <= largest]


def _steps(start: int, largest: int, factor: float) -> int:
    if largest < start:
        return 0
    return min(64, int(np.log(largest / start) / np.log(factor)) + 2)
