"""Forward passes that begin at a later block: what stands before a change in layer l need not be run again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from secateur.models.language_model import LanguageModel

Forward = Callable[[], Tensor]
Run = Callable[[int, Forward], Tensor]


def plainly(number: int, forward: Forward) -> Tensor:
    """Make the pass of the batch with this number, whole."""
    return forward()


@dataclass(eq=False)
class Entries:
    """What entered the blocks of one forward pass.

    Attributes
    ----------
    states: by layer, the hidden states that entered it, (batch, tokens, hidden).
    tuples: whether the blocks return their hidden states as the first of a tuple.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    tuples: bool = False

    def before(self, layer: int) -> int:
        """The last layer up to ``layer`` whose entry is known."""
        return max(known for known in self.states if known <= layer)


@contextmanager
def recorded(model: LanguageModel, entries: Entries, layers: Collection[int] | None = None) -> Iterator[None]:
    """Note what enters the blocks of the one forward pass that is made while the context lasts.

    Parameters
    ----------
    entries: where to; states of layers that the pass does not run stay as they are.
    layers: the layers to note; None for all.
    """

    def note(layer: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        entries.tuples = isinstance(output, tuple)
        entries.states[layer] = args[0]

    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            if (layers is None or layer in layers) and not _is_skipped(block):
                hooks.callback(block.register_forward_hook(partial(note, layer)).remove)
        yield


@contextmanager
def restarted(model: LanguageModel, layer: int, entries: Entries) -> Iterator[None]:
    """Begin forward passes of the recorded inputs at a layer; the model is restored on any exit.

    Equal to the whole pass as long as nothing differs before that layer. Blocks before it hand their
    input on, the block itself gets the recorded states, and the tokens of these passes count
    by the share of the blocks that are run.
    """
    blocks, before = model.blocks, model.usage.forward
    with ExitStack() as changes:
        for block in blocks[:layer]:
            changes.enter_context(_replaced(block, _HandOn(entries.tuples)))
        state = entries.states[layer]
        enter = blocks[layer].register_forward_pre_hook(lambda _, args: (state, *args[1:]))
        changes.callback(enter.remove)
        try:
            yield
        finally:
            whole = model.usage.forward - before
            model.usage.forward = before + round(whole * (len(blocks) - layer) / len(blocks))


@dataclass(frozen=True)
class _HandOn:
    """In place of a block's forward: its input is its output."""

    tuples: bool

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, None) if self.tuples else hidden


def _is_skipped(block: nn.Module) -> bool:
    return isinstance(block.__dict__.get("forward"), _HandOn)


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put another forward in place of a module's own."""
    own = block.__dict__.get("forward")  # set where another library has wrapped it
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
