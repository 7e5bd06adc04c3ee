"""Fit, select, test: parts of a suite that never mix.

Scores are fitted on *fit*; every choice is made on *select*; *test* is read once, at the end. Parts
share neither markers nor paraphrases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal, get_args

import numpy as np

from secateur.errors import SettingError, SuiteError
from secateur.suites import Suite

PartName = Literal["fit", "select", "test"]
Dealing = Literal["shuffled", "by text"]
MARKER_SHARES = {"fit": 0.50, "select": 0.20, "test": 0.30}
MIN_MARKERS = 2


@dataclass(frozen=True)
class Part:
    """Which paraphrases of every scenario and which markers (flat positions) belong together."""

    paraphrases: tuple[tuple[int, ...], ...]
    markers: tuple[int, ...]


@dataclass(frozen=True)
class Splits:
    """The three parts and the seed that made them."""

    fit: Part
    select: Part
    test: Part
    seed: int

    def describe(self, suite: Suite) -> dict[str, Any]:
        """Plain data for the record of a run: marker texts and paraphrase numbers by part."""
        names = suite.markers
        described: dict[str, Any] = {"seed": self.seed}
        for name in ("fit", "select", "test"):
            part: Part = getattr(self, name)
            described[name] = {
                "markers": [names[m] for m in part.markers],
                "paraphrases": [list(p) for p in part.paraphrases],
                "wordings": _wordings(suite, part),
            }
        return described

    def without(self, suite: Suite, seen: Seen) -> Splits:
        """The same with a test part that another study has not seen, whatever suite that study was about.

        Of a scenario whose test wordings have all been seen, others that have not are taken in their place.

        Raises
        ------
        SuiteError: too little is left of the suite.
        """
        names, start = suite.markers, 0
        markers = [marker for marker in self.test.markers if names[marker] not in seen.markers]
        for group, words in suite.groups.items():
            left = sum(start <= marker < start + len(words) for marker in markers)
            if left < MIN_MARKERS:
                raise SuiteError(
                    f"Suite '{suite.name}': the plan was fitted on all but {left} test markers of group '{group}'; "
                    f"at least {MIN_MARKERS} new ones are needed."
                )
            start += len(words)
        paraphrases = []
        for scenario, dealt in zip(suite.scenarios, self.test.paraphrases, strict=True):
            new = [number for number, one in enumerate(scenario.paraphrases) if one.text not in seen.wordings]
            if not new:
                raise SuiteError(
                    f"Suite '{suite.name}': the plan was fitted on every wording of scenario '{scenario.id}'."
                )
            paraphrases.append(tuple(number for number in new if number in dealt) or tuple(new))
        return replace(self, test=Part(tuple(paraphrases), tuple(markers)))


@dataclass(frozen=True)
class Seen:
    """Texts that scores were fitted on or a choice was made by: markers, and wordings with their slot."""

    markers: frozenset[str] = frozenset()
    wordings: frozenset[str] = frozenset()

    @classmethod
    def of(cls, splits: dict[str, Any]) -> Seen:
        """From what :meth:`Splits.describe` says."""
        parts = [splits.get(name, {}) for name in ("fit", "select")]
        return cls(
            *(frozenset(text for part in parts for text in part.get(key, ())) for key in ("markers", "wordings"))
        )


NOTHING_SEEN = Seen()


def _wordings(suite: Suite, part: Part) -> list[str]:
    """The texts of a part's paraphrases, each once."""
    pairs = zip(suite.scenarios, part.paraphrases, strict=True)
    return list(dict.fromkeys(scenario.paraphrases[number].text for scenario, numbers in pairs for number in numbers))


def whole(suite: Suite) -> Part:
    """Everything in a suite, as an audit alone uses it."""
    paraphrases = tuple(tuple(range(len(s.paraphrases))) for s in suite.scenarios)
    return Part(paraphrases, tuple(range(sum(len(m) for m in suite.groups.values()))))


def check_dealing(dealing: str) -> Dealing:
    """Refuse an unknown way of dealing.

    Raises
    ------
    SettingError: says what there is.
    """
    for known in get_args(Dealing):
        if dealing == known:
            return known  # type: ignore[no-any-return]
    raise SettingError(f"Unknown dealing '{dealing}'; choose one of: {', '.join(get_args(Dealing))}.")


def split(
    suite: Suite,
    seed: int = 0,
    max_markers: int | None = None,
    max_test_markers: int | None = None,
    dealing: Dealing = "shuffled",
) -> Splits:
    """Divide a suite's markers and paraphrases, deterministically in the seed.

    Within each group half of the markers go to fit, 20 % to select and the rest to test. Of each
    scenario's paraphrases, one goes to fit, one to select and the rest to test.

    Parameters
    ----------
    max_markers: at most so many markers per group in fit and in select. max_test_markers: the same for test.
    dealing: "shuffled", or "by text": in the order of a hash of seed and text, so that suites which share groups or
        scenarios have their markers and wordings in the same parts. Of groups that share only some of their markers,
        those that are shared are mostly in the same part.

    Raises
    ------
    SuiteError: too few markers or paraphrases to keep the parts apart.
    """
    rng = np.random.default_rng(seed)

    def dealt(texts: Sequence[str]) -> list[int]:
        if dealing == "shuffled":
            shuffled: list[int] = rng.permutation(len(texts)).tolist()
            return shuffled
        return sorted(range(len(texts)), key=lambda number: sha256(f"{seed}\n{texts[number]}".encode()).digest())

    markers: dict[str, list[int]] = {"fit": [], "select": [], "test": []}
    start = 0
    for group, words in suite.groups.items():
        if len(words) < 3 * MIN_MARKERS:
            raise SuiteError(
                f"Suite '{suite.name}': group '{group}' has {len(words)} markers; a repair needs at least "
                f"{3 * MIN_MARKERS}, to fit, select and test on different ones."
            )
        order = [start + number for number in dealt(words)]
        n_fit = min(round(MARKER_SHARES["fit"] * len(words)), len(words) - 2 * MIN_MARKERS)
        n_select = max(MIN_MARKERS, round(MARKER_SHARES["select"] * len(words)))
        markers["fit"] += order[:n_fit][:max_markers]
        markers["select"] += order[n_fit : n_fit + n_select][:max_markers]
        markers["test"] += order[n_fit + n_select :][:max_test_markers]
        start += len(words)
    paraphrases: dict[str, list[tuple[int, ...]]] = {"fit": [], "select": [], "test": []}
    for scenario in suite.scenarios:
        if len(scenario.paraphrases) < 3:
            raise SuiteError(
                f"Suite '{suite.name}': scenario '{scenario.id}' has {len(scenario.paraphrases)} paraphrase(s); "
                "a repair needs at least 3, to fit, select and test on different ones."
            )
        order = dealt([paraphrase.text for paraphrase in scenario.paraphrases])
        paraphrases["fit"].append((order[0],))
        paraphrases["select"].append((order[1],))
        paraphrases["test"].append(tuple(sorted(order[2:])))
    parts = {n: Part(tuple(paraphrases[n]), tuple(sorted(markers[n]))) for n in ("fit", "select", "test")}
    return Splits(**parts, seed=seed)
