"""Removing in rounds: which units a step takes, and which a trial refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import fit_of, model_of
from tiny import tiny_model

import secateur
from secateur.errors import SettingError
from secateur.scoring.attribution import Attribution, Effects
from secateur.search.base import Outcome, Problem, Selection
from secateur.search.elimination import (
    DAMAGE_SHARE,
    MAX_TRIALS,
    STEP_SHARE,
    TOLERANCE,
    Elimination,
    Trial,
    blended,
    geometric_counts,
    next_step,
    ranking,
    top_units,
)
from secateur.search.methods import method
from secateur.units import UnitSpace

SPACE = UnitSpace(heads=(2, 2), kv_heads=(1, 1), neurons=(8, 8), head_dim=4)
UNITS = len(SPACE)
SEEDS = st.integers(0, 10_000)


def random_scores(seed: int) -> Effects:
    rng = np.random.default_rng(seed)
    return Effects(rng.normal(size=UNITS), rng.uniform(0, 0.5, UNITS), rng.uniform(0.1, 1, UNITS), np.ones(UNITS))


@given(SEEDS, st.sampled_from(["heads", "neurons", "both"]))
def test_ranking_holds_units_with_a_gain_in_order_of_gain_per_cost(seed: int, kind: str) -> None:
    scores = random_scores(seed)
    order = ranking(scores, SPACE, kind, np.array([0, 5]))  # type: ignore[arg-type]
    of_kind = {"heads": range(4), "neurons": range(4, UNITS), "both": range(UNITS)}[kind]
    expected = [u for u in of_kind if -scores.effect[u] > scores.error[u] and u not in (0, 5)]
    gain = (-scores.effect - scores.error) / scores.cost
    assert order.tolist() == sorted(expected, key=lambda u: -gain[u])


def test_equal_ranks_go_to_the_lower_position() -> None:
    scores = Effects(np.full(UNITS, -1.0), np.zeros(UNITS), np.ones(UNITS), np.ones(UNITS))
    assert ranking(scores, SPACE, "both").tolist() == list(range(UNITS))


@given(SEEDS, st.floats(0.01, 20), st.integers(1, UNITS))
def test_step_stops_where_the_prediction_reaches_its_share(seed: int, disparity: float, largest: int) -> None:
    scores = random_scores(seed)
    step = next_step(scores, SPACE, "both", np.zeros(0, dtype=int), disparity, largest)
    order = ranking(scores, SPACE, "both")
    assert step.tolist() == order[: len(step)].tolist()
    assert len(step) <= largest
    promised = -scores.effect[step]
    assert promised[:-1].sum() < STEP_SHARE * disparity
    assert promised.sum() >= STEP_SHARE * disparity or len(step) in (largest, len(order))


@pytest.mark.parametrize(("largest", "counts"), [(64, [64, 16, 4]), (4, [4, 1]), (1, [1]), (0, []), (7, [7, 1])])
def test_counts_fall_by_quarters(largest: int, counts: list[int]) -> None:
    assert geometric_counts(largest) == counts


def test_a_count_beyond_the_ranking_takes_all_of_it() -> None:
    scores = Effects(np.array([-1.0] * 3 + [1.0] * (UNITS - 3)), np.zeros(UNITS), np.ones(UNITS), np.ones(UNITS))
    assert [s.removed.tolist() for s in top_units(scores, SPACE, "both", [9, 4, 1])] == [[0, 1, 2], [0]]


@pytest.mark.parametrize(("setting", "kind", "number"), [("max_heads", "heads", 8), ("max_neurons", "neurons", 96)])
def test_more_units_than_there_are_is_refused_if_somebody_asked(setting: str, kind: str, number: int) -> None:
    model, suite = tiny_model(), secateur.load_suite("occupations")
    method("attribution", {setting: number}).check(model, suite)
    with pytest.raises(SettingError, match=f"the model has {number} {kind}, so '{setting}' cannot be 100,000"):
        method("attribution", {setting: 100_000}).check(model, suite)
    with pytest.raises(SettingError, match="so 'neurons' cannot be 97"):
        method("annealing", {"neurons": 97}).check(model, suite)
    method("annealing").check(model, suite)  # the usual counts are more than it has, and become all there is


class Damage:
    """Adds up each removed unit's damage, and counts how often it is asked."""

    def __init__(self, damage: np.ndarray) -> None:
        self.damage = damage
        self.asked = 0

    def __call__(self, removed: np.ndarray) -> float:
        self.asked += 1
        return float(self.damage[removed].sum())


@given(st.integers(1, 80), st.sets(st.integers(0, 79), max_size=2))
def test_trial_refuses_exactly_the_units_that_cost_too_much(size: int, guilty: set[int]) -> None:
    step = np.random.default_rng(size).permutation(80)[:size]
    cost, harm = np.full(80, 0.01), np.full(80, 0.004)
    harm[list(guilty)] = 5.0
    measure, told = Damage(harm), []
    trial = Trial(cost, measure)
    trial.remove(step, told.append)
    assert set(trial.refused) == guilty & set(step)
    assert set(trial.removed) == set(step) - guilty
    assert sum(told) == size
    assert trial.damage == pytest.approx(0.004 * len(trial.removed))
    assert measure.asked == 1 or guilty & set(step)
    assert measure.asked <= 1 + 2 * 2 * np.ceil(np.log2(max(2, size)))


def test_single_culprit_is_found_with_about_one_measurement_per_halving() -> None:
    harm = np.full(64, 0.004)
    harm[63] = 5.0
    measure = Damage(harm)
    Trial(np.full(64, 0.01), measure).remove(np.arange(64))
    assert measure.asked == 1 + 6 + 1  # the whole, the first half of each part, the culprit alone


def test_trial_goes_on_from_the_damage_so_far() -> None:
    harm = np.array([0.0, 0.3, 0.3, 0.3])
    measure = Damage(harm)
    trial = Trial(np.full(4, 0.61), measure)
    for unit in range(4):
        trial.remove(np.array([unit]))
    assert trial.removed.tolist() == [0, 1, 2, 3]
    trial.remove(np.zeros(0, dtype=int))
    assert measure.asked == 4


@pytest.mark.parametrize(("harm", "kept"), [(TOLERANCE * 0.9, 1), (TOLERANCE * 1.1, 0)])
def test_small_excess_is_tolerated(harm: float, kept: int) -> None:
    trial = Trial(np.full(1, 0.1), Damage(np.full(1, DAMAGE_SHARE * 0.1 + harm)))
    trial.remove(np.array([0]))
    assert len(trial.removed) == kept


def test_hopeless_steps_end_after_a_bounded_number_of_measurements() -> None:
    measure = Damage(np.full(200, 5.0))
    trial = Trial(np.full(200, 0.01), measure)
    trial.remove(np.arange(200))
    assert measure.asked <= MAX_TRIALS + 10
    assert len(trial.removed) == 0
    assert sorted(trial.refused) == list(range(200))


@given(st.lists(SEEDS, min_size=1, max_size=5), st.floats(0, 1))
def test_the_mean_of_the_rounds_before_counts_by_the_memory(seeds: list[int], memory: float) -> None:
    rounds = [random_scores(seed) for seed in seeds]
    seen = rounds[0]
    for now in rounds[1:]:
        seen = blended(now, seen, memory)
    effect, error = rounds[0].effect, rounds[0].error
    for now in rounds[1:]:
        effect = (now.effect + memory * effect) / (1 + memory)
        error = (now.error + memory * error) / (1 + memory)
    np.testing.assert_allclose(seen.effect, effect)
    np.testing.assert_allclose(seen.error, error)
    np.testing.assert_array_equal(seen.cost, rounds[-1].cost)


def test_without_memory_only_the_last_round_counts() -> None:
    now, before = random_scores(1), random_scores(2)
    np.testing.assert_array_equal(blended(now, before, 0).effect, now.effect)


def proposals(search: Elimination, within: Callable[[Selection], bool]) -> list[Selection]:
    """What a search proposes on a tiny model, told of each proposal whether it keeps to the limit."""
    problem = Problem(model_of(), fit_of(), [fit_of()], lambda name, total: nullcontext(lambda done: None))
    running = search.proposals(problem, Attribution())
    found: list[Selection] = []
    try:
        found.append(next(running))
        while True:
            found.append(running.send(Outcome(0.0, 0.0, within(found[-1]))))
    except StopIteration:
        return found


def test_heads_and_neurons_alone_come_first_then_every_third_round() -> None:
    found = proposals(Elimination(max_heads=1, max_neurons=4, rounds=4), lambda selection: True)
    assert [selection.kind for selection in found[:2]] == ["heads", "neurons"]
    rounds = [selection.knobs["rounds"] for selection in found[2:]]
    assert rounds == sorted(rounds)
    assert all(number % 3 == 0 for number in rounds[:-1])
    sets = [set(selection.removed.tolist()) for selection in found[2:]]
    assert all(one < other for one, other in pairwise(sets))


def test_fewer_units_are_tried_where_more_break_the_limit() -> None:
    found = proposals(Elimination(max_heads=4, max_neurons=16, rounds=0), lambda selection: False)
    heads = [len(selection.removed) for selection in found if selection.kind == "heads"]
    neurons = [len(selection.removed) for selection in found if selection.kind == "neurons"]
    assert len(neurons) > 1
    assert neurons == sorted(set(neurons), reverse=True)
    assert neurons[-1] == 1
    assert heads == sorted(set(heads), reverse=True)
    assert heads[-1] == 1


def test_rounds_before_are_tried_where_the_last_breaks_the_limit() -> None:
    search = Elimination(max_heads=0, max_neurons=0, rounds=3)
    numbers = [s.knobs["rounds"] for s in proposals(search, lambda selection: False)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] == 1
    assert numbers == list(range(numbers[0], 0, -1))


class Steps(Elimination):
    """Rounds that remove one unit each."""

    def _path(self, problem: Problem, scorer: Attribution, scores: Effects) -> Iterator[np.ndarray]:
        for number in range(self.rounds + self.more_rounds):
            yield np.arange(number + 1)


@pytest.mark.parametrize(
    ("rounds", "outcomes", "numbers"),
    [
        (
            4,
            {4: (0.5, 0.001), 6: (0.4, 0.001), 7: (0.3, 0.001), 9: (0.3, 0.001), 10: (0.2, 0.001)},
            [3, 4, 6, 7, 9, 10],
        ),
        (6, {6: (0.5, 0.001), 9: (0.4, 0.001), 12: (0.3, 0.001)}, [3, 6, 9, 12]),  # as many as there may be
        (6, {6: (0.5, 0.001), 9: (0.6, 0.001)}, [3, 6, 9]),  # no better any more
        (6, {6: (1.0, 0.001)}, [3, 6]),  # no better than three rounds were
        (6, {6: (0.5, 0.011)}, [3, 6]),  # too little of the limit is left
        (6, {6: (0.5, 0.001), 9: (0.4, 0.03)}, [3, 6, 9, 8]),  # beyond the limit
    ],
)
def test_rounds_go_on_while_they_help_and_there_is_room(
    rounds: int, outcomes: dict[int, tuple[float, float]], numbers: list[int]
) -> None:
    problem = Problem(model_of(), fit_of(), [fit_of()], lambda name, total: nullcontext(lambda done: None))
    running = Steps(max_heads=0, max_neurons=0, rounds=rounds, more_rounds=6).proposals(problem, Attribution())
    found = [next(running).knobs["rounds"]]
    with suppress(StopIteration):
        while True:
            bias, increase = outcomes.get(found[-1], (1.0, 0.001))
            found.append(running.send(Outcome(bias, increase, increase < 0.02)).knobs["rounds"])
    assert found == numbers


def test_a_search_without_candidates_is_refused() -> None:
    with pytest.raises(SettingError, match="no candidate"):
        Elimination(max_heads=0, max_neurons=0, rounds=0)
