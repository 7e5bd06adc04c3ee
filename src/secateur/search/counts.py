"""``Counts``: the first units of one ranking, for a geometric range of counts."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.errors import SettingError
from secateur.models import LanguageModel
from secateur.scoring.base import Ranking, Scorer, Settings
from secateur.search.base import CandidateKind, Problem, Proposals, Selection, check_counts
from secateur.units import UnitSpace


class Counts(Settings):
    """Remove the first k units of a ranking: heads alone and neurons alone, for growing k.

    Attributes
    ----------
    heads, neurons: try this count only; 0 leaves the kind out; None tries a geometric range.
    head_start, neuron_start: the smallest counts of the range.
    factor: ratio of one count to the one before.
    patience: how many counts in a row that break the utility limit end a range; one may do so by chance.

    A range ends at half of the units that are scored at the latest. All of this is ours: starts few enough to do no
    harm, ends beyond what a model can do without, and a factor that takes a handful of measurements from the one to
    the other.

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
    patience: Annotated[int, Field(ge=1)] = 2

    def model_post_init(self, context: object) -> None:
        if self.heads == 0 and self.neurons == 0:
            raise SettingError("heads and neurons are both 0, so there would be no candidate.")

    def cheaper(self) -> dict[str, Any]:
        return {"factor": 8.0, "patience": 1}

    def check(self, model: LanguageModel, scorer: Scorer, ablation: str) -> None:
        """Refuse counts above what there is or is scored."""
        asked = {"heads": self.heads, "neurons": self.neurons}
        for kind, count in asked.items():
            if count and kind not in scorer.kinds:
                raise SettingError(f"the method scores {scorer.kinds[0]} only; leave the setting '{kind}' out.")
        check_counts(
            self, UnitSpace.of(model), heads="heads", head_start="heads", neurons="neurons", neuron_start="neurons"
        )
        if all(asked[kind] == 0 for kind in scorer.kinds):
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
            if over == self.patience:
                return


def geometric(start: int, largest: int, factor: float) -> list[int]:
    """Whole counts from ``start`` up to ``largest``, each ``factor`` times the one before, but at least one more."""
    counts, count = [], start
    while count <= largest:
        counts.append(count)
        count = max(count + 1, round(min(count * factor, largest + 1)))
    return counts
