"""Forward passes that begin at a later block: what stands before a change in layer l need not be run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.models.language_model import LanguageModel


@dataclass(eq=False)
class Entries:
    """What entered every block of one forward pass.

    Attributes
    ----------
    states: per layer, the hidden states that entered it, (batch, tokens, hidden).
    tuples: whether the blocks return their hidden states as the first of a tuple.
    """

    states: list[Tensor] = field(default_factory=list)
    tuples: bool = False


@contextmanager
def recorded(model: LanguageModel) -> Iterator[Entries]:
    """Note what enters every block of the one forward pass that is made while the context lasts."""
    entries = Entries()

    def note(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        entries.states.append(args[0])
        entries.tuples = isinstance(output, tuple)

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.callback(block.register_forward_hook(note).remove)
        yield entries


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
            changes.enter_context(_replaced(block, _hand_on(entries.tuples)))
        state = entries.states[layer]
        enter = blocks[layer].register_forward_pre_hook(lambda _, args: (state, *args[1:]))
        changes.callback(enter.remove)
        try:
            yield
        finally:
            whole = model.usage.forward - before
            model.usage.forward = before + round(whole * (len(blocks) - layer) / len(blocks))


def _hand_on(tuples: bool) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, None) if tuples else hidden

    return forward


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
