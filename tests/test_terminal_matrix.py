"""What a study of reach prints: all of it in full from 80 columns, the matrix from 40."""

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from synthetic import SUITES, reach

from secateur.reports.terminal import generalise_tables
from secateur.studies.reach import GeneraliseResult


def printed(tables: list[Table], width: int) -> str:
    text = StringIO()
    console = Console(file=text, width=width)
    for table in tables:
        console.print(table)
    return text.getvalue()


def figures(tables: list[Table]) -> dict[tuple[str, str, str], int]:
    """The change in percent by method, source and target, as the tables hold it."""
    found = {}
    for table in tables:
        sources, *targets = table.columns
        for target in targets:
            for source, cell in zip(sources.cells, target.cells, strict=True):
                value = Text.from_markup(str(cell)).plain.strip("()▲!*")
                place = (str(table.title).split(":")[0], str(source), str(target.header).replace("\n", "-"))
                if value not in ("", "none", "="):  # one repair for all but a use is judged on that alone
                    found[place] = int(value)
    return found


def matrices(result: GeneraliseResult, width: int) -> list[Table]:
    return [table for table in generalise_tables(result, width) if "held-out change" in str(table.title)]


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_every_pair_stands_in_its_place(width: int) -> None:
    result = reach()
    expected = {
        (cell.method, cell.source, cell.target): round(-100 * cell.reduction.value)
        for cell in result.cells
        if cell.repaired and cell.label.strip("()!") != "="
    }
    assert figures(matrices(result, width)) == expected
    assert "…" not in printed(matrices(result, width), width)
    console = Console(width=width)
    assert all(console.measure(table).minimum <= width for table in matrices(result, width)), "cropped at the edge"


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off(width: int) -> None:
    assert "…" not in printed(generalise_tables(reach(), width), width)


def test_a_wide_terminal_has_one_matrix_a_method() -> None:
    result = reach()
    assert len(matrices(result, 300)) == len(result.methods)
    assert len(matrices(result, 80)) > len(result.methods)
    assert [len(table.columns) - 1 for table in matrices(result, 300)] == [len(SUITES)] * len(result.methods)
