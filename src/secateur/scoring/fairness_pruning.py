"""``fairness-pruning``: neurons that respond to the group and are of little importance otherwise.

Martra, "Fairness Pruning: Locating Demographic Bias in GLU-MLP Layers via Differential Activations" (arXiv
2607.28319), with the importance of a neuron from Martra (2025), arXiv 2512.22671.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import Batch, pack
from secateur.measures.prompts import PromptSet
from secateur.measures.utility import NeutralText
from secateur.models import LanguageModel
from secateur.models.language_model import multiplying
from secateur.progress import Advance
from secateur.scoring.base import Ranking, Settings, UnitKind
from secateur.scoring.magnitude import check_importance, neuron_importance, peak_share
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask, UnitSpace, masked


class FairnessPruning(Settings):
    """Weigh a neuron's response to the group against its importance; heads are not scored.

    Per layer, for neuron i with activation a_i, the i-th input of the MLP output projection::

        bias_i  = mean over prompt pairs of |mean_t a_i(p1) - mean_t a_i(p2)|
        score_i = weight * minmax(bias)_i + (1 - weight) * (1 - minmax(importance)_i)

    and the highest scores are removed first. The mean over t takes every token of the prompt itself, from the
    first to the last before the answer, so that the prompts of a pair may differ in length.

    Attributes
    ----------
    weight: of the bias. Default 0.5 (ours). **Known weakness**: the bias score follows the size of the
        activation, whatever the pair differs in (colours pick many of the same neurons as groups do), and what
        is large is needed: at 0.8, removing 1 % of the neurons can destroy a model. The score has no sign,
        either: neurons for and against a stereotype are removed alike.
    importance: "ppm" (default, as in OptiPFair), "vow", "pon" or "l2", from the weights (see
        :class:`~secateur.scoring.magnitude.Magnitude`), or "data": (ppm_G / max + ppm_U / max + ppm_down / max) times
        the L2 norm of a_i over all tokens of the fit text, maxima over the layer. The norm is taken
        once over the whole text (ours; OptiPFair adds up norms of batches, which depends on their size), in
        windows of which none is padded; a token that two windows share counts twice.
    scope: "layer" (default, as published: every layer keeps the same width) ranks within each layer, so that the
        same share of every layer is removed; where counts do not come out even, the higher score decides
        between layers (ours). "global" ranks scores over the whole model.

    Choices left open and made here: a pair is the k-th marker of the first group with the k-th marker of each
    other group, in the same scenario and paraphrase; of groups of unequal size the first markers are paired.
    minmax of equal values is 0.

    Values, (units,), NaN for heads: ``bias`` and ``importance`` as above, and ``score``, 0 to 1.
    """

    kinds: ClassVar[tuple[UnitKind, ...]] = ("neurons",)
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    importance: Literal["ppm", "vow", "pon", "l2", "data"] = "ppm"
    scope: Literal["layer", "global"] = "layer"

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Refuse an importance that needs a gate for a model that has none, and prompts that do not differ.

        Raises
        ------
        SettingError: says what to use instead.
        """
        check_importance(model, self.importance)
        if not suite.marks_prompts:
            raise SettingError(
                f"the suite '{suite.name}' has its markers in the answers only, so all prompts are alike to the "
                "neurons; use another method, such as attribution."
            )

    def work(self, fit: Evaluator) -> int:
        """Steps that :meth:`score` reports."""
        return len(fit.prompts) + (len(_text(fit).windows) if self.importance == "data" else 0)

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> Ranking:
        """Score all neurons of the model as it is under ``mask``; ``means`` do not matter."""
        model, space = fit.model, UnitSpace.of(fit.model)
        with masked(model, mask):
            bias = bias_scores(model, fit.prompts, fit.batch_size, advance)
            importance = self._importance(fit, advance)
        scores = [
            self.weight * minmax(b) + (1 - self.weight) * (1 - minmax(i)) for b, i in zip(bias, importance, strict=True)
        ]
        rank = shares(scores) if self.scope == "layer" else np.concatenate(scores)
        values = {"bias": bias, "importance": importance, "score": scores}
        return Ranking(
            _with_heads(space, rank), {name: _with_heads(space, np.concatenate(v)) for name, v in values.items()}
        )

    def _importance(self, fit: Evaluator, advance: Advance) -> list[np.ndarray]:
        """Per layer, (neurons,)."""
        model, kind = fit.model, self.importance
        layers = range(len(model.blocks))
        if kind == "data":
            norms = activation_norms(model, _text(fit), advance)
            return [peak_share(model, layer).numpy().astype(float) * norms[layer] for layer in layers]
        return [neuron_importance(model, layer, kind).numpy().astype(float) for layer in layers]


def bias_scores(
    model: LanguageModel, prompts: PromptSet, batch_size: int, advance: Advance = lambda _: None
) -> list[np.ndarray]:
    """Per layer, the mean absolute difference of prompt means over all prompt pairs, (neurons,)."""
    one, other = pairs(prompts.groups)
    totals = [np.zeros(neurons) for neurons in model.neurons_per_layer]
    filled = 0
    # A filled paraphrase at a time: the means of all prompts together may be too many to keep.
    for _, group in groupby(prompts.prompts, key=lambda prompt: (prompt.scenario, prompt.paraphrase)):
        of_markers = replace(prompts, prompts=tuple(group))
        for total, mean in zip(totals, prompt_means(model, of_markers, batch_size), strict=True):
            total += (mean[one] - mean[other]).abs().double().sum(dim=0).numpy()
        filled += 1
        advance(len(of_markers))
    return [total / (filled * len(one)) for total in totals]


def pairs(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Markers to compare, as two arrays of columns: the k-th of the first group and the k-th of another."""
    first, *others = (np.flatnonzero(groups == group) for group in np.unique(groups))
    counts = [min(len(first), len(other)) for other in others]
    one = [first[:count] for count in counts]
    other = [columns[:count] for columns, count in zip(others, counts, strict=True)]
    return np.concatenate(one), np.concatenate(other)


@torch.no_grad()
def prompt_means(model: LanguageModel, prompts: PromptSet, batch_size: int) -> list[Tensor]:
    """Per layer, the mean activation over each prompt's own tokens, fp32 (prompts, neurons)."""
    # An answer of one token adds no token to what the model reads: the last prompt token predicts it.
    contexts = tuple(replace(prompt, answers=((0,),)) for prompt in prompts.prompts)
    parts: list[list[Tensor]] = [[] for _ in model.mlp_outputs]

    def collect(share: Tensor, layer: int, activation: Tensor) -> None:
        with multiplying("highest"):
            parts[layer].append((share.to(activation.device) @ activation).cpu())

    for batch in pack(model, replace(prompts, prompts=contexts), batch_size):
        layout = batch.layout
        with _watching(model, partial(collect, own_shares(batch))):
            model.hidden(layout.input_ids, layout.position_ids, layout.attention_mask)
    return [torch.cat(part) for part in parts]


def own_shares(batch: Batch) -> Tensor:
    """What each position adds to each prompt's mean, (prompts, positions): 1 / length for the prompt's own tokens.

    For prompts with one answer of one token. Prompts that begin alike share positions, which count for each.
    """
    layout = batch.layout
    last = batch.nodes[batch.read]  # (prompts,), the node of each prompt's last token
    row, column = layout.row[last], layout.column[last]
    if layout.attention_mask.dim() == 4:  # a tree: the last token sees the tokens of its prompt alone
        own = layout.attention_mask[row, 0, column] == 0  # (prompts, columns)
    else:
        own = torch.arange(layout.input_ids.shape[1]) <= column[:, None]
    shares = torch.zeros(len(last), *layout.input_ids.shape)
    shares[torch.arange(len(last)), row] = own / own.sum(dim=1, keepdim=True)
    return shares.flatten(1)


@torch.no_grad()
def activation_norms(model: LanguageModel, text: NeutralText, advance: Advance = lambda _: None) -> list[np.ndarray]:
    """Per layer, the L2 norm of each neuron's activation over all tokens of all windows, (neurons,)."""
    squares = [np.zeros(neurons) for neurons in model.neurons_per_layer]

    def collect(layer: int, activation: Tensor) -> None:
        squares[layer] += activation.double().square().sum(dim=0).cpu().numpy()

    with _watching(model, collect):
        for numbers in text.batches():  # windows of equal length, so that nothing is padded
            model.hidden(torch.stack([text.windows[n].tokens for n in numbers]), None, None)
            advance(len(numbers))
    return [np.sqrt(square) for square in squares]


@contextmanager
def _watching(model: LanguageModel, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show ``see`` each layer's number and activations, fp32 (positions, neurons), as the model computes them."""

    def hook(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(layer, args[0].flatten(0, -2).float())

    with ExitStack() as hooks:
        for layer, module in enumerate(model.mlp_outputs):
            hooks.callback(module.register_forward_pre_hook(partial(hook, layer)).remove)
        yield


def minmax(values: np.ndarray) -> np.ndarray:
    """Values moved and scaled to lie from 0 to 1; 0 where all are equal."""
    span = values.max() - values.min()
    return np.asarray((values - values.min()) / (span if span > 0 else 1.0))


def shares(scores: list[np.ndarray]) -> np.ndarray:
    """Ranks that take the same share of every layer, (neurons of all layers,), from scores per layer.

    Within a layer the highest score comes first; of units at the same share of their layers, the one with
    the higher score, then the one in the lower position.
    """
    taken = [np.argsort(np.argsort(-score, kind="stable")) / len(score) for score in scores]
    order = np.lexsort((-np.concatenate(scores), np.concatenate(taken)))  # the last key counts first
    rank = np.empty(len(order))
    rank[order] = -np.arange(len(order), dtype=float)
    return rank


def _with_heads(space: UnitSpace, neurons: np.ndarray) -> np.ndarray:
    """Values of all units, (units,), from those of the neurons."""
    return np.concatenate([np.full(space.n_heads, np.nan), neurons])


def _text(fit: Evaluator) -> NeutralText:
    assert fit.text is not None, "data-driven importance needs neutral text"
    return fit.text
