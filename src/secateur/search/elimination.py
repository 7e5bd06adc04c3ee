"""From scores to candidate masks: ranked once, or removed in rounds and scored again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.errors import SettingError
from secateur.evaluation.divergence import Divergence
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.attribution import Attribution, Effects, disparity
from secateur.scoring.base import Settings
from secateur.search.base import CandidateKind, Problem, Proposals, Selection, check_counts
from secateur.units import UnitSpace

MAX_STEP = 100
# A first-order prediction promises too much, so a step aims at less than all of the disparity.
STEP_SHARE = 0.8
# Units that go well together do about a quarter of the damage predicted for each; more than half of
# it means that some prediction is far off. Damage below the tolerance, in nats per token, is not
# worth looking into.
DAMAGE_SHARE = 0.5
TOLERANCE = 5e-4
MAX_TRIALS = 24
MEASURED_ROUNDS = 3


class Elimination(Settings):
    """Heads alone, neurons alone, then both together in rounds, scored anew after each.

    Attributes
    ----------
    max_heads, max_neurons: the largest counts when heads or neurons are removed alone.
    rounds: of removing heads and neurons together.
    more_rounds: after these, three by three, as long as the last three lowered the bias on select and all of them
        took less than half of the utility limit. None by default: on the default model and ``occupations`` the
        three more cost a sixth of the tokens and lowered nothing.
    memory: weight of the mean effects of the rounds before, that of the round itself being 1. A round
        scores a few scenarios only, and what helps those alone would otherwise be taken for what helps all.

    All ours, as are the constants above.
    """

    max_heads: Annotated[int, Field(ge=0)] = 4
    max_neurons: Annotated[int, Field(ge=0)] = 64
    rounds: Annotated[int, Field(ge=0)] = 6
    more_rounds: Annotated[int, Field(ge=0)] = 0
    memory: Annotated[float, Field(ge=0, le=1)] = 0.5

    def cheaper(self) -> dict[str, Any]:
        return {"max_heads": 1, "max_neurons": 16, "rounds": 3}

    def model_post_init(self, context: object) -> None:
        if self.max_heads + self.max_neurons + self.rounds == 0:
            raise SettingError("max_heads, max_neurons and rounds are all 0, so there would be no candidate.")

    def check(self, model: LanguageModel, scorer: Attribution, ablation: str) -> None:
        """Refuse counts above what there is; the usual ones become all there is."""
        check_counts(self, UnitSpace.of(model), max_heads="heads", max_neurons="neurons")

    def proposals(self, problem: Problem, scorer: Attribution) -> Proposals:
        """Heads alone and neurons alone from the largest count down, then the rounds."""
        scores = problem.score(scorer, fold=0)
        limits: tuple[tuple[CandidateKind, int], ...] = (("heads", self.max_heads), ("neurons", self.max_neurons))
        for kind, largest in limits:
            for selection in top_units(scores, problem.space, kind, geometric_counts(largest)):
                outcome = yield selection
                if outcome.within_limit:
                    break  # fewer units of the same kind would do less
        yield from self._rounds(problem, scorer, scores)

    def _rounds(self, problem: Problem, scorer: Attribution, scores: Effects) -> Proposals:
        """Propose what is removed after every third round and at the end.

        Where it breaks the utility limit, the rounds before are proposed, the last first, until one keeps to it.
        """
        unseen: list[Selection] = []
        last, least = self.rounds, np.inf
        for number, removed in enumerate(self._path(problem, scorer, scores), start=1):
            unseen.append(Selection("both", removed, {"rounds": number}))
            if number % MEASURED_ROUNDS == 0 or number == last:
                outcome = yield unseen[-1]
                if not outcome.within_limit:
                    unseen.pop()
                    break
                unseen.clear()
                room = outcome.bias_square < least and outcome.perplexity_increase < problem.limit / 2
                if number == last and room:
                    last = min(last + MEASURED_ROUNDS, self.rounds + self.more_rounds)
                least = min(least, outcome.bias_square)
            if number == last:
                break
        for selection in reversed(unseen):
            outcome = yield selection
            if outcome.within_limit:
                break

    def _path(self, problem: Problem, scorer: Attribution, scores: Effects) -> Iterator[np.ndarray]:
        """Growing sets of removed units, one per round."""
        text = problem.fit.text
        assert text is not None, "elimination needs neutral text"
        with problem.localising():
            divergence = Divergence(problem.model, text)
        trial = Trial(scores.damage, lambda units: divergence.of(problem.mask(units)))
        seen: Effects | None = None
        for number in range(self.rounds + self.more_rounds if self.rounds else 0):
            mask = problem.mask(trial.removed)
            if number > 0:
                scores = problem.score(scorer, mask, number)
            seen = scores if seen is None else blended(scores, seen, self.memory)
            with problem.localising():
                table = problem.folds[number % len(problem.folds)].evaluate(mask).table
            excluded = np.concatenate([trial.removed, trial.refused])
            step = next_step(seen, problem.space, "both", excluded, disparity(table))
            before = len(trial.removed)
            with problem.localising(), problem.step("Try the next units on neutral text", len(step)) as advance:
                trial.remove(step, advance)
            if len(trial.removed) == before:
                return
            yield trial.removed


def ranking(scores: Effects, space: UnitSpace, kind: CandidateKind, excluded: np.ndarray | None = None) -> np.ndarray:
    """Flat positions in the order of removal: the largest fall of the disparity per cost first.

    Units with no gain to count on, and the excluded ones, are left out. Ties go to the lower
    position, so the order is determined by the scores.
    """
    eligible = scores.gain > 0
    if kind == "heads":
        eligible[space.n_heads :] = False
    elif kind == "neurons":
        eligible[: space.n_heads] = False
    if excluded is not None:
        eligible[excluded] = False
    order = np.argsort(-scores.rank, kind="stable")
    return np.asarray(order[eligible[order]])


def geometric_counts(largest: int, steps: int = 3, factor: int = 4) -> list[int]:
    """Up to ``steps`` counts from the largest down, each a quarter of the one before: 64, 16, 4 for 64."""
    counts = [largest // factor**step for step in range(steps)]
    return [count for count in counts if count >= 1]


def top_units(scores: Effects, space: UnitSpace, kind: CandidateKind, counts: list[int]) -> Iterator[Selection]:
    """The first units of one ranking, for each of several counts; all of them for a count above what is ranked."""
    order = ranking(scores, space, kind)
    for count in dict.fromkeys(min(count, len(order)) for count in counts):
        if count:
            yield Selection(kind, order[:count])


def blended(now: Effects, before: Effects, memory: float) -> Effects:
    """(now + memory · before) / (1 + memory); errors alike, since all rounds share the markers."""
    share = 1 / (1 + memory)
    effect = share * now.effect + (1 - share) * before.effect
    error = share * now.error + (1 - share) * before.error
    return replace(now, effect=effect, error=error)


def next_step(
    scores: Effects,
    space: UnitSpace,
    kind: CandidateKind,
    excluded: np.ndarray,
    disparity: float,
    largest: int = MAX_STEP,
) -> np.ndarray:
    """The units to remove next: those predicted to take away most of the disparity, at most ``largest``.

    Parameters
    ----------
    excluded: units that are removed already or not to be removed.
    disparity: the disparity D that ``scores.effect`` refers to, as it is now.
    """
    order = ranking(scores, space, kind, excluded)
    predicted = np.cumsum(-scores.effect[order])
    count = min(int(np.searchsorted(predicted, STEP_SHARE * disparity)) + 1, largest, len(order))
    return order[:count]


@dataclass(eq=False)
class Trial:
    """Removes the units of a step that do together no more than half of the damage predicted for each.

    A prediction is a second-order estimate for one unit alone. A few units do many times that damage,
    or do it only together with others. A part of the step with too much damage is halved until such
    units stand alone, and these are refused; after :data:`MAX_TRIALS` measurements, whole parts are.

    Attributes
    ----------
    predicted: (units,), damage expected of each unit in nats per token.
    measure: the damage of a set of removed units, in nats per token.
    removed, refused: flat positions, in the order of the decisions.
    damage: of ``removed``, as measured.
    """

    predicted: np.ndarray
    measure: Callable[[np.ndarray], float]
    removed: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    refused: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    damage: float = 0.0

    def remove(self, step: np.ndarray, advance: Advance = lambda _: None) -> None:
        """Decide on every unit of a step, given as flat positions."""
        trials = 0

        def harmless(part: np.ndarray) -> bool:
            nonlocal trials
            trials += 1
            together = np.concatenate([self.removed, part])
            damage = self.measure(together)
            if damage - self.damage > DAMAGE_SHARE * self.predicted[part].sum() + TOLERANCE:
                return False
            self.removed, self.damage = together, damage
            return True

        def decide(part: np.ndarray, suspect: bool = False) -> None:
            alone = len(part) == 1
            if (alone or not suspect) and harmless(part):
                advance(len(part))
            elif alone or trials >= MAX_TRIALS:
                self.refused = np.concatenate([self.refused, part])
                advance(len(part))
            else:
                half, refused = len(part) // 2, len(self.refused)
                decide(part[:half])
                # Where the first half is harmless, the harm that was seen lies in the second.
                decide(part[half:], suspect=len(self.refused) == refused)

        if len(step):
            decide(step)
