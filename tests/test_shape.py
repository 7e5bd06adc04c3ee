"""The one direction of flow: a folder imports only from those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import secateur

ORDER = (
    ("errors", "files", "locking", "progress"),
    ("models",),
    ("suites", "units", "attenuation", "weights"),
    ("measures",),
    ("evaluation",),
    ("scoring",),
    ("search",),
    ("surgery",),
    ("studies",),
    ("reports",),
    ("api",),
    ("cli",),
)
RANK = {name: number for number, names in enumerate(ORDER) for name in names}
SOURCE = Path(secateur.__file__).parent


def test_imports_flow_in_one_direction() -> None:
    wrong = []
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own in RANK:
            wrong += [f"{file}: {name}" for name in imported(file) if RANK.get(name, -1) > RANK[own]]
    assert not wrong


def test_every_folder_has_its_place() -> None:
    parts = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if not path.name.startswith("__")}
    assert parts - {"py.typed"} == set(RANK)


def imported(file: Path) -> list[str]:
    """The parts of the package that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("secateur."):
            names.append(node.module.split(".")[1])
    return names
