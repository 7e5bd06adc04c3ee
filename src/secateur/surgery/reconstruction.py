"""Keep the units of a layer that matter most to its output, and let them stand in for the others.

An output projection computes Y = A Wᵀ from its inputs A, (tokens, inputs). If only some inputs stay, the columns W'
that come closest to Y on a neutral text are those of least squares, which need A through its Gram matrix G = AᵀA alone:

    W' = (W G[:, K] + d W[:, K]) (G[K, K] + d I)⁻¹,    d = ridge · mean diag G,

where the ridge pulls towards the weights as they were. Which inputs to take is settled in the same terms: removing
input i and letting all others make up for it costs ‖W[:, i]‖² / [(G + d I)⁻¹]_ii, and the cheapest goes first, over
and over (Optimal Brain Surgeon: Hassibi and Stork, 1993; for whole channels, Kurtić et al., ZipLM, 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from secateur.measures.utility import NeutralText
from secateur.models import LanguageModel
from secateur.models.language_model import input_width
from secateur.progress import Advance

RIDGE = 0.1
GRAM_BYTES = 4 << 30


@torch.no_grad()
def grams(
    model: LanguageModel,
    text: NeutralText,
    modules: Sequence[nn.Module],
    advance: Advance = lambda _: None,
    memory: int = GRAM_BYTES,
) -> Iterator[Tensor]:
    """Gram matrices of the inputs of output projections over a text, fp32 (inputs, inputs), in the order of modules.

    The text is read as often as needed for no more than ``memory`` bytes of matrices at a time.
    """
    at_once = _at_once(model, modules, memory)
    for start in range(0, len(modules), at_once):
        yield from _grams(model, text, modules[start : start + at_once], advance)


def passes(model: LanguageModel, modules: Sequence[nn.Module], memory: int = GRAM_BYTES) -> int:
    """How often :func:`grams` reads the text."""
    return -(-len(modules) // _at_once(model, modules, memory))


def _at_once(model: LanguageModel, modules: Sequence[nn.Module], memory: int) -> int:
    """How many Gram matrices fit into the memory, at least one."""
    largest = max(4 * input_width(module, model.family.transposed) ** 2 for module in modules)
    return max(1, memory // largest)


def _grams(model: LanguageModel, text: NeutralText, modules: Sequence[nn.Module], advance: Advance) -> list[Tensor]:
    found: list[Tensor | None] = [None] * len(modules)

    def add(number: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2).float()  # (positions, inputs)
        product = inputs.T @ inputs
        known = found[number]
        found[number] = product if known is None else known.add_(product)

    with ExitStack() as hooks:
        for number, module in enumerate(modules):
            hooks.callback(module.register_forward_pre_hook(partial(add, number)).remove)
        for numbers in text.batches():  # windows of equal length, so that nothing is padded
            model.hidden(torch.stack([text.windows[n].tokens for n in numbers]), None, None)
            advance(len(numbers))
    return [gram for gram in found if gram is not None]


def input_norms(gram: Tensor) -> np.ndarray:
    """L2 norm of every input over the text, (inputs,)."""
    return gram.diagonal().clamp(min=0).sqrt().double().cpu().numpy()


@torch.no_grad()
def cheapest_first(gram: Tensor, weight: Tensor, removed: np.ndarray, size: int, ridge: float = RIDGE) -> np.ndarray:
    """The inputs to keep, ascending: all but those removed and, one after the other, those that cost least.

    Parameters
    ----------
    gram: (inputs, inputs). weight: (outputs, inputs).
    removed: bool (inputs,), what goes first whatever it costs. size: inputs to keep.
    """
    inverse = torch.linalg.inv(_damped(gram.double(), ridge))
    weight = weight.double().clone()
    alive = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    first = np.flatnonzero(removed).tolist()
    for step in range(len(gram) - size):
        cost = weight.square().sum(dim=0) / inverse.diagonal()
        cost[~alive] = torch.inf
        gone = first[step] if step < len(first) else int(cost.argmin())
        row = inverse[gone] / inverse[gone, gone]
        weight -= torch.outer(weight[:, gone], row)
        inverse -= torch.outer(inverse[:, gone], row)
        inverse[gone, gone] = 1.0  # its row and column are 0 now
        alive[gone] = False
    return np.flatnonzero(alive.cpu().numpy())


@torch.no_grad()
def stand_in(gram: Tensor, weight: Tensor, kept: np.ndarray, ridge: float = RIDGE) -> Tensor:
    """Columns of the kept inputs that come closest to the whole projection, (outputs, kept), in its precision."""
    index = torch.from_numpy(kept).to(gram.device)
    whole, own = gram.double(), weight.double()
    damping = ridge * whole.diagonal().mean()
    target = own @ whole[:, index] + damping * own[:, index]  # (outputs, kept)
    inner = _damped(whole, ridge)[index][:, index]
    solved: Tensor = torch.linalg.solve(inner, target.T).T
    return solved.to(weight.dtype)


def _damped(gram: Tensor, ridge: float) -> Tensor:
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
