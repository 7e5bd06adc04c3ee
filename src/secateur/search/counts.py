"""``Counts``: the first units of one ranking, for a geometric range of counts."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.errors import SettingError
from secateur.models import LanguageModel
from secateur.scoring.base import Ranking, Scorer, Settings
from secateur.search.base import CandidateKind, Problem, Proposals, Selection
from secateur.units import UnitSpace

PATIENCE = 2


class Counts(Settings):
    """Remove the first k units of a ranking: heads alone and neurons alone, for growing k.

    Attributes
    ----------
    heads, neurons: try this count only; 0 leaves the kind out; None tries a geometric range.
    head_start, neuron_start: the smallest counts of the range.
    factor: ratio of one count to the one before.

    A range ends at half of the units that are scored, or after two counts in a row that break the utility limit.
    Where the ranges start and end is ours: few enough to do no harm, and more than any model can do without.

    Raises
    ------
    SettingError: both counts are 0, a count is larger than the number of units of its kind, or of a kind that the
        scorer does not score.
    """

    heads: Annotated[int | None, Field(ge=0)] = None
    neurons: Annotated[int | None, Field(ge=0)] = None
    head_start: Annotated[int, Field(ge=1)] = 1
    neuron_start: Annotated[int, Field(ge=1)] = 4
    factor: Annotated[float, Field(gt=1)] = 4.0

    def model_post_init(self, context: object) -> None:
        if self.heads == 0 and self.neurons == 0:
            raise SettingError("heads and neurons are both 0, so there would be no candidate.")

    def cheaper(self) -> dict[str, Any]:
        return {"factor": 8.0}

    def check(self, model: LanguageModel, scorer: Scorer, ablation: str) -> None:
        """Refuse counts above what there is or is scored."""
        space = UnitSpace.of(model)
        asked = {"heads": (self.heads, space.n_heads), "neurons": (self.neurons, space.n_neurons)}
        for kind, (count, available) in asked.items():
            if count and kind not in scorer.kinds:
                raise SettingError(f"the method scores {scorer.kinds[0]} only; leave the setting '{kind}' out.")
            if count is not None and count > available:
                raise SettingError(
                    f"the model has {available:,} {kind}, so {count:,} of them cannot be removed; set '{kind}' to "
                    f"{available // 2:,} or less."
                )
        if all(asked[kind][0] == 0 for kind in scorer.kinds):
            raise SettingError(f"'{scorer.kinds[0]}' is 0, and the method scores no others; leave the setting out.")

    def proposals(self, problem: Problem, scorer: Scorer) -> Proposals:
        """Heads alone, then neurons alone, fewest first."""
        ranking: Ranking = problem.score(scorer)
        order, n_heads = ranking.order(), problem.space.n_heads
        heads, neurons = order[order < n_heads], order[order >= n_heads]
        yield from self._growing("heads", heads, self.heads, self.head_start)
        yield from self._growing("neurons", neurons, self.neurons, self.neuron_start)

    def _growing(self, kind: CandidateKind, order: np.ndarray, asked: int | None, start: int) -> Proposals:
        """The first units of an order of one kind: as many as asked for, or more and more."""
        counts = geometric(start, len(order) // 2, self.factor) if asked is None else [asked] if asked else []
        over = 0
        for count in counts:
            outcome = yield Selection(kind, order[:count], {"count": count})
            over = 0 if outcome.within_limit else over + 1
            if over == PATIENCE:
                return


def geometric(start: int, largest: int, factor: float) -> list[int]:
    """Whole counts from ``start`` up to ``largest``, each ``factor`` times the one before, but at least one more."""
    counts, count = [], start
    while count <= largest:
        counts.append(count)
        count = max(count + 1, round(min(count * factor, largest + 1)))
    return counts
