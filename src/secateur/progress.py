"""How long steps tell a person how far they are, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


def whole(advance: Advance, size: int) -> Advance:
    """What to call with parts of tasks that are each ``size`` parts; tells ``advance`` of those that are complete."""
    done = 0

    def tell(parts: int) -> None:
        nonlocal done
        before, done = done // size, done + parts
        if done // size > before:
            advance(done // size - before)

    return tell


class Progress:
    """Shows nothing; the base of everything that shows something."""

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Advance]:
        """A step of ``total`` units of work; call the yielded function with what was done."""
        yield lambda done: None

    def status(self, words: str) -> None:
        """What the running step has reached so far, in place of what was said before."""

    def say(self, message: str) -> None:
        """A line worth a person's attention."""
