"""Races: many masks on a first slice of the data, the most promising of them on all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from secateur.evaluation.evaluator import Evaluator, Measurement
from secateur.progress import Advance
from secateur.weights import AnyMask

SLICE = 0.25


@dataclass(eq=False)
class Race:
    """A slice of an evaluator's data, fixed before anything is measured on it.

    Attributes
    ----------
    first: measures on the slice. whole: measures on all of it.
    """

    first: Evaluator
    whole: Evaluator

    @classmethod
    def on(cls, whole: Evaluator, seed: int | list[int] = 0, part: float = SLICE) -> Race:
        """The slice: a part of the scenarios with all that they ask, and of the windows of text."""
        order = np.random.default_rng(seed).permutation(whole.prompts.scenarios).tolist()
        prompts = whole.prompts.of_scenarios(sorted(order[: max(1, round(part * len(order)))]))
        text = whole.text
        if text is not None:
            text = text.first(max(1, round(part * len(text.windows))))
        return cls(whole.on(prompts, text, walk=True), whole)

    @property
    def share(self) -> float:
        """Of the tokens of the whole, what the slice reads."""
        return self.first.tokens / self.whole.tokens

    def winners(
        self,
        masks: Sequence[AnyMask],
        count: int,
        energies: Callable[[Measurement], Sequence[float] | np.ndarray],
        advance: Advance = lambda _: None,
    ) -> list[int]:
        """The masks of lowest energy on the slice, by their positions, ascending; those without finite answers last.

        Parameters
        ----------
        energies: of a mask as measured on the slice; the lower, the better. Several take turns.
        """
        measured = self.first.evaluate_walking(masks, advance, utility=self.first.text is not None)
        told = {number: energies(found) for number, found in sorted(measured, key=itemgetter(0)) if found is not None}
        ranked: list[int] = []
        if told:
            turns = np.array(list(told.values())).reshape(len(told), -1).argsort(axis=0, kind="stable").ravel()
            ranked = np.array(list(told))[turns].tolist()
        order = dict.fromkeys([*ranked, *range(len(masks))])
        return sorted(list(order)[:count])
