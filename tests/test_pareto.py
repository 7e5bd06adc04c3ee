"""Fronts, areas, and the few points that stand for a front."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.search.pareto import dominated_area, front, greedy

Points = list[tuple[float, float]]
POINTS = st.lists(st.tuples(st.floats(0, 1.2), st.floats(0, 0.15)), min_size=1, max_size=7)


@given(POINTS)
def test_the_front_holds_what_nothing_dominates(points: Points) -> None:
    kept = [
        number
        for number, one in enumerate(points)
        if not any(all(a <= b for a, b in zip(other, one, strict=True)) and other != one for other in points)
    ]
    assert front(np.array(points)).tolist() == kept


def test_a_third_objective_keeps_what_is_best_in_it() -> None:
    assert front(np.array([[0.5, 0.1, 3], [0.5, 0.1, 2], [0.6, 0.1, 1], [0.6, 0.2, 1]])).tolist() == [1, 2]


def test_what_is_dominated_is_an_area() -> None:
    assert dominated_area(np.array([[0.5, 0.02], [0.2, 0.06]]), (1.0, 0.1)) == pytest.approx(0.5 * 0.08 + 0.3 * 0.04)
    assert dominated_area(np.array([[0.5, 0.2], [1.2, 0.0]]), (1.0, 0.1)) == 0
    assert dominated_area(np.zeros((0, 2)), (1.0, 0.1)) == 0


@given(POINTS, st.integers(0, 500))
def test_the_area_is_that_share_of_random_points(points: Points, seed: int) -> None:
    drawn = np.random.default_rng(seed).random((20_000, 2)) * [1.0, 0.1]
    inside = np.any([(drawn >= point).all(axis=1) for point in np.array(points)], axis=0).mean()
    assert dominated_area(np.array(points), (1.0, 0.1)) / 0.1 == pytest.approx(inside, abs=0.02)


@given(POINTS, st.integers(1, 3))
def test_greedy_ones_dominate_about_as_much_as_any_others(points: Points, count: int) -> None:
    """At least 1 - 1/e of the best, since what dominates is a submodular function."""
    array, worst = np.array(points), (1.0, 0.1)
    found = greedy(array, np.arange(len(points)), count, worst)
    best = max(
        dominated_area(array[list(some)], worst) for some in combinations(range(len(points)), min(count, len(points)))
    )
    assert dominated_area(array[found], worst) >= (1 - 1 / math.e) * best - 1e-9
    assert len(found) == len(set(found)) <= count
