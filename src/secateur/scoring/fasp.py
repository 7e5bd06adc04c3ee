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

Removing a head of layer l leaves all layers before l as they were, so every pass begins at layer l: on
average half of the blocks are run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import batch_y, pack
from secateur.measures.disparity import Table
from secateur.measures.prompts import PromptDraw, PromptSet
from secateur.measures.utility import NeutralText, window_losses
from secateur.models import LanguageModel
from secateur.models.restart import Entries, recorded, restarted
from secateur.progress import Advance
from secateur.scoring.attribution import disparity
from secateur.scoring.base import Settings, UnitKind
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask, UnitSpace, masked

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

    Draws that turn out equal are measured once.
    """

    kinds: ClassVar[tuple[UnitKind, ...]] = ("heads",)
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
        """Prompts and windows of all different draws, for every head and for the unpruned model."""
        asked = sum(len(draw.of(fit.prompts)) for draw in set(self.prompt_draws(fit)))
        read = sum(map(len, set(self.window_draws(fit))))
        return (asked + read) * (1 + UnitSpace.of(fit.model).n_heads)

    @torch.no_grad()
    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> HeadRemovals:
        """Remove each head of the model as it is under ``mask``.

        Parameters
        ----------
        means: for mean ablation: what a removed head gives instead of zero.
        """
        model = fit.model
        prompt_draws, window_draws = self.prompt_draws(fit), self.window_draws(fit)
        with masked(model, mask):
            bias = {
                draw: biases(model, draw.of(fit.prompts), fit.batch_size, means, advance)
                for draw in dict.fromkeys(prompt_draws)
            }
            loss = {
                draw: log_perplexities(model, self.text_of(fit, draw), means, advance)
                for draw in dict.fromkeys(window_draws)
            }
        by_seed = np.stack([bias[draw] for draw in prompt_draws]), np.stack([loss[draw] for draw in window_draws])
        neurons = np.full((self.seeds, UnitSpace.of(model).n_neurons), np.nan)
        # Row 0 of each result is the unpruned model; the heads come first in the flat order of units.
        after = [np.concatenate([found[:, 1:], neurons], axis=1) for found in by_seed]
        return HeadRemovals(*after, *(found[:, 0] for found in by_seed))

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
        drawn = replace(fit.text, windows=tuple(fit.text.windows[n] for n in windows))
        return drawn.first(len(windows), self.window_tokens)


def biases(
    model: LanguageModel, prompts: PromptSet, batch_size: int, means: ActivationMeans | None, advance: Advance
) -> np.ndarray:
    """D of the model as it is, then without each head, (1 + heads,)."""
    parts = []
    for batch in pack(model, prompts, batch_size):
        parts.append(without_each_head(model, partial(batch_y, model, prompts.suite, batch), means, advance))
    y = np.concatenate(parts, axis=1)  # (1 + heads, prompts)
    return np.array([disparity(Table(prompts.table(row), prompts.groups)) for row in y])


def log_perplexities(
    model: LanguageModel, text: NeutralText, means: ActivationMeans | None, advance: Advance
) -> np.ndarray:
    """Mean negative log-likelihood, nats per token, of the model as it is, then without each head, (1 + heads,)."""
    total = np.zeros(1 + UnitSpace.of(model).n_heads)
    for numbers in text.batches():
        windows = [text.windows[n] for n in numbers]
        losses = without_each_head(model, partial(window_losses, model, windows), means, advance)
        total += losses.sum(axis=1)
    return np.asarray(total / text.scored.sum())


def without_each_head(
    model: LanguageModel, run: Callable[[], Tensor], means: ActivationMeans | None, advance: Advance
) -> np.ndarray:
    """What one forward pass gives, (n,), for the model as it is and without each head: (1 + heads, n).

    Parameters
    ----------
    run: makes one pass, always of the same inputs.
    advance: told of n steps for each of the rows.
    """
    space = UnitSpace.of(model)
    rows: list[Tensor] = []

    def note() -> None:
        rows.append(run().cpu())
        advance(len(rows[-1]))

    entries = Entries()
    with recorded(model, entries):
        note()
    for layer in range(space.n_layers):
        with restarted(model, layer, entries):
            for head in range(space.n_heads)[space.head_slice(layer)]:
                with masked(model, Mask.removing(model, [head], means)):
                    note()
    return torch.stack(rows).numpy().astype(float)


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
