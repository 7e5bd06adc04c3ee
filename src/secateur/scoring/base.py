"""What every scorer gives, and the interface that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from secateur.evaluation.evaluator import Evaluator
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask

UnitKind = Literal["heads", "neurons"]
Seen = Callable[[float, float], None]
"""Told of a measured mask: D, and the increase of log-perplexity in nats per token."""


class Settings(BaseModel):
    """What a user may set of a method; unknown names and values out of range are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, arbitrary_types_allowed=True)
    kinds: ClassVar[tuple[UnitKind, ...]] = ("heads", "neurons")
    """Of a scorer: the kinds of units that it scores."""
    measures_masks: ClassVar[bool] = False
    """Of a scorer: that it measures mask after mask; ``score`` then takes ``seen``, too, and tells it of each."""

    def quick(self) -> Self:
        """The same for a first look, at a fraction of the cost where :meth:`cheaper` names a way."""
        return self.model_copy(update={k: v for k, v in self.cheaper().items() if k not in self.model_fields_set})

    def cheaper(self) -> dict[str, Any]:
        """Settings for a first look; what a user has set stays as it is."""
        return {}

    def seeded(self, seed: int) -> Self:
        """The same with the seed of a study, where there is a seed and the user has not set it."""
        if "seed" not in type(self).model_fields or "seed" in self.model_fields_set:
            return self
        return self.model_copy(update={"seed": seed})


class Scores(Protocol):
    """What a scorer says about every unit."""

    @property
    def rank(self) -> np.ndarray:
        """(units,): the higher, the sooner a unit is removed; NaN where the scorer says nothing."""
        ...

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Everything that was found, by name, each (units,), NaN where the scorer says nothing."""
        ...


def notes_of(scores: Scores | None) -> list[str]:
    """What a scorer has to say about its scores, in sentences; nothing from most."""
    return list(getattr(scores, "notes", []))


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores that are one order of removal.

    Attributes
    ----------
    rank: (units,), the higher, the sooner a unit is removed; NaN for units that are not scored.
    values: what the order was made from, by name, each (units,).
    """

    rank: np.ndarray
    values: dict[str, np.ndarray]

    def order(self) -> np.ndarray:
        """Flat positions of the scored units in the order of removal; ties go to the lower position."""
        order = np.argsort(-self.rank, kind="stable")  # NaN comes last
        return np.asarray(order[~np.isnan(self.rank[order])])


class Scorer(Protocol):
    """Scores every unit of a model, or those of one kind, from the fit part of the data."""

    kinds: ClassVar[tuple[UnitKind, ...]]
    measures_masks: ClassVar[bool]

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Refuse, before anything is computed, a model or suite that the method cannot work on.

        Raises
        ------
        SettingError: says what to use instead.
        """
        ...

    def score(self, fit: Evaluator, mask: Mask | None, means: ActivationMeans | None, advance: Advance) -> Scores:
        """Score all units of the model as it is under ``mask``."""
        ...

    def work(self, fit: Evaluator) -> int:
        """Steps that one call reports to ``advance``."""
        ...
