"""What the terminal shows of a running step."""

from __future__ import annotations

from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from secateur.progress import whole
from secateur.reports.terminal import TerminalProgress


@given(st.integers(1, 9), st.lists(st.integers(0, 30)))
def test_parts_of_tasks_are_told_as_whole_tasks(size: int, parts: list[int]) -> None:
    told: list[int] = []
    tell = whole(told.append, size)
    for number, part in enumerate(parts, 1):
        tell(part)
        assert sum(told) == sum(parts[:number]) // size
    assert 0 not in told


def shown(is_terminal: bool) -> str:
    file = StringIO()
    progress = TerminalProgress(Console(file=file, force_terminal=is_terminal, width=120))
    with progress.step("Measure [masks]", 4) as advance:
        advance(1)
        progress.status("best so far B [0.34]")
    progress.status("nobody runs")
    return file.getvalue()


def test_a_bar_says_what_its_step_has_reached() -> None:
    text = shown(is_terminal=True)
    assert "Measure [masks]: best so far B [0.34]" in text
    assert "1/4" in text
    assert "nobody runs" not in text


def test_plain_output_has_a_line_for_the_step() -> None:
    assert shown(is_terminal=False) == "Measure [masks] ...\n"
