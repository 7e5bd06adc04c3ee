"""The search by counts: what it proposes, when it ends, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import SUITE
from tiny import tiny_model

from secateur.errors import SettingError
from secateur.scoring.base import Ranking
from secateur.search.base import Outcome, Selection
from secateur.search.counts import Counts, geometric
from secateur.search.methods import method
from secateur.units import UnitSpace

SPACE = UnitSpace(heads=(8, 8), kv_heads=(4, 4), neurons=(64, 64), head_dim=4)
HEADS, UNITS = SPACE.n_heads, len(SPACE)


class Scored:
    """A problem whose scores are known, and how often they were asked for."""

    def __init__(self, rank: np.ndarray) -> None:
        self.space = SPACE
        self.rank = rank
        self.asked = 0

    def score(self, scorer: object) -> Ranking:
        self.asked += 1
        return Ranking(self.rank, {})


def proposed(counts: Counts, problem: Scored, within: list[bool] | None = None) -> list[Selection]:
    """All proposals, where proposal n is within the limit if ``within`` says so; without it all are."""
    proposals = counts.proposals(cast(Any, problem), cast(Any, None))
    found = [first] if (first := next(proposals, None)) else []
    while found:
        inside = within[len(found) - 1] if within is not None else True
        try:
            found.append(proposals.send(Outcome(0.0, 0.0, inside)))
        except StopIteration:
            break
    return found


def sizes(found: list[Selection], kind: str) -> list[int]:
    return [len(selection.removed) for selection in found if selection.kind == kind]


def ranks(seed: int) -> np.ndarray:
    """Random ranks with many ties."""
    return np.random.default_rng(seed).integers(0, 12, size=UNITS).astype(float)


@given(st.integers(0, 1000))
def test_each_proposal_holds_the_highest_ranks_of_one_kind_and_ties_go_to_the_lower_position(seed: int) -> None:
    rank = ranks(seed)
    found = proposed(Counts(), Scored(rank))
    assert [selection.kind for selection in found] == ["heads"] * 2 + ["neurons"] * 3
    for selection in found:
        of_kind = range(HEADS) if selection.kind == "heads" else range(HEADS, UNITS)
        expected = sorted(of_kind, key=lambda unit: (-rank[unit], unit))
        assert selection.removed.tolist() == expected[: len(selection.removed)]
        assert selection.knobs == {"count": len(selection.removed)}


@given(st.integers(0, 1000))
def test_equal_scores_give_equal_proposals(seed: int) -> None:
    first, second = (proposed(Counts(factor=1.5), Scored(ranks(seed))) for _ in range(2))
    assert [s.removed.tolist() for s in first] == [s.removed.tolist() for s in second]


def test_ranges_grow_by_the_factor_up_to_half_of_the_units() -> None:
    found = proposed(Counts(), Scored(ranks(0)))
    assert sizes(found, "heads") == [1, 4]
    assert sizes(found, "neurons") == [4, 16, 64]
    found = proposed(Counts(head_start=1, neuron_start=5, factor=2), Scored(ranks(0)))
    assert sizes(found, "heads") == [1, 2, 4, 8]
    assert sizes(found, "neurons") == [5, 10, 20, 40]


@pytest.mark.parametrize(
    ("within", "heads"),
    [
        ([True, False, False], [1, 2, 4]),
        ([False, False], [1, 2]),
        ([False, True, False, True], [1, 2, 4, 8]),  # only counts in a row end the range
    ],
)
def test_two_counts_in_a_row_over_the_limit_end_a_kind_alone(within: list[bool], heads: list[int]) -> None:
    counts = Counts(head_start=1, factor=2)
    found = proposed(counts, Scored(ranks(0)), within + [True] * 10)
    assert sizes(found, "heads") == heads
    assert sizes(found, "neurons") == [4, 8, 16, 32, 64]  # one head count over the limit does not count here


def test_patience_says_how_many_over_the_limit_end_a_range() -> None:
    impatient = proposed(Counts(head_start=1, factor=2, patience=1), Scored(ranks(0)), [True, False] + [True] * 10)
    assert sizes(impatient, "heads") == [1, 2]
    assert Counts().quick().patience == 1


def test_a_range_that_would_begin_above_the_units_is_refused() -> None:
    with pytest.raises(SettingError, match="so 'head_start' cannot be 9"):
        method("random", {"head_start": 9}).check(tiny_model(), SUITE)


def test_a_count_is_tried_alone_and_zero_leaves_a_kind_out() -> None:
    found = proposed(Counts(heads=3, neurons=0), Scored(ranks(0)))
    assert [(selection.kind, len(selection.removed)) for selection in found] == [("heads", 3)]
    found = proposed(Counts(heads=0, neurons=UNITS - HEADS), Scored(ranks(0)))
    assert [(selection.kind, len(selection.removed)) for selection in found] == [("neurons", UNITS - HEADS)]
    assert sizes(proposed(Counts(heads=0), Scored(ranks(0))), "heads") == []


def test_two_zeros_are_refused() -> None:
    with pytest.raises(SettingError, match="both 0"):
        method("random", {"heads": "0", "neurons": "0"})


@pytest.mark.parametrize("setting", ["heads", "neurons"])
def test_a_count_above_the_units_is_refused_at_the_door(setting: str) -> None:
    model = tiny_model()
    space = UnitSpace.of(model)
    number = {"heads": space.n_heads, "neurons": space.n_neurons}[setting]
    method("random", {setting: number}).check(model, SUITE)
    with pytest.raises(
        SettingError, match=f"^random: the model has {number} {setting}, so '{setting}' cannot be {number + 1}"
    ):
        method("random", {setting: number + 1}).check(model, SUITE)


def test_a_kind_that_the_method_does_not_score_is_refused_at_the_door() -> None:
    model = tiny_model()
    method("fairness-pruning", {"heads": 0, "neurons": 5}).check(model, SUITE)
    with pytest.raises(SettingError, match="scores neurons only; leave the setting 'heads' out"):
        method("fairness-pruning", {"heads": 2}).check(model, SUITE)
    with pytest.raises(SettingError, match="'neurons' is 0, and the method scores no others"):
        method("fairness-pruning", {"neurons": 0}).check(model, SUITE)


def test_units_that_are_not_scored_are_never_removed() -> None:
    rank = ranks(0)
    rank[:HEADS] = np.nan
    rank[HEADS : HEADS + 64] = np.nan
    found = proposed(Counts(), Scored(rank))
    assert sizes(found, "heads") == []
    assert sizes(found, "neurons") == [4, 16]  # 64 are left, and a range ends at half
    assert all((selection.removed >= HEADS + 64).all() for selection in found)


@given(st.integers(1, 50), st.integers(0, 5000), st.floats(1.0, 1e308, exclude_min=True))
def test_geometric_counts_rise_by_the_factor_within_bounds(start: int, largest: int, factor: float) -> None:
    counts = geometric(start, largest, factor)
    assert (counts[:1] == [start]) == (start <= largest)
    assert all(count <= largest for count in counts)
    assert all(after > before for before, after in pairwise(counts))
    for before, after in pairwise(counts):
        assert after == before + 1 or abs(after - before * factor) <= 0.5
    assert not counts or max(counts[-1] + 1, counts[-1] * factor + 0.5) > largest
