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


class Clock:
    """Tells the time that it is set to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_plain_output_has_a_line_now_and_then() -> None:
    file, clock = StringIO(), Clock()
    progress = TerminalProgress(Console(file=file, force_terminal=False, width=40), clock)
    with progress.step("Measure [masks], as many as there are", 400) as advance:
        for done, seconds in ((10, 29.0), (10, 1.0), (0, 10.0), (20, 19.0), (40, 1.0), (80, 1.0), (20, 60.0)):
            clock.now += seconds
            advance(done)
            progress.status(f"best so far B [{clock.now - 1000:g}]")
    with progress.step("Another", 2) as advance:
        clock.now += 15
        advance(1)
    assert file.getvalue().splitlines() == [
        "Measure [masks], as many as there are ...",
        "Measure [masks], as many as there are: 20/400, best so far B [29], 0:09:30 left",
        "Measure [masks], as many as there are: 80/400, best so far B [59], 0:04:00 left",
        "Measure [masks], as many as there are: 180/400, best so far B [61], 0:02:28 left",
        "Another ...",
    ]


def test_a_step_that_has_done_nothing_yet_tells_no_time() -> None:
    file, clock = StringIO(), Clock()
    progress = TerminalProgress(Console(file=file, force_terminal=False), clock)
    with progress.step("Measure", 4) as advance:
        clock.now += 31
        advance(0)
        advance(1)
    assert file.getvalue() == "Measure ...\nMeasure: 1/4, 0:01:33 left\n"


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
