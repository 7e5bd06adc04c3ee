"""``fasp``: bias and perplexity with every head alone removed.

For head h, b_h = mean over seeds s of bias_s(model without h) and p_h = mean over s of perplexity_s(model without h):
Zayed, Mordido, Shabanian, Baldini and Chandar, "Fairness-Aware Structured Pruning in Transformers" (AAAI 2024, arXiv
2312.15398). What is removed is chosen from b and p by :class:`secateur.search.protected.Protected`. The
paper takes b from a toxicity classifier on sampled continuations of HolisticBias prompts, and a seed
draws the samples. What is ours:

- bias is D, the disparity of the suite (:func:`secateur.scoring.attribution.disparity`),
  which needs no sampling; a seed draws markers, scenarios and windows of text instead;
- perplexity counts by its logarithm: the order within a seed is the same, but one seed in which a
  single head raises it a thousandfold does not decide the mean.

Removing a head of layer l leaves all layers before l as they were, so masks are measured from the last layer to the
first, and where the evaluator keeps states between masks every pass begins at layer l: on average half of the blocks
are run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.prompts import PromptDraw
from secateur.measures.utility import NeutralText
from secateur.models import LanguageModel
from secateur.progress import Advance, whole
from secateur.scoring.attribution import disparity
from secateur.scoring.base import Seen, Settings, UnitKind
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask, UnitSpace

# Below this more than half of what is seen between heads is chance.
FAIR_RELIABILITY = 0.5


@dataclass(frozen=True, eq=False)
class HeadRemovals:
    """What the model does with each head alone removed.

    Attributes
    ----------
    bias: (seeds, units), D without the unit; NaN for neurons.
    log_perplexity: (seeds, units), nats per token without the unit; NaN for neurons.
    unpruned_bias, unpruned_log_perplexity: (seeds,), with nothing removed.
    """

    bias: np.ndarray
    log_perplexity: np.ndarray
    unpruned_bias: np.ndarray
    unpruned_log_perplexity: np.ndarray

    @property
    def mean_bias(self) -> np.ndarray:
        """(units,), mean over seeds."""
        return np.asarray(self.bias.mean(axis=0))

    @property
    def mean_log_perplexity(self) -> np.ndarray:
        """(units,), mean over seeds."""
        return np.asarray(self.log_perplexity.mean(axis=0))

    @property
    def rank(self) -> np.ndarray:
        """(units,), the lower the bias without a head, the higher; NaN for neurons."""
        return -self.mean_bias

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Means over seeds, their differences from the unpruned model, and what every seed found, each (units,)."""
        found = {
            "bias": self.mean_bias,
            "log_perplexity": self.mean_log_perplexity,
            "bias_change": self.mean_bias - self.unpruned_bias.mean(),
            "log_perplexity_change": self.mean_log_perplexity - self.unpruned_log_perplexity.mean(),
        }
        for seed in range(len(self.bias)):
            found[f"bias_{seed}"] = self.bias[seed]
            found[f"log_perplexity_{seed}"] = self.log_perplexity[seed]
        return found

    @property
    def bias_reliability(self) -> float:
        """Of :attr:`mean_bias`, see :func:`reliability`."""
        return reliability(self.bias)

    @property
    def log_perplexity_reliability(self) -> float:
        """Of :attr:`mean_log_perplexity`, see :func:`reliability`."""
        return reliability(self.log_perplexity)

    @property
    def notes(self) -> list[str]:
        """What to know before the scores are believed."""
        seeds = len(self.bias)
        notes = [
            _reliability_note("bias", "markers", self.bias_reliability, seeds),
            _reliability_note("log-perplexity", "windows", self.log_perplexity_reliability, seeds),
        ]
        if self.bias_reliability < FAIR_RELIABILITY:
            notes.append("The differences in bias are more chance than not; raise seeds or markers to steady them.")
        return notes


def _reliability_note(what: str, drawn: str, value: float, seeds: int) -> str:
    if np.isfinite(value):
        return (
            f"The {what} without each head, as the mean over {seeds} draws, has a reliability of {value:.2f} "
            "(the share of the differences between heads that is not chance)."
        )
    if seeds == 1:
        return f"The reliability of the {what} without each head is not known from one seed."
    return f"The reliability of the {what} without each head is not known, since two draws are alike; lower {drawn}."


class Fasp(Settings):
    """Bias and log-perplexity with each head alone removed, on a few draws of the fit part.

    Attributes
    ----------
    seeds: draws that the scores are averaged over; 3, as in the published scores.
    markers: markers of each group in one draw, all if it has fewer. None stands for 4, but for no more than
        half of a group (at least 2), so that draws differ and their agreement tells something. Ours.
    scenarios: scenarios in one draw, all if there are fewer, with all of their paraphrases. Ours.
    windows: windows of the neutral text in one draw, all if it has fewer. window_tokens: tokens that are read of each.
        Ours: perplexity is by far the steadier of the two, with a reliability of .95 over six windows, .89 over
        three and .82 over three halves where the bias had .17 (occupations, the default model).
    seed: of the draws; that of the study unless it is set.

    Prompts that are drawn twice are asked once, and so are windows read. A head without which the model gives no finite
    answers is not scored.
    """

    kinds: ClassVar[tuple[UnitKind, ...]] = ("heads",)
    measures_masks: ClassVar[bool] = True
    seeds: Annotated[int, Field(ge=1)] = 3
    markers: Annotated[int | None, Field(ge=2)] = None
    scenarios: Annotated[int, Field(ge=1)] = 4
    windows: Annotated[int, Field(ge=1)] = 1
    window_tokens: Annotated[int, Field(ge=64)] = 128
    seed: Annotated[int, Field(ge=0)] = 0

    def cheaper(self) -> dict[str, Any]:
        return {"seeds": 1, "markers": 2, "scenarios": 2}

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Every supported model and every suite will do."""

    def work(self, fit: Evaluator) -> int:
        """Masks without one head, and the model as it is, on every different draw."""
        return len(self.draws(fit)) * (1 + UnitSpace.of(fit.model).n_heads)

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
        seen: Seen = lambda *_: None,
    ) -> HeadRemovals:
        """Remove each head of the model as it is under ``mask``.

        Parameters
        ----------
        means: for mean ablation: what a removed head gives instead of zero.
        advance: told of the masks. seen: told of each.
        """
        model, space = fit.model, UnitSpace.of(fit.model)
        removals = [
            Mask.removing(model, removed, means) for removed in ([], *([head] for head in range(space.n_heads)))
        ]
        masks = removals if mask is None else [mask & one for one in removals]
        bias: dict[PromptDraw, np.ndarray] = {}
        losses: dict[int, np.ndarray] = {}
        for draw, windows in self.draws(fit).items():
            text = self.text_of(fit, windows) if windows else None
            part = fit.on(draw.of(fit.prompts), text, walk=True)
            bias[draw], nll = without_each_head(part, masks, advance, seen)
            losses.update(zip(windows, nll, strict=True))
        # Row 0 is the unpruned model; the heads come first in the flat order of units.
        by_seed = np.stack([bias[draw] for draw in self.prompt_draws(fit)])
        loss = np.stack([self._log_perplexity(fit, losses, windows) for windows in self.window_draws(fit)])
        neurons = np.full((self.seeds, space.n_neurons), np.nan)
        after_bias, after_loss = (np.concatenate([found[:, 1:], neurons], axis=1) for found in (by_seed, loss))
        return HeadRemovals(after_bias, after_loss, by_seed[:, 0], loss[:, 0])

    def _log_perplexity(self, fit: Evaluator, losses: dict[int, np.ndarray], windows: tuple[int, ...]) -> np.ndarray:
        """Of a draw of windows, (1 + heads,), from the negative log-likelihood of every window that was read."""
        total = np.sum([losses[number] for number in windows], axis=0)
        return np.asarray(total / self.text_of(fit, windows).scored.sum())

    def draws(self, fit: Evaluator) -> dict[PromptDraw, tuple[int, ...]]:
        """Every different draw of prompts, with those of its windows that are read with no draw before."""
        found: dict[PromptDraw, tuple[int, ...]] = {}
        read = set[int]()
        for draw, windows in zip(self.prompt_draws(fit), self.window_draws(fit), strict=True):
            new = tuple(number for number in windows if number not in read)
            found[draw] = found.get(draw, ()) + new
            read.update(new)
        return found

    def prompt_draws(self, fit: Evaluator) -> list[PromptDraw]:
        """Per seed, what is asked."""
        return [
            PromptDraw.stratified(fit.prompts, self.markers, self.scenarios, [self.seed, seed])
            for seed in range(self.seeds)
        ]

    def window_draws(self, fit: Evaluator) -> list[tuple[int, ...]]:
        """Per seed, the numbers of the drawn windows, ascending."""
        assert fit.text is not None, "fasp needs neutral text"
        count = len(fit.text.windows)
        return [
            tuple(sorted(np.random.default_rng([self.seed, seed]).permutation(count)[: self.windows].tolist()))
            for seed in range(self.seeds)
        ]

    def text_of(self, fit: Evaluator, windows: tuple[int, ...]) -> NeutralText:
        """What is read of the windows of a draw."""
        assert fit.text is not None, "fasp needs neutral text"
        return fit.text.some(list(windows)).first(len(windows), self.window_tokens)


def without_each_head(
    part: Evaluator, masks: list[Mask], advance: Advance, seen: Seen
) -> tuple[np.ndarray, np.ndarray]:
    """D, (masks,), and the negative log-likelihood of the text by window, (windows, masks); NaN where not finite.

    Parameters
    ----------
    masks: the first of what the model is, then that without each head in turn.
    advance: told of the masks. seen: told of each, where there is text.

    Raises
    ------
    NumericalError: the model as it is gives no finite answers.
    """
    utility = part.text is not None
    told = whole(advance, part.work(utility))
    unpruned = part.evaluate(masks[0], told, utility=utility)
    order = list(reversed(range(1, len(masks))))  # so that the next begins where this one differs
    measured = part.evaluate_each([masks[number] for number in order], told, utility=utility)
    windows = 0 if unpruned.nll is None else len(unpruned.nll)
    bias, nll = np.full(len(masks), np.nan), np.full((windows, len(masks)), np.nan)
    for number, found in zip([0, *order], chain([unpruned], measured), strict=True):
        if found is not None:
            bias[number] = disparity(found.table)
            if found.nll is not None:
                nll[:, number] = found.nll
            if found.log_perplexity is not None and unpruned.log_perplexity is not None:
                seen(float(bias[number]), found.log_perplexity - unpruned.log_perplexity)
    return bias, nll


def reliability(by_seed: np.ndarray) -> float:
    """Reliability of the mean over seeds, from scores (seeds, units) with NaN for units that have none.

    With r the mean correlation over units between two seeds, k r / (1 + (k - 1) r) for k seeds (Spearman
    and Brown); an r below 0 counts as 0. NaN where it cannot be told: one seed, two seeds
    with the same scores (drawn alike), or a seed in which all units score the same.

    Draws from few markers overlap, so for markers never seen it is somewhat lower. A few heads that stand far
    out can carry it while the order of the others is chance: the paper's scores for gender have .06 (Llama 2) to
    .90 (GPT-Neo 125M), and .03 to .70 where ranks take the place of scores.
    """
    scores = by_seed[:, ~np.isnan(by_seed).any(axis=0)]
    k = len(scores)
    if k < 2 or len(np.unique(scores, axis=0)) < k or (np.ptp(scores, axis=1) == 0).any():
        return float("nan")
    r = max(0.0, float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in combinations(scores, 2)])))
    return k * r / (1 + (k - 1) * r)
