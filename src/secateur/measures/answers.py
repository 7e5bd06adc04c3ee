"""From the model's next-token distributions to one number y per prompt."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from secateur.errors import NumericalError, SettingError
from secateur.measures.packing import Layout, TokenTree, lay_out_rows, lay_out_trees, use_tree
from secateur.measures.prompts import Prompt, PromptSet
from secateur.models import LanguageModel
from secateur.models.restart import Run, plainly
from secateur.suites import LikelihoodPair, Preference, Quantity, Suite

DEFAULT_BATCH_SIZE = 128
# Attention over a row grows with its square; beyond this length a longer tree costs more than it saves.
ROW_TOKENS = 448
ROW_PROMPTS = 64
PADDING = 0.1  # rows share a pass only where it holds no more than this share of it
SHARED = -1


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts packed for one forward pass.

    Attributes
    ----------
    layout: the model's inputs.
    nodes: (reads,) tree nodes whose next-token distribution is read, each once.
    read, token, answer: (steps,) the read, target token and answer of every answer token.
    prompts: the prompts, in order; their answers are numbered in the same order.
    owner: (rows, columns), the prompt that a position belongs to alone; -1 where several prompts of
        the whole set, in this batch or not, begin alike up to it, and for padding.
    """

    layout: Layout
    nodes: Tensor
    read: Tensor
    token: Tensor
    answer: Tensor
    prompts: tuple[Prompt, ...]
    owner: Tensor

    @property
    def tokens(self) -> int:
        return self.layout.input_ids.numel()


def pack(
    model: LanguageModel, prompts: PromptSet, batch_size: int = DEFAULT_BATCH_SIZE, share_prefixes: bool = True
) -> list[Batch]:
    """Pack prompts into batches of at most ``batch_size`` prompts; to be reused for every mask.

    Parameters
    ----------
    share_prefixes: whether prompts that begin alike are computed alike, where the model's attention allows it.
    """
    if batch_size < 1:
        raise SettingError(f"The batch size must be at least 1, not {batch_size}.")
    asked = prompts.prompts
    longest = max(len(p.context) + max(len(a) for a in p.answers) for p in asked)
    tree = share_prefixes and use_tree(model, longest)
    whole = TokenTree()
    passed = [_passed(whole, prompt) for prompt in asked]
    if tree:
        rows = _short_rows(passed, min(batch_size, ROW_PROMPTS), max(1, batch_size // ROW_PROMPTS))
        groups = [[row.prompts for row in group] for group in rows]
    else:
        groups = [[range(first, first + batch_size)] for first in range(0, len(asked), batch_size)]
    place = partial(_positions, whole=whole, owner=_owners(passed))
    return [
        _pack(model, [asked[row.start : row.stop] for row in group], tree, partial(place, first=group[0].start))
        for group in groups
    ]


@dataclass(frozen=True)
class _Row:
    """Consecutive prompts by their numbers, and how many tokens their tree has."""

    prompts: range
    tokens: int


def _short_rows(passed: Sequence[Collection[int]], size: int, together: int) -> list[list[_Row]]:
    """The fewest rows that prompts fit in, in groups for one pass each, cut where the fewest tokens are forwarded.

    Parameters
    ----------
    passed: per prompt, the nodes of the tree of all prompts that it passes through.
    size, together: at most so many prompts in a row, and rows in a group.
    """
    last: dict[int, int] = {}
    before = []  # per prompt, who passed its nodes last before it, ascending; -1 for nobody
    for number, nodes in enumerate(passed):
        before.append(sorted(last.get(node, -1) for node in nodes))
        last.update(dict.fromkeys(nodes, number))
    cuts = [_rows(before, size, ROW_TOKENS)]
    for limit in range(ROW_TOKENS - 1, 0, -1):  # lower limits leave less padding, and cut elsewhere
        rows = _rows(before, size, limit)
        if len(rows) > len(cuts[0]):
            break
        cuts.append(rows)
    return min((_alike(rows, together) for rows in cuts), key=lambda groups: sum(map(_forwarded, groups)))


def _rows(before: Sequence[list[int]], size: int, max_tokens: int) -> list[_Row]:
    """Fill one row after the other; a prompt that is too long for any has one to itself."""
    rows: list[_Row] = []
    first = tokens = 0
    for number, earlier in enumerate(before):
        new = bisect_left(earlier, first)  # nodes that no prompt of this row has passed
        if number > first and (number - first == size or tokens + new > max_tokens):
            rows.append(_Row(range(first, number), tokens))
            first, tokens, new = number, 0, len(earlier)
        tokens += new
    return [*rows, _Row(range(first, len(before)), tokens)]


def _alike(rows: Sequence[_Row], size: int) -> list[list[_Row]]:
    """Groups of at most ``size`` consecutive rows with little padding."""
    groups = [[rows[0]]]
    for row in rows[1:]:
        group = [*groups[-1], row]
        if len(group) <= size and 1 - sum(one.tokens for one in group) / _forwarded(group) <= PADDING:
            groups[-1] = group
        else:
            groups.append([row])
    return groups


def _forwarded(group: Sequence[_Row]) -> int:
    """Tokens of a pass, padding included."""
    return len(group) * max(row.tokens for row in group)


def _insert(tree: TokenTree, prompt: Prompt, root: int = -1) -> list[list[int]]:
    """Add a prompt to the tree; per answer, the nodes that its tokens are predicted from."""
    end = tree.add(prompt.context, root)
    steps = []
    for answer in prompt.answers:
        nodes = [end]
        for token in answer[:-1]:
            nodes.append(tree.add([token], after=nodes[-1]))
        steps.append(nodes)
    return steps


def _pack(
    model: LanguageModel,
    rows: Sequence[Sequence[Prompt]],
    use_trees: bool,
    owners: Callable[[Layout, TokenTree], Tensor],
) -> Batch:
    tree = TokenTree()
    nodes: list[int] = []
    tokens: list[int] = []
    answers: list[int] = []
    count = 0
    placed = [(prompt, -1 - number) for number, row in enumerate(rows) for prompt in row]
    for prompt, root in placed:
        for answer, sources in zip(prompt.answers, _insert(tree, prompt, root), strict=True):
            nodes += sources
            tokens += answer
            answers += [count] * len(answer)
            count += 1
    unique, read = torch.unique(torch.tensor(nodes), return_inverse=True)
    padding = model.tokenizer.pad_token_id or 0
    layout = lay_out_trees(tree, padding, model.dtype) if use_trees else lay_out_rows(tree, padding)
    owner = owners(layout, tree)
    prompts = tuple(prompt for prompt, _ in placed)
    return Batch(layout, unique, read, torch.tensor(tokens), torch.tensor(answers), prompts, owner)


def _passed(tree: TokenTree, prompt: Prompt) -> set[int]:
    """Add a prompt to the tree; the nodes that it passes through."""
    nodes: set[int] = set()
    for *_, node in _insert(tree, prompt):
        while node >= 0 and node not in nodes:
            nodes.add(node)
            node = tree.parents[node]
    return nodes


def _owners(passed: Sequence[Collection[int]]) -> dict[int, int]:
    """Per node, the number of the only prompt that passes through it."""
    owner: dict[int, int] = {}
    for number, nodes in enumerate(passed):
        for node in nodes:
            owner[node] = SHARED if node in owner else number
    return owner


def _positions(layout: Layout, tree: TokenTree, whole: TokenTree, owner: Mapping[int, int], first: int) -> Tensor:
    """Owners of a batch's positions, numbered from its first prompt, from the owners in the whole tree."""
    nodes: list[int] = []  # of the whole tree, for every node of the batch's
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        nodes.append(whole.child(nodes[parent] if parent >= 0 else -1, token))
    owners = [owner[node] - first if owner[node] >= 0 else SHARED for node in nodes]
    return torch.tensor([*owners, SHARED])[layout.nodes]  # padding is node -1, the last entry


def batch_hidden(model: LanguageModel, batch: Batch, copies: int = 1) -> Tensor:
    """Last hidden states, (copies * rows, columns, hidden): the batch's rows, one copy after the other."""
    layout = batch.layout
    rows, mask = layout.input_ids.repeat(copies, 1), layout.attention_mask
    return model.hidden(rows, layout.position_ids.repeat(copies, 1), mask.repeat(copies, *[1] * (mask.dim() - 1)))


def answer_log_probabilities(model: LanguageModel, batch: Batch, hidden: Tensor, everywhere: bool = False) -> Tensor:
    """log P(answer | prompt), summed over the answer's tokens: (answers of the batch,), fp32.

    Parameters
    ----------
    hidden: (rows, columns, hidden), of one copy of the batch.
    everywhere: compute the output head at all positions instead of those that are read; to compare costs.
    """
    layout = batch.layout
    device = hidden.device
    rows, columns = layout.row[batch.nodes].to(device), layout.column[batch.nodes].to(device)
    if everywhere:
        log_probabilities = model.log_probabilities(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)[rows, columns]
    else:
        log_probabilities = model.log_probabilities(hidden[rows, columns])  # (reads, vocabulary)
    device = log_probabilities.device
    steps = log_probabilities[batch.read.to(device), batch.token.to(device)]
    total = torch.zeros(int(batch.answer[-1]) + 1, device=device)
    return total.index_add(0, batch.answer.to(device), steps)


def preference(measure: Preference, log_probabilities: Tensor) -> Tensor:
    """y = log sum P(a) - log sum P(b) in nats, from (prompts, answers) log-probabilities."""
    split = len(measure.a)
    return log_probabilities[:, :split].logsumexp(1) - log_probabilities[:, split:].logsumexp(1)


def quantity(measure: Quantity, log_probabilities: Tensor) -> Tensor:
    """y = sum_v w_v log v with w the softmax over candidates, from (prompts, candidates)."""
    values = torch.tensor(measure.values, device=log_probabilities.device, dtype=log_probabilities.dtype)
    return log_probabilities.softmax(1) @ values.log()


def likelihood_pair(measure: LikelihoodPair, log_probabilities: Tensor) -> Tensor:
    """y = log P(more) - log P(less) in nats, from (prompts, 2) log-probabilities."""
    return log_probabilities[:, 0] - log_probabilities[:, 1]


MEASURES: dict[type, Callable[[Any, Tensor], Tensor]] = {
    Preference: preference,
    Quantity: quantity,
    LikelihoodPair: likelihood_pair,
}


def batch_y(
    model: LanguageModel, suite: Suite, batch: Batch, hidden: Tensor | None = None, everywhere: bool = False
) -> Tensor:
    """y of every prompt of a batch, (prompts,) in fp32; differentiable with respect to gates.

    Parameters
    ----------
    hidden: the batch's last hidden states where they are known, (rows, columns, hidden).
    everywhere: see :func:`answer_log_probabilities`.
    """
    hidden = batch_hidden(model, batch) if hidden is None else hidden
    log_probabilities = answer_log_probabilities(model, batch, hidden, everywhere)
    values, start = [], 0
    for scenario, group in groupby(batch.prompts, key=lambda prompt: prompt.scenario):
        prompts = list(group)
        measure = suite.scenarios[scenario].measure
        stop = start + sum(len(prompt.answers) for prompt in prompts)
        values.append(MEASURES[type(measure)](measure, log_probabilities[start:stop].view(len(prompts), -1)))
        start = stop
    return torch.cat(values)


@torch.no_grad()
def measure_y(
    model: LanguageModel,
    prompts: PromptSet,
    batches: Sequence[Batch],
    advance: Callable[[int], None] = lambda _: None,
    run: Run = plainly,
    everywhere: bool = False,
) -> Tensor:
    """y of every prompt, (prompts,) fp32 on the CPU.

    Parameters
    ----------
    run: makes the pass of a batch, given its number.
    everywhere: see :func:`answer_log_probabilities`.

    Raises
    ------
    NumericalError: a y is not finite.
    """
    parts = []
    for number, batch in enumerate(batches):
        parts.append(run(number, partial(batch_y, model, prompts.suite, batch, everywhere=everywhere)).cpu())
        advance(len(batch.prompts))
    return _finite(model, prompts.suite, torch.cat(parts))


@torch.no_grad()
def measure_y_of_each(model: LanguageModel, prompts: PromptSet, batches: Sequence[Batch], copies: int) -> Tensor:
    """y of every prompt for each of several copies, (copies, prompts) fp32 on the CPU; see ``masked_each``.

    Raises
    ------
    NumericalError: a y is not finite.
    """
    parts = []
    for batch in batches:
        hidden = batch_hidden(model, batch, copies).chunk(copies)
        parts.append(torch.stack([batch_y(model, prompts.suite, batch, one) for one in hidden]).cpu())
    return _finite(model, prompts.suite, torch.cat(parts, dim=1))


def _finite(model: LanguageModel, suite: Suite, y: Tensor) -> Tensor:
    if not bool(torch.isfinite(y).all()):
        raise NumericalError(
            f"The model '{model.source}' gives no finite answers to suite '{suite.name}'; try --dtype float32."
        )
    return y
