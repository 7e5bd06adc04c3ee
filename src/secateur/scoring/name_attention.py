"""``name-attention``: how much each head looks back at the name (any marker) from the words after it.

For head h and one prompt, a_h is the mean (or the largest) attention weight over all pairs of a query token
after the marker and a key token of the marker. The score under a group is the mean of a_h over the
group's prompts in a scenario, then over scenarios; the majority is the suite's first group, the minority the
mean over all others. Heads high under the minority and not under the majority are candidates
(see :class:`secateur.search.difference.SetDifference`): Ma, Salinas, Henderson and Nyarko, "Breaking Down Bias: On The
Limits of Generalizable Pruning Strategies" (FAccT 2025, arXiv 2502.07771).

What the method leaves open, and we chose: the mean over pairs, not the sum, so that a name of many tokens does
not score higher for its length; queries up to the end of the prompt, answers left out; every scenario counts alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import Batch, pack
from secateur.measures.packing import Layout
from secateur.measures.prompts import Prompt, PromptSet
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.base import Ranking, Settings, UnitKind
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask, UnitSpace, masked

Variant = Literal["mean", "max"]
Span = tuple[int, int]


class NameAttention(Settings):
    """Attention from the tokens after a marker to the marker's tokens.

    Attributes
    ----------
    variant: "mean" or "max" over the pairs of query and key tokens of one prompt. The paper has both; the mean is our
        default, since a single pair decides less.

    Scenarios whose markers stand in the answers only, or at the very end of the prompt, are left out.
    """

    kinds: ClassVar[tuple[UnitKind, ...]] = ("heads",)
    variant: Variant = "mean"

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Refuse suites without markers in the prompts, and models that give no attention weights.

        The model reads two tokens to find out.
        """
        if not suite.marks_prompts:
            raise SettingError(
                f"the suite '{suite.name}' has its markers in the answers only, so no token of a prompt can look back "
                "at one; use another method, such as fasp or attribution."
            )
        with torch.no_grad(), attention_weights(model) as weights:
            model.hidden(torch.zeros((1, 2), dtype=torch.long), None, None)
        _check_weights(model, weights)

    def work(self, fit: Evaluator) -> int:
        """One step per prompt."""
        return len(fit.prompts)

    @torch.no_grad()
    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> Ranking:
        """Score all heads of the model as it is under ``mask``; neurons get NaN.

        Returns
        -------
        Ranking: by the attention under the minority. Values: ``majority`` and ``minority``, the attention
            weights; ``consistency``, the share of scenarios in which the minority's is the larger.

        Raises
        ------
        SettingError: no prompt has tokens after its marker, or the model gives no attention weights.
        """
        model = fit.model
        spans = marker_spans(fit.prompts.prompts)
        prompts = _contexts(fit.prompts, spans)
        advance(len(fit.prompts) - len(prompts))
        if not len(prompts):
            raise SettingError(
                f"No prompt of the suite '{prompts.suite.name}' has tokens after its marker; use another method, such "
                "as fasp or attribution."
            )
        attention = []  # (prompts, heads) by batch
        with masked(model, mask), attention_weights(model) as weights:
            for batch in pack(model, prompts, fit.batch_size):
                pairs = Pairs.of(batch, [spans[_key(prompt)] for prompt in batch.prompts])
                model.hidden(batch.layout.input_ids, batch.layout.position_ids, batch.layout.attention_mask)
                _check_weights(model, weights)
                attention.append(torch.cat([pairs.reduce(layer, self.variant) for layer in weights], dim=1))
                weights.clear()
                advance(len(batch.prompts))
        by_group = group_means(prompts, torch.cat(attention).numpy().astype(float))  # (scenarios, groups, heads)
        neurons = np.full(UnitSpace.of(model).n_neurons, np.nan)
        majority, minority = by_group[:, 0], by_group[:, 1:].mean(axis=1)  # (scenarios, heads)
        values = {
            "majority": majority.mean(axis=0),
            "minority": minority.mean(axis=0),
            "consistency": (minority > majority).mean(axis=0),
        }
        values = {name: np.concatenate([found, neurons]) for name, found in values.items()}
        return Ranking(values["minority"], values)


def _key(prompt: Prompt) -> tuple[int, int, int]:
    return prompt.scenario, prompt.paraphrase, prompt.marker


def marker_spans(prompts: Sequence[Prompt]) -> dict[tuple[int, int, int], Span]:
    """Where the marker's tokens begin and end in each prompt, by scenario, paraphrase and marker.

    The prompts of one wording differ in the marker only, so what lies between the beginning and the end
    that all of them share is the marker, whatever the tokenizer. Prompts that do not differ are left out.
    A marker that stands twice reaches from its first to its last place.
    """
    spans = {}
    for _, same in groupby(prompts, key=lambda prompt: (prompt.scenario, prompt.paraphrase)):
        wording = list(same)
        prefix, suffix = shared_ends([prompt.context for prompt in wording])
        for prompt in wording:
            if prefix < len(prompt.context) - suffix:
                spans[_key(prompt)] = (prefix, len(prompt.context) - suffix)
    return spans


def shared_ends(sequences: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Lengths of the beginning and of the end that all sequences share.

    If the sequences differ, at least one token of each is left between them: of "Ann" and "Ann Lee" the
    shared "Ann" belongs to the marker.
    """
    shortest = min(map(len, sequences))
    if len(set(sequences)) == 1:
        return shortest, 0
    prefix = _shared(sequences)
    suffix = min(_shared([sequence[::-1] for sequence in sequences]), shortest - prefix)
    if prefix + suffix < shortest:
        return prefix, suffix
    return (prefix - 1, suffix) if prefix else (0, suffix - 1)


def _shared(sequences: Sequence[tuple[int, ...]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _contexts(prompts: PromptSet, spans: dict[tuple[int, int, int], Span]) -> PromptSet:
    """The prompts with tokens after their marker; one token stands in for their answers, and is not run."""
    kept = [p for p in prompts.prompts if _key(p) in spans and spans[_key(p)][1] < len(p.context)]
    return replace(prompts, prompts=tuple(replace(p, answers=((0,),)) for p in kept))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every pair of a query after a marker and a key of the marker, of the prompts of one batch.

    Attributes
    ----------
    row, query, key: (pairs,), where they stand in the layout.
    prompt: (pairs,), the number of the prompt in the batch. count: how many prompts there are.
    """

    row: Tensor
    query: Tensor
    key: Tensor
    prompt: Tensor
    count: int

    @classmethod
    def of(cls, batch: Batch, spans: Sequence[Span]) -> Pairs:
        found: list[Tensor] = []  # per prompt (4, pairs)
        ends = batch.nodes[batch.read]  # the last node of every prompt, since each has one answer token
        for number, (node, (begin, stop)) in enumerate(zip(ends.tolist(), spans, strict=True)):
            row, columns = int(batch.layout.row[node]), path_columns(batch.layout, node)
            query, key = torch.meshgrid(columns[stop:], columns[begin:stop], indexing="ij")
            pairs = query.numel()
            found.append(
                torch.stack([torch.full((pairs,), row), query.flatten(), key.flatten(), torch.full((pairs,), number)])
            )
        row_of, query_of, key_of, prompt_of = torch.cat(found, dim=1)
        return cls(row_of, query_of, key_of, prompt_of, len(spans))

    def reduce(self, weights: Tensor, variant: Variant) -> Tensor:
        """Attention of one layer, (rows, heads, columns, columns), to one number per prompt and head."""
        row, query, key = (index.to(weights.device) for index in (self.row, self.query, self.key))
        picked = weights[row, :, query, key].float().cpu()  # (pairs, heads)
        index = self.prompt[:, None].expand_as(picked)
        how = "amax" if variant == "max" else "mean"
        empty = torch.zeros(self.count, picked.shape[1])
        return empty.scatter_reduce(0, index, picked, how, include_self=False)


def path_columns(layout: Layout, node: int) -> Tensor:
    """Columns of a node's ancestors and of itself in its row, the first token's first."""
    row, column = int(layout.row[node]), int(layout.column[node])
    if layout.attention_mask.dim() == 2:
        return torch.arange(column + 1)
    # In a tree a token sees its ancestors and itself alone, and parents stand before children.
    return torch.nonzero(layout.attention_mask[row, 0, column] == 0).flatten()


def group_means(prompts: PromptSet, values: np.ndarray) -> np.ndarray:
    """Means over the prompts of each scenario and group, (scenarios, groups, n), of values (prompts, n)."""
    group = dict(zip(prompts.markers, prompts.groups.tolist(), strict=True))
    scenario = np.array([prompt.scenario for prompt in prompts.prompts])
    groups = np.array([group[prompt.marker] for prompt in prompts.prompts])
    return np.stack(
        [
            np.stack([values[(scenario == s) & (groups == g)].mean(axis=0) for g in np.unique(groups)])
            for s in prompts.scenarios
        ]
    )


@contextmanager
def attention_weights(model: LanguageModel) -> Iterator[list[Tensor]]:
    """Collect every layer's attention weights, (rows, heads, queries, keys), in the list that is yielded.

    Fast attention never holds the weights, so the plain implementation runs while the context
    lasts; on any exit the one before is back. A layer that gives none adds nothing.
    """
    weights: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
            weights.append(output[1])

    config = model.model.config
    before = config._attn_implementation
    path = model.family.attention
    with ExitStack() as changes:
        # The setting is read at every call, also by the families for which transformers' own switch refuses.
        changes.callback(setattr, config, "_attn_implementation", before)
        config._attn_implementation = "eager"
        for block in model.blocks:
            changes.callback(block.get_submodule(path).register_forward_hook(note).remove)
        yield weights


def _check_weights(model: LanguageModel, weights: list[Tensor]) -> None:
    if len(weights) != len(model.blocks) or any(layer.dim() != 4 for layer in weights):
        raise SettingError(
            f"The model '{model.source}' gives no attention weights; use another method, such as fasp or attribution."
        )
