"""What every search has: the problem it is given, what it proposes, and what it is told of a proposal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from secateur.attenuation import Attenuation
from secateur.errors import SettingError
from secateur.evaluation.evaluator import Evaluator
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.base import Scorer, Scores, Settings, UnitKind
from secateur.units import ActivationMeans, Mask, Unit, UnitSpace
from secateur.weights import AnyMask, WeightMask

CandidateKind = Literal["heads", "neurons", "both", "weights"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Units to remove, as flat positions, and the knobs that led to them; or a mask of another kind instead."""

    kind: CandidateKind
    removed: np.ndarray
    knobs: dict[str, Any] = field(default_factory=dict)
    mask: WeightMask | Attenuation | None = None

    @classmethod
    def of_units(
        cls, removed: np.ndarray, space: UnitSpace, knobs: dict[str, Any], mask: Attenuation | None = None
    ) -> Selection:
        """A selection of whatever kinds the units are of."""
        heads = int((removed < space.n_heads).sum())
        kind: CandidateKind = "both" if 0 < heads < len(removed) else "heads" if heads else "neurons"
        return cls(kind, removed, knobs, mask)


@dataclass(frozen=True)
class Outcome:
    """What a search is told of a proposal: its figures on the select part.

    Attributes
    ----------
    bias_square: what is chosen by, for two groups corrected B^2; negative below the noise.
    perplexity_increase: relative.
    within_limit: whether the utility limit is kept.
    """

    bias_square: float
    perplexity_increase: float
    within_limit: bool


Proposals = Generator[Selection, Outcome, None]


@dataclass(eq=False)
class Problem:
    """What a search works on: the model and the fit part, never select or test.

    Attributes
    ----------
    fit: the fit prompts with the fit text.
    folds: the same, the prompts dealt into folds of scenarios.
    step: opens a step of the run's progress. status: says what the running step has reached.
    means: for mean ablation.
    limit: the utility limit, relative; select and test, not the search, decide whether a mask keeps to it.
    scores: of the unpruned model, once they are known.
    localise_tokens: tokens that were forwarded to find the units, the rounds and the trials of a search included, but
        not what is measured on select.
    """

    model: LanguageModel
    fit: Evaluator
    folds: list[Evaluator]
    step: Callable[[str, int], AbstractContextManager[Advance]]
    means: ActivationMeans | None = None
    limit: float = 0.02
    status: Callable[[str], None] = lambda _: None
    scores: Scores | None = None
    localise_tokens: int = 0
    _best: tuple[bool, float, float] = field(init=False, default=(True, np.inf, np.inf))

    @property
    def log_limit(self) -> float:
        """The utility limit as an increase of log-perplexity, nats per token."""
        return float(np.log1p(self.limit))

    def saw(self, bias: float, increase: float) -> None:
        """Say what the best of the masks does that were measured so far: the least bias, within the limit if any is.

        Parameters
        ----------
        bias: D on the draw. increase: of log-perplexity, nats per token.
        """
        self._best = min(self._best, (increase > self.log_limit, bias, increase))
        _, least, paid = self._best
        self.status(f"best so far D {least:.2f} at {np.expm1(paid):+.1%}")

    @property
    def space(self) -> UnitSpace:
        return UnitSpace.of(self.model)

    def mask(self, removed: Iterable[Unit | int]) -> Mask:
        return Mask.removing(self.model, removed, self.means)

    def mask_of(self, selection: Selection) -> AnyMask:
        """The mask of what a search proposes."""
        return self.mask(selection.removed) if selection.mask is None else selection.mask

    def score(self, scorer: Scorer, mask: Mask | None = None, fold: int | None = None) -> Any:
        """Score the model as it is under a mask, on all of fit or on one fold; keep those of the unpruned model."""
        fit = self.fit if fold is None else self.folds[fold % len(self.folds)]
        with self.localising(), self.step("Score every unit", scorer.work(fit)) as advance:
            told = {"seen": self.saw} if scorer.measures_masks else {}
            scores = scorer.score(fit, mask, self.means, advance, **told)
        if mask is None:
            self.scores = scores
        return scores

    @contextmanager
    def localising(self) -> Iterator[None]:
        """Count what is forwarded inside among the tokens that finding the units takes."""
        before = self.model.usage.copy()
        yield
        self.localise_tokens += self.model.usage.since(before).forward


def check_counts(settings: Settings, space: UnitSpace, **kinds: UnitKind) -> None:
    """Refuse counts that a user has set above what the model has.

    Parameters
    ----------
    kinds: by setting, the kind of units that it counts.

    Raises
    ------
    SettingError: names the setting and a count that will do.
    """
    available = {"heads": space.n_heads, "neurons": space.n_neurons}
    for name, kind in kinds.items():
        asked = getattr(settings, name)
        if name in settings.model_fields_set and asked is not None and asked > available[kind]:
            raise SettingError(
                f"the model has {available[kind]:,} {kind}, so '{name}' cannot be {asked:,}; set it to "
                f"{available[kind] // 2:,} or less."
            )


class Search(Protocol):
    """Turns scores into proposals, one after the other, told of each one's figures on select."""

    def check(self, model: LanguageModel, scorer: Any, ablation: str) -> None:
        """Refuse, before anything is computed, settings that do not suit the model or the scorer.

        Raises
        ------
        SettingError: says what to use instead.
        """
        ...

    def proposals(self, problem: Problem, scorer: Any) -> Proposals:
        """Propose masks; the value of each ``yield`` is the proposal's :class:`Outcome`."""
        ...
