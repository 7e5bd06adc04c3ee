"""Fit, select and test never share a marker or a wording."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SettingError, SuiteError
from secateur.measures.prompts import all_markers
from secateur.measures.splits import (
    MARKER_SHARES,
    NOTHING_SEEN,
    Part,
    Seen,
    Splits,
    check_dealing,
    split,
    whole,
)
from secateur.suites import Suite, load_suite

MEASURE = {"kind": "preference", "a": [" yes"], "b": [" no"]}
SEEDS = st.integers(0, 2**32 - 1)


def make(groups: list[int], paraphrases: list[int]) -> Suite:
    """A suite with so many markers per group and so many paraphrases per scenario."""
    return Suite.model_validate(
        {
            "name": "made",
            "attribute": "any",
            "groups": {f"g{g}": [f"m{g}-{m}" for m in range(count)] for g, count in enumerate(groups)},
            "scenarios": [
                {
                    "id": f"s{s}",
                    "measure": MEASURE,
                    "paraphrases": [{"prompt": f"{s}.{p} {{marker}}"} for p in range(count)],
                }
                for s, count in enumerate(paraphrases)
            ],
        }
    )


SUITES = st.builds(
    make,
    groups=st.lists(st.integers(6, 30), min_size=2, max_size=4),
    paraphrases=st.lists(st.integers(3, 6), min_size=1, max_size=4),
)


def parts_of(splits: Splits) -> list[Part]:
    return [splits.fit, splits.select, splits.test]


@given(suite=SUITES, seed=SEEDS)
def test_parts_are_disjoint_and_together_complete(suite: Suite, seed: int) -> None:
    parts = parts_of(split(suite, seed))
    everything = whole(suite)
    assert sorted(m for part in parts for m in part.markers) == list(everything.markers)
    for scenario, paraphrases in enumerate(everything.paraphrases):
        assert sorted(p for part in parts for p in part.paraphrases[scenario]) == list(paraphrases)
        assert all(part.paraphrases[scenario] for part in parts)
    assert all(list(part.markers) == sorted(part.markers) for part in parts)


@given(suite=SUITES, seed=SEEDS, max_markers=st.none() | st.integers(2, 10))
def test_every_group_is_in_every_part(suite: Suite, seed: int, max_markers: int | None) -> None:
    groups = [group for group, _ in all_markers(suite)]
    for part in parts_of(split(suite, seed, max_markers)):
        for group in range(len(suite.groups)):
            assert sum(groups[marker] == group for marker in part.markers) >= 2


@given(suite=SUITES, seed=SEEDS, max_markers=st.integers(2, 10))
def test_max_markers_thins_fit_and_select_only(suite: Suite, seed: int, max_markers: int) -> None:
    full, thinned = split(suite, seed), split(suite, seed, max_markers)
    groups = [group for group, _ in all_markers(suite)]
    assert thinned.test == full.test
    for part, whole_part in ((thinned.fit, full.fit), (thinned.select, full.select)):
        assert set(part.markers) <= set(whole_part.markers)
        assert part.paraphrases == whole_part.paraphrases
        for group in range(len(suite.groups)):
            available = sum(groups[m] == group for m in whole_part.markers)
            assert sum(groups[m] == group for m in part.markers) == min(available, max_markers)


@given(suite=SUITES, seed=SEEDS)
def test_seed_decides_the_split(suite: Suite, seed: int) -> None:
    assert split(suite, seed) == split(suite, seed)
    others = [split(suite, seed + step) for step in range(1, 6)]
    assert any(other.fit.markers != split(suite, seed).fit.markers for other in others)


def test_seeds_spread_markers_and_wordings_over_the_parts() -> None:
    suite = make([10, 10], [3, 3])
    splits = [split(suite, seed) for seed in range(40)]
    assert {m for s in splits for m in s.fit.markers} == set(range(20))
    assert {s.fit.paraphrases for s in splits} == {((a,), (b,)) for a in range(3) for b in range(3)}


def test_shares_are_as_documented() -> None:
    splits = split(make([100, 20], [3]))
    shares = list(MARKER_SHARES.values())
    assert sum(shares) == pytest.approx(1)
    for part, share in zip(parts_of(splits), shares, strict=True):
        assert sum(marker < 100 for marker in part.markers) == round(100 * share)
        assert sum(marker >= 100 for marker in part.markers) == round(20 * share)


@pytest.mark.parametrize(
    ("groups", "paraphrases", "reason"),
    [
        ([6, 5], [3], "group 'g1' has 5 markers"),
        ([2, 6], [3], "group 'g0' has 2 markers"),
        ([6, 6], [3, 2], "scenario 's1' has 2 paraphrase"),
        ([6, 6], [1], "scenario 's0' has 1 paraphrase"),
    ],
)
def test_too_little_to_split_is_refused(groups: list[int], paraphrases: list[int], reason: str) -> None:
    with pytest.raises(SuiteError) as caught:
        split(make(groups, paraphrases))
    assert reason in str(caught.value)
    assert "'made'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_description_names_markers_and_wordings() -> None:
    suite = make([6, 6], [3])
    splits = split(suite, 4)
    described = splits.describe(suite)
    assert described["seed"] == 4
    names = [marker for _, marker in all_markers(suite)]
    for name, part in zip(("fit", "select", "test"), parts_of(splits), strict=True):
        expected = {
            "markers": [names[m] for m in part.markers],
            "paraphrases": [list(p) for p in part.paraphrases],
            "wordings": [suite.scenarios[0].paraphrases[number].text for number in part.paraphrases[0]],
        }
        assert described[name] == expected


@given(suite=SUITES, seed=SEEDS)
def test_dealing_by_text_divides_as_shuffling_does(suite: Suite, seed: int) -> None:
    shuffled, dealt = split(suite, seed), split(suite, seed, dealing="by text")
    for one, other in zip(parts_of(shuffled), parts_of(dealt), strict=True):
        assert len(one.markers) == len(other.markers)
        assert [len(numbers) for numbers in one.paraphrases] == [len(numbers) for numbers in other.paraphrases]
    everything = whole(suite)
    assert sorted(m for part in parts_of(dealt) for m in part.markers) == list(everything.markers)


def part_of(suite: Suite, seed: int, kind: str) -> dict[str, str]:
    """The part of every marker or wording, dealt by text."""
    described = split(suite, seed, dealing="by text").describe(suite)
    return {text: name for name in ("fit", "select", "test") for text in described[name][kind]}


@given(suite=SUITES, seed=SEEDS, others=st.integers(6, 30))
def test_shared_groups_and_scenarios_are_cut_alike_whatever_else_a_suite_has(
    suite: Suite, seed: int, others: int
) -> None:
    name, markers = next(iter(suite.groups.items()))
    groups = {"new": [f"new {number}" for number in range(others)], name: markers[::-1]}
    new = make([6, 6], [3] * 4 + [4, 3]).scenarios[4:]
    other = suite.model_copy(update={"groups": groups, "scenarios": [*new, *suite.scenarios[::-1]]})
    ours, theirs = (part_of(asked, seed, "markers") for asked in (suite, other))
    assert {marker: theirs[marker] for marker in markers} == {marker: ours[marker] for marker in markers}
    wordings = {one.text for scenario in suite.scenarios for one in scenario.paraphrases}
    ours, theirs = (part_of(asked, seed, "wordings") for asked in (suite, other))
    assert {text: theirs[text] for text in wordings} == ours


@pytest.mark.parametrize("seed", range(4))
def test_of_names_that_stand_among_others_most_are_in_the_same_part(seed: int) -> None:
    gender, race = (load_suite(f"hiring-{attribute}") for attribute in ("gender", "race"))
    ours, theirs = (part_of(suite, seed, "markers") for suite in (gender, race))
    shared = ours.keys() & theirs.keys()
    alike = sum(ours[name] == theirs[name] for name in shared)
    assert len(shared) == 128
    assert 98 <= alike <= 114, "as the documents say"


@given(suite=SUITES, seed=SEEDS, random=st.randoms(use_true_random=False))
def test_suites_that_share_texts_hold_the_same_ones_out(suite: Suite, seed: int, random: Random) -> None:
    """Groups and scenarios in another order, markers and wordings too: dealt by text, parts hold the same texts."""

    def turned(texts: list[Any]) -> list[Any]:
        return random.sample(texts, len(texts))

    groups = {name: turned(suite.groups[name]) for name in turned(list(suite.groups))}
    scenarios = [one.model_copy(update={"paraphrases": turned(one.paraphrases)}) for one in turned(suite.scenarios)]
    other = suite.model_copy(update={"groups": groups, "scenarios": scenarios})

    def texts(asked: Suite) -> list[tuple[set[str], set[str]]]:
        described = split(asked, seed, dealing="by text").describe(asked)
        return [(set(described[n]["markers"]), set(described[n]["wordings"])) for n in ("fit", "select", "test")]

    assert texts(suite) == texts(other)


@given(suite=SUITES, seed=SEEDS, other_seed=SEEDS)
def test_what_another_study_has_seen_is_left_out(suite: Suite, seed: int, other_seed: int) -> None:
    theirs = split(suite, other_seed).describe(suite)
    try:
        rest = split(suite, seed).without(suite, Seen.of(theirs)).describe(suite)
    except SuiteError:  # too little is left; see the test below
        return
    for part in ("fit", "select"):
        assert not set(rest["test"]["markers"]) & set(theirs[part]["markers"])
        assert not set(rest["test"]["wordings"]) & set(theirs[part]["wordings"])
    assert all(rest["test"]["paraphrases"])


def test_too_little_that_another_study_has_not_seen() -> None:
    suite = make([8, 8], [3])
    markers = [marker for words in suite.groups.values() for marker in words]
    with pytest.raises(SuiteError, match="fitted on all but 0 test markers of group 'g0'"):
        split(suite).without(suite, Seen(markers=frozenset(markers)))
    wordings = [paraphrase.text for paraphrase in suite.scenarios[0].paraphrases]
    with pytest.raises(SuiteError, match="fitted on every wording of scenario 's0'"):
        split(suite).without(suite, Seen(wordings=frozenset(wordings)))


def test_nothing_seen_leaves_a_part_as_it_is() -> None:
    suite = make([8, 8], [3, 5])
    assert split(suite, 3).without(suite, NOTHING_SEEN) == split(suite, 3)


def test_an_unknown_way_of_dealing() -> None:
    with pytest.raises(SettingError, match="choose one of: shuffled, by text"):
        check_dealing("by hand")
