"""What must not suffer: perplexity and KL divergence on neutral text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.errors import DataError
from secateur.measures.disparity import REPLICATES, Interval
from secateur.measures.splits import PartName
from secateur.models import LanguageModel
from secateur.models.restart import Run, plainly
from secateur.progress import Advance
from secateur.units import ActivationMeans

DEFAULT_CORPUS = Path(__file__).parent / "corpus" / "neutral-en.txt"
WINDOW = 256
STRIDE = 224
MIN_WORDS = 300
BLOCK_WORDS = 150
MIN_PASSAGES = 6
DEFAULT_UTILITY_TOKENS = 6144
TOKENS_PER_BATCH = 768


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of text; only tokens from ``start`` on are scored, those before are context."""

    tokens: Tensor
    start: int

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.start


@dataclass(frozen=True, eq=False)
class NeutralText:
    """One part of a neutral text as sliding windows.

    Attributes
    ----------
    windows: of at most ``window`` tokens, ``stride`` tokens apart; every token is scored once, with
        at least ``window - stride`` tokens of context except at the very start.
    """

    windows: tuple[Window, ...]
    window: int
    stride: int

    @property
    def scored(self) -> np.ndarray:
        """Tokens scored in each window, (windows,)."""
        return np.array([window.scored for window in self.windows])

    def batches(self) -> list[list[int]]:
        """Window numbers to run together: equal lengths, so that nothing is padded."""
        rows = max(1, TOKENS_PER_BATCH // self.window)
        by_length: dict[int, list[int]] = {}
        for number, window in enumerate(self.windows):
            by_length.setdefault(len(window.tokens), []).append(number)
        return [numbers[i : i + rows] for numbers in by_length.values() for i in range(0, len(numbers), rows)]

    def some(self, windows: list[int]) -> NeutralText:
        """Windows by their numbers, in that order."""
        return NeutralText(tuple(self.windows[number] for number in windows), self.window, self.stride)

    def first(self, windows: int, length: int | None = None) -> NeutralText:
        """The first windows alone, cut to ``length`` tokens; a window that then scores none is left out."""
        cut = [Window(window.tokens[:length], window.start) for window in self.windows]
        kept = [window for window in cut if window.scored > 0][:windows]
        return NeutralText(tuple(kept), min(self.window, length or self.window), self.stride)


def read_passages(path: str | Path | None = None) -> list[str]:
    """Paragraphs of a text file (separated by blank lines); long or unbroken text is cut into blocks.

    Raises
    ------
    DataError: the file is missing, unreadable, or has fewer than 300 words.
    """
    path = Path(path).expanduser() if path is not None else DEFAULT_CORPUS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The utility text '{path}' cannot be read: {error}.") from error
    words = len(text.split())
    if words < MIN_WORDS:
        raise DataError(f"The utility text '{path}' has {words} word(s); at least {MIN_WORDS} are needed.")
    paragraphs = [p for p in text.split("\n\n") if p.strip()]
    blocks = [block for paragraph in paragraphs for block in _blocks(paragraph, BLOCK_WORDS)]
    # Three parts of at least two passages each, whatever the layout of the file.
    return blocks if len(blocks) >= MIN_PASSAGES else _blocks(" ".join(paragraphs), words // MIN_PASSAGES)


def _blocks(paragraph: str, size: int) -> list[str]:
    words = paragraph.split()
    if len(words) <= 2 * size:
        return [" ".join(words)]
    return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]


def split_text(
    model: LanguageModel,
    passages: list[str],
    seed: int = 0,
    window: int = WINDOW,
    stride: int = STRIDE,
    max_tokens: int | None = DEFAULT_UTILITY_TOKENS,
) -> dict[PartName, NeutralText]:
    """Deal passages into fit, select and test, a third each, and cut each part into windows.

    Parameters
    ----------
    max_tokens: per part; None for all of the text.
    """
    order = np.random.default_rng(seed).permutation(len(passages))
    parts: dict[PartName, NeutralText] = {}
    names: tuple[PartName, ...] = ("fit", "select", "test")
    for number, name in enumerate(names):
        text = "\n\n".join(passages[i] for i in sorted(order[number::3]))
        parts[name] = cut(model, text, window, stride, max_tokens)
    return parts


def cut(
    model: LanguageModel,
    text: str,
    window: int = WINDOW,
    stride: int = STRIDE,
    max_tokens: int | None = None,
) -> NeutralText:
    """Cut a text of any length into sliding windows."""
    ids = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"][:max_tokens])
    windows, scored_to = [], 1  # the first token has no prediction
    for begin in range(0, max(1, len(ids)), stride):
        end = min(begin + window, len(ids))
        if end > scored_to:
            windows.append(Window(ids[begin:end], scored_to - begin))
            scored_to = end
    if not windows:
        raise DataError("The utility text is too short: it gives no token to predict.")
    return NeutralText(tuple(windows), window, stride)


@torch.no_grad()
def hidden_states(
    model: LanguageModel, text: NeutralText, advance: Advance = lambda _: None, run: Run = plainly
) -> list[Tensor]:
    """Per window, the last hidden states that predict its scored tokens, (scored, hidden).

    Parameters
    ----------
    run: makes the pass of a batch of windows, given its number.
    """
    (states,) = _read(model, text, 1, run, advance)
    return states


@torch.no_grad()
def hidden_states_of_each(model: LanguageModel, text: NeutralText, copies: int) -> list[list[Tensor]]:
    """The same for each of several copies; see :func:`secateur.units.masked_each`."""
    return _read(model, text, copies)


def _read(
    model: LanguageModel, text: NeutralText, copies: int, run: Run = plainly, advance: Advance = lambda _: None
) -> list[list[Tensor]]:
    """Per copy and window, the last hidden states that predict its scored tokens, (scored, hidden)."""
    states: list[list[Tensor]] = [[torch.empty(0)] * len(text.windows) for _ in range(copies)]
    for batch, numbers in enumerate(text.batches()):
        windows = [text.windows[n] for n in numbers]
        tokens = torch.stack([window.tokens for window in windows]).repeat(copies, 1)
        hidden = run(batch, partial(model.hidden, tokens, None, None))  # (copies * windows, tokens, hidden)
        for copy, part in zip(states, hidden.chunk(copies), strict=True):
            for number, row, window in zip(numbers, part, windows, strict=True):
                copy[number] = row[window.start - 1 : -1].clone()
        advance(len(numbers))
    return states


@torch.no_grad()
def negative_log_likelihood(model: LanguageModel, text: NeutralText, states: list[Tensor]) -> np.ndarray:
    """Summed negative log-likelihood in nats of each window's scored tokens, (windows,)."""
    losses = [_loss(model, window, state) for window, state in zip(text.windows, states, strict=True)]
    return torch.stack(losses).cpu().numpy().astype(float)


def window_losses(model: LanguageModel, windows: list[Window]) -> Tensor:
    """Summed loss of each of several windows of equal length, (windows,); differentiable."""
    hidden = model.hidden(torch.stack([window.tokens for window in windows]), None, None)
    rows = zip(windows, hidden, strict=True)
    return torch.stack([_loss(model, window, row[window.start - 1 : -1]) for window, row in rows])


def _loss(model: LanguageModel, window: Window, hidden: Tensor) -> Tensor:
    logits = model.logits(hidden)  # (scored, vocabulary)
    loss = cross_entropy(logits, window.tokens[window.start :].to(logits.device), reduction="sum")
    model.check_finite(loss)
    return loss


def perplexity(nll: np.ndarray, text: NeutralText) -> float:
    """exp of the mean negative log-likelihood per token."""
    return float(np.exp(nll.sum() / text.scored.sum()))


def perplexity_increase(before: np.ndarray, after: np.ndarray, text: NeutralText, seed: int = 0) -> Interval:
    """Relative increase of perplexity, with a paired 95 % bootstrap interval over windows.

    Parameters
    ----------
    before, after: (windows,) negative log-likelihoods of the same windows.
    """
    difference, scored = after - before, text.scored
    drawn = np.random.default_rng(seed).integers(len(scored), size=(REPLICATES, len(scored)))
    replicates = np.expm1(difference[drawn].sum(axis=1) / scored[drawn].sum(axis=1))
    return Interval.of(np.expm1(difference.sum() / scored.sum()), replicates)


@torch.no_grad()
def kl_divergence(model: LanguageModel, before: list[Tensor], after: list[Tensor]) -> float:
    """Mean KL(before || after) of the next-token distributions in nats per token.

    Parameters
    ----------
    before, after: last hidden states of the same windows, from :func:`hidden_states`.
    """
    total, count = 0.0, 0
    for one, other in zip(before, after, strict=True):
        p, q = model.log_probabilities(one), model.log_probabilities(other)
        total += float((p.exp() * (p - q)).sum())
        count += len(one)
    return total / count


@torch.no_grad()
def activation_means(model: LanguageModel, text: NeutralText, advance: Advance = lambda _: None) -> ActivationMeans:
    """Mean input of every output projection over a text: the values of mean ablation."""
    modules = [*model.attention_outputs, *model.mlp_outputs]
    sums: dict[int, Tensor] = {}
    tokens = 0

    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            activation = args[0].flatten(0, -2).double().sum(dim=0).cpu()
            sums[number] = sums.get(number, torch.zeros_like(activation)) + activation

        return record

    with ExitStack() as hooks:
        for number, module in enumerate(modules):
            hooks.callback(module.register_forward_pre_hook(hook(number)).remove)
        for numbers in text.batches():
            batch = torch.stack([text.windows[n].tokens for n in numbers])
            model.hidden(batch, None, None)
            tokens += batch.numel()
            advance(len(numbers))
    means = [(sums[number] / tokens).float().numpy() for number in range(len(modules))]
    layers = len(model.attention_outputs)
    heads = tuple(mean.reshape(-1, model.head_dim) for mean in means[:layers])
    return ActivationMeans(heads, tuple(means[layers:]))
