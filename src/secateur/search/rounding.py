"""``Rounding``: close the lowest gates for good, as many as the model bears, then train the others around them."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.attenuation import Attenuation
from secateur.errors import SettingError
from secateur.models import LanguageModel
from secateur.scoring.base import Settings
from secateur.scoring.gates import Course, GateScores, GateTraining
from secateur.search.base import Outcome, Problem, Proposals, Selection

OPEN = 0.5
# Factors of damage from one round to the next: where a round keeps to the limit, and where it does not.
WITHIN, BEYOND = (0.5, 1.0), (1.5, 4.0)


class Rounding(Settings):
    """Round trained gates to 0 and 1, and check each rounding on the model.

    Attributes
    ----------
    start, factor: the smallest count of closed gates, and the ratio of one count to the one before; a range ends
        where the utility limit is broken, or with all gates that training has lowered.
    bisections: counts that are tried between the largest within the limit and the smallest beyond.
    rounds: of training again after rounding: the gates of a pool, the ``pool`` lowest for every closed one of the
        best rounding, go on from there, driven to 0 or 1, and are rounded at a half. In the next round damage
        weighs (cost / limit)^2 times as much, from 0.5 to 1 times where this one keeps to the utility limit, and from
        1.5 to 4 times where it does not. Where no round keeps to the limit, there are up to as many more.
    steps: of each such training.
    pool: see rounds.
    polarity: how hard gates are driven to 0 or 1 at its end.
    soft: keep the closed gates where training left them, between 0 and 1, and drive none: units are turned down
        instead of removed. What is chosen then leaves as an adapter.

    All ours.
    """

    start: Annotated[int, Field(ge=1)] = 8
    factor: Annotated[float, Field(gt=1)] = 4.0
    bisections: Annotated[int, Field(ge=0)] = 2
    rounds: Annotated[int, Field(ge=0)] = 3
    steps: Annotated[int, Field(ge=1)] = 40
    pool: Annotated[int, Field(ge=1)] = 4
    polarity: Annotated[float, Field(ge=0)] = 0.02
    soft: bool = False

    def cheaper(self) -> dict[str, Any]:
        return {"rounds": 1, "steps": 20, "bisections": 1}

    def check(self, model: LanguageModel, scorer: GateTraining, ablation: str) -> None:
        """Refuse to turn units down towards their means.

        Raises
        ------
        SettingError: says to use zero ablation.
        """
        if self.soft and ablation == "mean":
            raise SettingError("soft gates turn units down towards zero; use zero ablation, or leave soft out.")

    def proposals(self, problem: Problem, scorer: GateTraining) -> Proposals:
        """The lowest gates in growing numbers, then the roundings of further training."""
        scores: GateScores = problem.score(scorer)
        order = np.argsort(scores.gates, kind="stable")
        order = order[scores.gates[order] < 1]
        best, least = 0, np.inf
        inside, beyond, left = 0, len(order) + 1, self.bisections
        count = min(self.start, len(order))
        while inside < count < beyond:
            outcome = yield self._selection(problem, scores.gates, order[:count], {"count": count})
            if outcome.within_limit:
                inside = count
                if outcome.bias_square < least:
                    best, least = count, outcome.bias_square
            else:
                beyond = count
            if beyond > len(order):
                count = min(max(count + 1, round(count * self.factor)), len(order))
            elif left:
                count, left = round((max(inside, 1) * beyond) ** 0.5), left - 1
            else:
                break
        if len(order) and self.rounds:
            yield from self._refined(problem, scorer, scores.gates, order, best or min(self.start, len(order)))

    def _selection(self, problem: Problem, gates: np.ndarray, closed: np.ndarray, knobs: dict[str, Any]) -> Selection:
        """The units at flat positions ``closed``, to remove or to turn down to their gates."""
        mask = None
        if self.soft:
            kept = np.ones(len(gates), dtype=np.float32)
            kept[closed] = gates[closed]
            mask = Attenuation(problem.space, kept, problem.model.fingerprint)
        return Selection.of_units(closed, problem.space, knobs, mask)

    def _refined(
        self, problem: Problem, scorer: GateTraining, gates: np.ndarray, order: np.ndarray, closed: int
    ) -> Proposals:
        """Train the gates of the pool again and again, and round them."""
        free = np.zeros(len(gates), dtype=bool)
        free[order[: self.pool * closed]] = True
        gates = np.where(free, gates, 1.0).astype(np.float32)
        if not self.soft:
            gates[order[:closed]] = 0
        damage = scorer.damage
        with problem.localising():
            # Dealt in another way than in the first training, so that lessons do not repeat themselves.
            course = Course.prepare(problem.fit, problem.fit.evaluate().table, scorer.prompts, [scorer.seed, 1])
        number, kept = 0, False
        while number < self.rounds or (not kept and number < 2 * self.rounds):
            number += 1
            with problem.localising(), problem.step(f"Train the gates again, round {number}", self.steps) as advance:
                gates = scorer.train(
                    course,
                    gates,
                    self.steps,
                    free=free,
                    own_spread=True,
                    damage=damage,
                    polarity=0.0 if self.soft else self.polarity,
                    means=problem.means,
                    advance=advance,
                )
            closed_now = np.flatnonzero(gates < (1 if self.soft else OPEN))
            if not len(closed_now):
                return
            outcome = yield self._selection(problem, gates, closed_now, {"round": number, "damage": damage})
            kept |= outcome.within_limit
            damage *= _damage_factor(outcome, problem.limit)


def _damage_factor(outcome: Outcome, limit: float) -> float:
    """How many times as much damage should weigh in the round after one with this outcome."""
    if not np.isfinite(outcome.perplexity_increase):
        return BEYOND[1]
    square = (max(outcome.perplexity_increase, 0.0) / limit) ** 2
    return float(np.clip(square, *(WITHIN if outcome.within_limit else BEYOND)))
