"""Many prompts in one forward pass.

Prompts of a suite share most of their text: the system message, the question up to the marker, and
for each prompt all its candidate answers. A *token tree* holds every shared prefix once. A batch of
prompts becomes one tree, or a few; laid out as a row each, every token attends to its ancestors only and
has its depth as position, so the result equals that of separate prompts, with next to no padding. Models whose
attention does not follow mask and positions alone (see ``Family.tree``) get the tree's root-to-leaf
paths as right-padded rows instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateur.models import LanguageModel
from secateur.models.families import attention_window, supports_tree


@dataclass
class TokenTree:
    """Prefix trees of token sequences; nodes are numbered in order of insertion, parents first.

    Each row of a layout is a tree of its own: -1 is the root of row 0, -2 that of row 1, and so on.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, node: int, token: int) -> int:
        """The node below ``node`` (or a root) for a token."""
        return self._children[node, token]

    def add(self, sequence: Sequence[int], after: int = -1) -> int:
        """Insert a sequence below a node or a root and return its last node."""
        node = after
        for token in sequence:
            child = self._children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self._children[node, token] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(0 if node < 0 else self.depths[node] + 1)
            node = child
        return node


@dataclass(frozen=True, eq=False)
class Layout:
    """A tree as model inputs, and where each node's hidden state comes out.

    Attributes
    ----------
    input_ids, position_ids: (rows, columns).
    attention_mask: additive (rows, 1, columns, columns) for one tree per row, or 0/1
        (rows, columns) for one sequence per row.
    row, column: (nodes,), where each node stands.
    nodes: (rows, columns), the node at each position; -1 for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    column: Tensor
    nodes: Tensor


def use_tree(model: LanguageModel, longest: int) -> bool:
    """Whether prompts of up to ``longest`` tokens can be packed exactly for this model."""
    window = attention_window(model.model.config)
    return supports_tree(model.model.config) and (window is None or longest <= window)


def lay_out_trees(tree: TokenTree, padding: int, dtype: torch.dtype) -> Layout:
    """Lay every tree out in a row of its own in which every token sees its ancestors and itself."""
    row, column, lengths = _places(tree)
    shape = (len(lengths), max(lengths))
    visible = np.tile(np.eye(shape[1], dtype=bool), (shape[0], 1, 1))
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            visible[row[node], column[node]] |= visible[row[node], column[parent]]
    # An additive mask serves every attention implementation; some families only add theirs.
    additive = torch.zeros((shape[0], 1, shape[1], shape[1]), dtype=dtype)
    additive.masked_fill_(~torch.from_numpy(visible)[:, None], torch.finfo(dtype).min)

    def place(values: Sequence[int], rest: int) -> Tensor:
        placed = torch.full(shape, rest)
        placed[row, column] = torch.tensor(values)
        return placed

    return Layout(
        input_ids=place(tree.tokens, padding),
        position_ids=place(tree.depths, 0),
        attention_mask=additive,
        row=torch.tensor(row),
        column=torch.tensor(column),
        nodes=place(range(len(tree)), -1),
    )


def _places(tree: TokenTree) -> tuple[list[int], list[int], list[int]]:
    """Row and column of every node, and the length of every row."""
    row: list[int] = []
    column: list[int] = []
    lengths: list[int] = []
    for parent in tree.parents:
        number = row[parent] if parent >= 0 else -1 - parent
        lengths += [0] * (number + 1 - len(lengths))
        row.append(number)
        column.append(lengths[number])
        lengths[number] += 1
    return row, column, lengths


def lay_out_rows(tree: TokenTree, padding: int) -> Layout:
    """Lay a tree out as one right-padded row per leaf."""
    leaves = sorted(set(range(len(tree))) - set(tree.parents))
    paths = [_path(tree, leaf) for leaf in leaves]
    width = max(len(path) for path in paths)
    input_ids = torch.full((len(paths), width), padding)
    attention_mask = torch.zeros((len(paths), width), dtype=torch.long)
    row = torch.zeros(len(tree), dtype=torch.long)
    nodes = torch.full((len(paths), width), -1)
    for number, path in enumerate(paths):
        input_ids[number, : len(path)] = torch.tensor([tree.tokens[node] for node in path])
        attention_mask[number, : len(path)] = 1
        row[path] = number
        nodes[number, : len(path)] = torch.tensor(path)
    position_ids = torch.arange(width).expand(len(paths), width)
    return Layout(input_ids, position_ids, attention_mask, row, torch.tensor(tree.depths), nodes)


def _path(tree: TokenTree, leaf: int) -> list[int]:
    path = []
    node = leaf
    while node >= 0:
        path.append(node)
        node = tree.parents[node]
    return path[::-1]
