"""How long steps tell a person how far they are, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


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
