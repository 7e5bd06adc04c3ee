"""How the suites of one study relate: what they differ in, and which of them can be joined."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from secateur.suites import Suite
from secateur.suites.joining import alike

Mode = Literal["across", "attributes", "languages", "joint", "specific", "within"]
MODES: tuple[Mode, ...] = get_args(Mode)
PAIRED: tuple[Mode, ...] = ("across", "attributes", "languages")
Relation = Literal["own", "across", "attributes", "languages", "joint", "together", "random"]
SUITES_TO_JOIN = 3
DIFFERENCES = ("language", "attribute", "domain")
# Of suites that ask about many things: they cannot be told apart by domain.
NO_DOMAIN = ("", "mixed")


@dataclass(frozen=True)
class Joint:
    """Suites that one repair is fitted on together.

    Attributes
    ----------
    source: what the repair is called; its file's name, but for spaces.
    suites: those that are joined.
    target: the suite that was left out and is judged on; None where none was, and all are judged on.
    """

    source: str
    suites: tuple[Suite, ...]
    target: Suite | None = None

    @property
    def relation(self) -> Relation:
        """Of what is judged on to what was fitted on."""
        return "together" if self.target is None else "joint"

    @property
    def targets(self) -> tuple[Suite, ...]:
        """What the repair is judged on."""
        return self.suites if self.target is None else (self.target,)


def relation(source: Suite, target: Suite) -> Relation:
    """The mode that a pair belongs to: the first of language and attribute that differs, else the domain."""
    if source.name == target.name:
        return "own"
    if source.language != target.language:
        return "languages"
    return "attributes" if source.attribute != target.attribute else "across"


def differences(source: Suite, target: Suite) -> tuple[str, ...]:
    """All that a target differs in from a source; a suite of no one domain differs from none in that."""
    names = ("language", "attribute") if {source.domain, target.domain} & {*NO_DOMAIN} else DIFFERENCES
    return tuple(name for name in names if getattr(source, name) != getattr(target, name))


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


def joint_sources(suites: Sequence[Suite]) -> list[Joint]:
    """For every family that can be joined, all suites but each one, and then, as one repair for all, all of them."""
    found, families = list[Joint](), joint_families(suites)
    for family in families:
        for target in family:
            others = tuple(suite for suite in family if suite is not target)
            found.append(Joint(f"all but {target.name}", others, target))
    names = [_slug(family_of(family[0])) for family in families]
    for number, (name, family) in enumerate(zip(names, families, strict=True)):
        same = Counter(names[: number + 1])[name]  # suites of one attribute may have different groups
        found.append(Joint(f"all {name}" if same == 1 else f"all {name}-{same}", tuple(family)))
    return found


def _slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "uses"
