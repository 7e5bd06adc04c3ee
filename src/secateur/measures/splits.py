"""Fit, select, test: parts of a suite that never mix.

Scores are fitted on *fit*; every choice is made on *select*; *test* is read once, at the end. Parts
share neither markers nor paraphrases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.errors import SuiteError
from secateur.suites import Suite

PartName = Literal["fit", "select", "test"]
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

    def describe(self, suite: Suite) -> dict[str, object]:
        """Plain data for the record of a run: marker texts and paraphrase numbers by part."""
        names = [marker for markers in suite.groups.values() for marker in markers]
        described: dict[str, object] = {"seed": self.seed}
        for name in ("fit", "select", "test"):
            part: Part = getattr(self, name)
            described[name] = {
                "markers": [names[m] for m in part.markers],
                "paraphrases": [list(p) for p in part.paraphrases],
            }
        return described


def whole(suite: Suite) -> Part:
    """Everything in a suite, as an audit alone uses it."""
    paraphrases = tuple(tuple(range(len(s.paraphrases))) for s in suite.scenarios)
    return Part(paraphrases, tuple(range(sum(len(m) for m in suite.groups.values()))))


def split(suite: Suite, seed: int = 0, max_markers: int | None = None, max_test_markers: int | None = None) -> Splits:
    """Divide a suite's markers and paraphrases, deterministically in the seed.

    Within each group half of the markers go to fit, 20 % to select and the rest to test. Of each
    scenario's paraphrases, shuffled, one goes to fit, one to select and the rest to test.

    Parameters
    ----------
    max_markers: at most so many markers per group in fit and in select. max_test_markers: the same for test.

    Raises
    ------
    SuiteError: too few markers or paraphrases to keep the parts apart.
    """
    rng = np.random.default_rng(seed)
    markers: dict[str, list[int]] = {"fit": [], "select": [], "test": []}
    start = 0
    for group, words in suite.groups.items():
        if len(words) < 3 * MIN_MARKERS:
            raise SuiteError(
                f"Suite '{suite.name}': group '{group}' has {len(words)} markers; a repair needs at least "
                f"{3 * MIN_MARKERS}, to fit, select and test on different ones."
            )
        order = (start + rng.permutation(len(words))).tolist()
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
        order = rng.permutation(len(scenario.paraphrases)).tolist()
        paraphrases["fit"].append((order[0],))
        paraphrases["select"].append((order[1],))
        paraphrases["test"].append(tuple(sorted(order[2:])))
    parts = {n: Part(tuple(paraphrases[n]), tuple(sorted(markers[n]))) for n in ("fit", "select", "test")}
    return Splits(**parts, seed=seed)
