"""``wanda-difference``: activation-weighted magnitudes under the prompts of one group and of the others.

S_ij = |W_ij| * ||X_j||_2, W a linear layer's weight (out, in) and X_j its input feature j at all tokens of
all prompts of one group (Wanda; Sun et al., 2024). What is large under the prompts of the minority and not
under those of the majority is taken to serve the bias (see ``search.percent_difference``): Ma, Salinas, Henderson and
Nyarko, "Breaking Down Bias: On The Limits of Generalizable Pruning Strategies" (FAccT 2025, arXiv 2502.07771).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.packing import Layout, TokenTree, lay_out_rows, lay_out_trees, use_tree
from secateur.measures.prompts import Prompt, PromptSet
from secateur.models import LanguageModel
from secateur.models.language_model import multiplying
from secateur.progress import Advance
from secateur.scoring.base import Ranking, Settings
from secateur.suites import LikelihoodPair, Suite
from secateur.units import ActivationMeans, Mask, UnitSpace, masked
from secateur.weights import linear_layers, weight_matrix

Granularity = Literal["neuron", "weight"]
MAJORITY, MINORITY = 0, 1
# A forward pass ends with the sequence that reaches this many tokens: attention over packed prompts grows with
# the square of their number.
BATCH_TOKENS = 448


@dataclass(frozen=True, eq=False)
class WandaScores(Ranking):
    """Scores of every neuron, and what the scores of every weight are made from.

    Attributes
    ----------
    granularity: what is to be removed.
    neurons: (2, scenarios, neurons), the scores by group (majority, minority), in the flat order of
        the units; one scenario stands for all, unless they are kept apart.
    norms: by linear layer, fp32 (2, scenarios, inputs): ||X_j|| of every input feature. S itself is as
        large as the model, and |W| times the norms at any time.
    """

    granularity: Granularity
    neurons: np.ndarray
    norms: dict[str, np.ndarray]

    @property
    def scenarios(self) -> int:
        return int(self.neurons.shape[1])


class WandaDifference(Settings):
    """Activation-weighted magnitudes by group: the first group of a suite is the majority, all others the minority.

    Attributes
    ----------
    granularity: "neuron" or "weight", what is to be removed. Weights are those of all linear layers
        inside the decoder blocks. A neuron's score is the sum of S over its weights: its gate and up
        rows (its one row, where the MLP is no GLU) and its column of the output projection. The paper removes
        neurons, an earlier prototype of its authors weights; the default is the paper's.
    intersection: keep the scores of the scenarios apart; a search then takes only what is in the
        difference under every one of them (the method's generalised form). The default, as for the paper's repairs of a
        single context: one score over the prompts of all scenarios.

    The paper leaves open, and these are our choices: the calibration prompts are the fit prompts up to the
    answer, each a sequence of its own, padding not counted; for a likelihood pair, whose sentences hold the
    marker, they are both sentences. Norms are sums over tokens, not means: top shares of one group do not
    depend on how many tokens it has. ``rank`` is for display: minority minus majority, each divided
    by its mean over the layer's neurons. Heads are not scored.
    """

    granularity: Granularity = "neuron"
    intersection: bool = False

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Every supported model and every suite will do: both have what is needed."""

    def work(self, fit: Evaluator) -> int:
        """Steps that one call reports to ``advance``."""
        return len(fit.prompts)

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> WandaScores:
        """Score all neurons of the model as it is under ``mask`` from forward passes over the fit prompts.

        Raises
        ------
        NumericalError: the model's output is not finite.
        """
        with masked(fit.model, mask):
            squares = input_squares(fit.model, fit.prompts, fit.batch_size, advance)  # by layer (2, scenarios, inputs)
            pooled = {name: square.sum(axis=1, keepdims=True) for name, square in squares.items()}
            norms = _norms(squares if self.intersection else pooled)
            of_neurons = neuron_scores(fit.model, norms)
            together = neuron_scores(fit.model, _norms(pooled))[:, 0] if self.intersection else of_neurons[:, 0]
        space = UnitSpace.of(fit.model)
        heads = np.full((2, space.n_heads), np.nan)
        by_group = np.concatenate([heads, together], axis=1)  # (2, units)
        return WandaScores(
            rank=_rank(by_group, space),
            values={"minority": by_group[MINORITY], "majority": by_group[MAJORITY]},
            granularity=self.granularity,
            neurons=of_neurons,
            norms=norms,
        )


def _norms(squares: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.sqrt(square).astype(np.float32) for name, square in squares.items()}


def _rank(by_group: np.ndarray, space: UnitSpace) -> np.ndarray:
    """Minority minus majority, each relative to its layer's mean, (units,) from (2, units)."""
    relative = by_group.copy()
    for layer in range(space.n_layers):
        part = space.neuron_slice(layer)
        relative[:, part] /= np.maximum(by_group[:, part].mean(axis=1, keepdims=True), 1e-30)
    return np.asarray(relative[MINORITY] - relative[MAJORITY])


@torch.no_grad()
def neuron_scores(model: LanguageModel, norms: dict[str, np.ndarray]) -> np.ndarray:
    """Sum of S over every neuron's weights: (2, scenarios, neurons) from norms (2, scenarios, inputs) by layer."""
    layers, family, parts = linear_layers(model), model.family, []
    for number, neurons in enumerate(model.neurons_per_layer):
        prefix = f"{family.blocks}.{number}."
        down = prefix + family.mlp_out
        columns = weight_matrix(layers[down]).abs().float().sum(dim=0)  # (neurons,)
        score = torch.from_numpy(norms[down]).to(columns.device) * columns
        for path in family.mlp_in:
            rows = weight_matrix(layers[prefix + path]).abs().float()
            norm = torch.from_numpy(norms[prefix + path]).to(rows.device)
            by_row = norm @ rows.T  # (2, scenarios, rows); a fused projection has the gate rows, then the up rows
            score = score + by_row.unflatten(-1, (-1, neurons)).sum(dim=-2).to(score.device)
        parts.append(score.double().cpu().numpy())
    return np.concatenate(parts, axis=-1)


@torch.no_grad()
def input_squares(
    model: LanguageModel, prompts: PromptSet, batch_size: int, advance: Advance = lambda _: None
) -> dict[str, np.ndarray]:
    """Sum of squares of every input feature of every linear layer over the tokens of each group's prompts.

    Prompts that begin alike share positions (see ``measures.packing``), and a shared position counts
    once for every prompt that passes through it.

    Returns
    -------
    dict: by layer, (2, scenarios, inputs), for majority and minority.
    """
    layers, scenarios = linear_layers(model), {s: i for i, s in enumerate(prompts.scenarios)}
    group = dict(zip(prompts.markers, prompts.groups, strict=True))
    sums: dict[str, Tensor] = {}
    for packed in _packed(model, prompts, batch_size):
        counts = torch.zeros(2, len(scenarios), len(packed.tree))
        for prompt, nodes in packed.paths:
            counts[int(group[prompt.marker] != 0), scenarios[prompt.scenario], nodes] += 1
        with ExitStack() as hooks:
            for name, module in layers.items():
                record = partial(_record, sums, name, counts, packed.layout)
                hooks.callback(module.register_forward_pre_hook(record).remove)
            layout = packed.layout
            model.check_finite(model.hidden(layout.input_ids, layout.position_ids, layout.attention_mask))
        advance(packed.prompts)
    return {name: total.numpy() for name, total in sums.items()}


def _record(
    sums: dict[str, Tensor],
    name: str,
    counts: Tensor,
    layout: Layout,
    module: nn.Module,
    args: tuple[Any, ...],
) -> None:
    """Add the squares of a layer's inputs, weighted by counts (2, scenarios, nodes), to its sums."""
    rows, columns = layout.input_ids.shape
    inputs: Tensor = args[0].reshape(rows, columns, -1)  # OPT's MLP sees (rows * columns, inputs)
    at_nodes = inputs[layout.row.to(inputs.device), layout.column.to(inputs.device)]
    with multiplying("highest"):
        squares = (counts.to(inputs.device) @ at_nodes.float().square()).double().cpu()
    sums[name] = sums[name] + squares if name in sums else squares


@dataclass(frozen=True, eq=False)
class _Packed:
    """Calibration prompts packed for one forward pass.

    Attributes
    ----------
    paths: per sequence, its prompt and the tree's nodes that it passes through.
    prompts: how many prompts begin here.
    """

    tree: TokenTree
    layout: Layout
    paths: list[tuple[Prompt, list[int]]]
    prompts: int


def _packed(model: LanguageModel, prompts: PromptSet, batch_size: int) -> Iterator[_Packed]:
    sequences = [
        (prompt, number == 0, sequence)
        for prompt in prompts.prompts
        for number, sequence in enumerate(calibration_sequences(prompts.suite, prompt))
    ]
    tree_fits = use_tree(model, max(len(sequence) for _, _, sequence in sequences))
    padding = model.tokenizer.pad_token_id or 0
    lay_out: Callable[[TokenTree], Layout] = (
        partial(lay_out_trees, padding=padding, dtype=model.dtype)
        if tree_fits
        else partial(lay_out_rows, padding=padding)
    )
    tree, paths, begun = TokenTree(), list[tuple[Prompt, list[int]]](), 0
    for prompt, first, sequence in sequences:
        if len(paths) == batch_size or len(tree) >= BATCH_TOKENS:
            yield _Packed(tree, lay_out(tree), paths, begun)
            tree, paths, begun = TokenTree(), [], 0
        paths.append((prompt, _add(tree, sequence)))
        begun += first
    yield _Packed(tree, lay_out(tree), paths, begun)


def _add(tree: TokenTree, sequence: tuple[int, ...]) -> list[int]:
    """Insert a sequence and return the nodes that it passes through."""
    node, nodes = -1, []
    for token in sequence:
        node = tree.add([token], after=node)
        nodes.append(node)
    return nodes


def calibration_sequences(suite: Suite, prompt: Prompt) -> list[tuple[int, ...]]:
    """The token sequences of one prompt that statistics are taken over: up to the answer, or both of a pair."""
    if isinstance(suite.scenarios[prompt.scenario].measure, LikelihoodPair):
        return [(*prompt.context, *answer) for answer in prompt.answers]
    return [prompt.context]
