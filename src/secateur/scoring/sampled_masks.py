"""``attention-pruning``, what it learns from: random head masks, measured, and a surrogate network for each figure.

Dasu et al., "Attention Pruning: Automated Fairness Repair of Language Models via Surrogate Simulated Annealing" (arXiv
2503.15815): sample masks over the attention heads, measure bias and perplexity of each on part of the data, train one
network per figure from the 0/1 vector of heads, and search on the networks (see
:mod:`secateur.search.attention_pruning`). What is ours:

- a mask removes k heads, k even between bounds, each set of k heads as likely as any other;
- bias is D, the disparity of the suite as attribution has it, and perplexity counts by its logarithm: single heads can
  raise it a thousandfold;
- the prompts are a draw with equally many markers of each group in every scenario;
- a network has one hidden layer of 64 units, trained for 400 steps of AdamW; one that is trained on four fifths of the
  masks tells, on the last fifth, how good it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from secateur.errors import SettingError
from secateur.evaluation.evaluator import Evaluator
from secateur.measures.prompts import PromptDraw
from secateur.models import LanguageModel
from secateur.progress import Advance, whole
from secateur.scoring.attribution import disparity
from secateur.scoring.base import Seen, Settings, UnitKind
from secateur.scoring.surrogate import Surrogate, draw_states, train
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask, UnitSpace

LARGEST_SHARE = 0.05
MIN_EVALUATIONS = 10


@dataclass(frozen=True, eq=False)
class SurrogateScores:
    """Measured masks, and what was learnt from them.

    Attributes
    ----------
    removed: bool (masks, heads). bias: (masks,), D. log_perplexity: (masks,), nats per token.
    unpruned_bias, unpruned_log_perplexity: with nothing removed.
    of_bias, of_log_perplexity: the surrogates.
    bounds: the least and the greatest number of removed heads.
    n_neurons: of the model, which are not scored.
    """

    removed: np.ndarray
    bias: np.ndarray
    log_perplexity: np.ndarray
    unpruned_bias: float
    unpruned_log_perplexity: float
    of_bias: Surrogate
    of_log_perplexity: Surrogate
    bounds: tuple[int, int]
    n_neurons: int

    @property
    def rank(self) -> np.ndarray:
        """(units,), the fall of bias predicted for each head alone; NaN for neurons."""
        return -self.values["bias_change"]

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Predicted changes with each head alone removed, each (units,)."""
        return {
            "bias_change": self._alone(self.of_bias),
            "log_perplexity_change": self._alone(self.of_log_perplexity),
        }

    def _alone(self, surrogate: Surrogate) -> np.ndarray:
        heads = surrogate.units
        predicted = surrogate.predict(torch.cat([torch.zeros(1, heads), torch.eye(heads)])).numpy().astype(float)
        return np.concatenate([predicted[1:] - predicted[0], np.full(self.n_neurons, np.nan)])

    @property
    def notes(self) -> list[str]:
        """How far the surrogates are to be believed."""
        return [
            f"The surrogate of {name} has R² {one.quality.r2:.2f} and Spearman {one.quality.spearman:.2f} on "
            f"{one.quality.masks} masks, trained on the others alone."
            for name, one in (("bias", self.of_bias), ("log-perplexity", self.of_log_perplexity))
        ]


class SampledMasks(Settings):
    """Measure random head masks and train two surrogates.

    Attributes
    ----------
    evaluations: masks to measure; 280 with the finalists of the search make 300. Ours.
    least, most: bounds on the number of removed heads; None for ``most`` stands for 5 % of all heads, and for one more
        than ``least`` at least. Ours.
    markers: of each group in the draw of prompts, from all scenarios. Ours.
    windows: of the neutral text. window_tokens: tokens that are read of each. Ours.
    seed: of the draws and of the networks; that of the study unless it is set.
    """

    kinds: ClassVar[tuple[UnitKind, ...]] = ("heads",)
    measures_masks: ClassVar[bool] = True
    evaluations: Annotated[int, Field(ge=MIN_EVALUATIONS)] = 280
    least: Annotated[int, Field(ge=1)] = 1
    most: Annotated[int | None, Field(ge=1)] = None
    markers: Annotated[int, Field(ge=2)] = 3
    windows: Annotated[int, Field(ge=1)] = 2
    window_tokens: Annotated[int, Field(ge=2)] = 64
    seed: Annotated[int, Field(ge=0)] = 0

    def cheaper(self) -> dict[str, Any]:
        return {"evaluations": 60, "markers": 2, "windows": 1}

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Refuse bounds that no mask could keep to.

        Raises
        ------
        SettingError: names the bounds that could be kept.
        """
        least, most = self.bounds(model)
        heads = UnitSpace.of(model).n_heads
        if least >= most or most > heads:
            raise SettingError(
                f"no mask of {heads:,} heads removes at least {least:,} and at most {most:,}; set least and most so "
                f"that least < most <= {heads:,}: annealing flips one head at a time."
            )

    def bounds(self, model: LanguageModel) -> tuple[int, int]:
        """The least and the greatest number of heads that a mask removes."""
        share = max(self.least + 1, round(LARGEST_SHARE * UnitSpace.of(model).n_heads))
        return self.least, share if self.most is None else self.most

    def work(self, fit: Evaluator) -> int:
        """The masks, and the model as it is."""
        return 1 + self.evaluations

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
        seen: Seen = lambda *_: None,
    ) -> SurrogateScores:
        """Measure masks of the model as it is under ``mask``, and learn from them.

        Parameters
        ----------
        means: for mean ablation: what a removed head gives instead of zero.
        advance: told of the masks. seen: told of each.
        """
        model = fit.model
        space, bounds = UnitSpace.of(model), self.bounds(model)
        generator = torch.Generator().manual_seed(self.seed)
        states = draw_states(space.n_heads, bounds, self.evaluations, generator).numpy()
        drawn = [Mask.removing(model, np.flatnonzero(state), means) for state in states]
        masks = drawn if mask is None else [mask & one for one in drawn]
        nothing = Mask.removing(model, [], means) if mask is None else mask
        (unpruned_bias,), (unpruned_log_perplexity,) = self.measure(fit, [nothing], advance)
        bias, log_perplexity = self.measure(fit, masks, advance, seen, float(unpruned_log_perplexity))
        known = np.isfinite(bias) & np.isfinite(log_perplexity)
        states, bias, log_perplexity = states[known], bias[known], log_perplexity[known]
        if len(states) < MIN_EVALUATIONS:
            raise SettingError("Almost every mask leaves the model without finite answers; set 'most' lower.")
        return SurrogateScores(
            removed=states,
            bias=bias,
            log_perplexity=log_perplexity,
            unpruned_bias=float(unpruned_bias),
            unpruned_log_perplexity=float(unpruned_log_perplexity),
            of_bias=train(states, bias, self.seed),
            of_log_perplexity=train(states, log_perplexity, self.seed + 1),
            bounds=bounds,
            n_neurons=space.n_neurons,
        )

    def measure(
        self,
        fit: Evaluator,
        masks: Sequence[Mask],
        advance: Advance = lambda _: None,
        seen: Seen = lambda *_: None,
        unpruned: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """D and log-perplexity, nats per token, on the draw, both (masks,); NaN where answers are not finite.

        Parameters
        ----------
        advance: told of the masks. seen: told of each; unpruned: the log-perplexity that increases begin from.
        """
        part, figures = self._part(fit), np.full((2, len(masks)), np.nan)
        told = whole(advance, part.work(utility=True))
        for number, found in part.evaluate_walking(masks, told, utility=True):
            if found is not None:
                assert found.log_perplexity is not None
                bias = disparity(found.table)
                figures[:, number] = bias, found.log_perplexity
                seen(bias, found.log_perplexity - unpruned)
        return figures[0], figures[1]

    def _part(self, fit: Evaluator) -> Evaluator:
        """The draw of prompts and text that masks are measured on."""
        assert fit.text is not None, "attention-pruning needs neutral text"
        prompts = PromptDraw.stratified(fit.prompts, self.markers, None, self.seed).of(fit.prompts)
        text = fit.text.first(self.windows, self.window_tokens)
        return fit.on(prompts, text, walk=True)
