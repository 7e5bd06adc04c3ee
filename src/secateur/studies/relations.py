"""How the suites of one study relate: what they differ in, and which of them can be joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from secateur.suites import Suite
from secateur.suites.joining import alike

Mode = Literal["across", "attributes", "languages", "joint", "specific", "within"]
MODES: tuple[Mode, ...] = get_args(Mode)
PAIRED: tuple[Mode, ...] = ("across", "attributes", "languages")
Relation = Literal["own", "across", "attributes", "languages", "joint", "random"]
SUITES_TO_JOIN = 3


def relation(source: Suite, target: Suite) -> Relation:
    """The mode that a pair belongs to: the first of language and attribute that differs, else the domain."""
    if source.name == target.name:
        return "own"
    if source.language != target.language:
        return "languages"
    return "attributes" if source.attribute != target.attribute else "across"


def differences(source: Suite, target: Suite) -> tuple[str, ...]:
    """All that a target differs in from a source."""
    return tuple(name for name in ("language", "attribute", "domain") if getattr(source, name) != getattr(target, name))


def family_of(suite: Suite) -> str:
    """What suites must have in common for one repair to be advised for them."""
    return f"{suite.attribute} ({suite.language})"


def joint_families(suites: Sequence[Suite]) -> list[list[Suite]]:
    """The suites that can be joined, by family; families too small to leave one out are not among them."""
    families: list[list[Suite]] = []
    for suite in suites:
        home = next((family for family in families if alike(family[0], suite)), None)
        if home is None:
            families.append([suite])
        else:
            home.append(suite)
    return [family for family in families if len(family) >= SUITES_TO_JOIN]
