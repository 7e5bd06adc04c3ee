"""The benchmark of searches: its figure, its budgets, and that select alone decides."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import fit_of, model_of

from secateur.evaluation import Evaluator
from secateur.measures.disparity import corrected_square
from secateur.search.base import Problem
from secateur.search.survey import Survey
from secateur.units import Mask


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "hypervolume.py"
    spec = importlib.util.spec_from_file_location("benchmark_hypervolume", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


bench = load()
Point = bench.Point
QUICK: dict[str, dict[str, Any]] = {
    "annealing": {"heads": 4, "neurons": 30, "block": 8, "rounds": 2, "chains": 16, "steps": 40},
    "attention-pruning": {"chains": 20, "steps": 50, "most": 3},
    "fasp": {},
    "random-search": {"neurons": 30, "block": 8, "rounds": 2},
}
EVALUATIONS = 70


def pair(price: float, bias: float, increase: float) -> tuple[Any, Any]:
    """On select a price, on test what the mask does; the bias on select does not count."""
    return Point(0.0, price), Point(bias**2, increase)


def test_a_mask_that_is_free_and_takes_all_bias_away_has_the_whole_area() -> None:
    assert bench.removed_bias([pair(0.0, 0.0, 0.0)], 2.0, 0.1) == pytest.approx(1)
    assert bench.removed_bias([pair(-0.01, 0.0, -0.02)], 2.0, 0.1) == pytest.approx(1)


def test_known_areas() -> None:
    volume = bench.removed_bias
    assert volume([], 2.0, 0.1) == 0
    assert volume([pair(0.02, 1.0, 0.02)], 2.0, 0.1) == pytest.approx(0.5 * 0.8)
    assert volume([pair(0.02, 1.0, 0.02), pair(0.06, 0.5, 0.06)], 2.0, 0.1) == pytest.approx(0.5 * 0.4 + 0.75 * 0.4)
    assert volume([pair(0.02, 3.0, 0.02)], 2.0, 0.1) == pytest.approx(-0.5 * 0.8), "harm counts"
    assert volume([pair(0.15, 0.0, 0.0)], 2.0, 0.1) == 0, "select has it beyond all prices"
    assert volume([pair(0.0, np.inf, np.inf)], 2.0, 0.1) == 0
    assert np.isnan(volume([], 0.0, 0.1))


def test_the_indicator_is_the_area_that_is_dominated_on_test() -> None:
    volume = bench.hypervolume
    assert volume([], 2.0, 0.1) == 0
    assert volume([pair(0.5, 1.0, 0.02)], 2.0, 0.1) == pytest.approx(0.5 * 0.8), "prices on select do not count"
    assert volume([pair(0.0, 0.5, 0.06), pair(0.0, 1.0, -0.02)], 2.0, 0.1) == pytest.approx(0.5 + 0.25 * 0.4)
    assert volume([pair(0.0, 3.0, 0.0), pair(0.0, 0.0, 0.2), pair(0.0, np.inf, np.inf)], 2.0, 0.1) == 0
    assert np.isnan(volume([], 0.0, 0.1))


def test_a_mask_that_costs_more_on_test_counts_by_its_share_and_one_that_costs_less_by_no_more_than_all() -> None:
    # Dearer on test: price / .04 of it from .02 to .04, all of it from there on.
    expected = (0.04**2 - 0.02**2) / (2 * 0.04) + 0.06
    assert bench.removed_bias([pair(0.02, 0.0, 0.04)], 2.0, 0.1) == pytest.approx(expected / 0.1)
    assert bench.removed_bias([pair(0.02, 0.0, 0.01)], 2.0, 0.1) == pytest.approx(0.8)


def test_what_is_taken_does_not_depend_on_test() -> None:
    """The second is taken from its price on select on, though on test it is dearer and worse than the first."""
    pairs = [pair(0.02, 1.0, 0.02), pair(0.06, 1.5, 0.2)]
    assert bench.removed_bias(pairs, 2.0, 0.1) == pytest.approx(
        (0.5 * 0.04 + 0.25 * (0.1**2 - 0.06**2) / (2 * 0.2)) / 0.1
    )


@given(st.lists(st.tuples(st.floats(0, 0.12), st.floats(0, 2), st.floats(-0.05, 0.3)), max_size=6))
def test_the_area_is_the_mean_over_prices(masks: list[tuple[float, float, float]]) -> None:
    masks = sorted(masks, key=lambda one: one[0])
    prices, gains = np.linspace(0, 0.1, 20_001)[1:], np.zeros(20_000)
    for price, bias, increase in masks:
        share = np.ones(len(prices)) if increase < 1e-9 else np.minimum(1, prices / increase)
        gains = np.where(prices >= price, (1.5 - bias) * share, gains)
    found = bench.removed_bias([pair(*one) for one in masks], 1.5, 0.1)
    assert found == pytest.approx(gains.mean() / 1.5, abs=2e-3)


def problem_of() -> Problem:
    fit = fit_of()
    return Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None))


@pytest.mark.parametrize("name", bench.SEARCHES)
def test_no_search_measures_more_than_its_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, measured = problem_of(), set[tuple[str, bytes]]()
    evaluate = Evaluator.evaluate

    def noted(self: Evaluator, mask: Any = None, *rest: Any, **named: Any) -> Any:
        if mask is not None and not mask.is_empty:
            measured.add((self.part, mask.key))
        return evaluate(self, mask, *rest, **named)

    monkeypatch.setattr(Evaluator, "evaluate", noted)
    monkeypatch.setattr(bench, "PROPOSALS", 10)
    budget = bench.Budget(EVALUATIONS, markers=2, windows=1)
    settings = bench.settings_of(name, problem, budget)
    found = bench.find(name, problem, {**settings, **QUICK[name]}, seed=1)
    assert 0 < len(measured) <= EVALUATIONS
    assert 1 <= len(found) <= 10
    sets = {tuple(one.removed.tolist()) for one in found}
    assert len(sets) == len(found)
    assert () not in sets
    told = bench.described(name, settings, 1)
    assert told.items() >= settings.items()
    assert len(told) > len(settings)


def test_random_search_measures_all_that_it_may_on_draws_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, turns = problem_of(), list[int]()
    measure = Survey.measure

    def noted(self: Survey, states: Any, *rest: Any) -> None:
        turns.append(len(states))
        measure(self, states, *rest)

    monkeypatch.setattr(Survey, "measure", noted)
    budget = bench.Budget(25, markers=2, windows=1)
    bench.find(
        "random-search", problem, {**bench.settings_of("random-search", problem, budget), **QUICK["random-search"]}, 0
    )
    assert turns == [9, 8, 8]


@pytest.mark.parametrize("name", bench.SEARCHES)
def test_a_budget_that_is_too_small_is_refused(name: str) -> None:
    with pytest.raises(SystemExit, match=f"{name} needs at least"):
        bench.settings_of(name, problem_of(), bench.Budget(7, markers=2, windows=1))


def test_what_is_taken_is_of_the_front_on_select_and_what_counts_is_of_test() -> None:
    whole = fit_of()
    model = model_of()
    select = whole.on(whole.prompts.of_scenarios([0]), whole.text)
    test = whole.on(whole.prompts.of_scenarios([1]), whole.text)
    rng = np.random.default_rng(0)
    masks: list[Any] = [Mask.removing(model, rng.choice(100, 3, replace=False)) for _ in range(20)]
    parts = SimpleNamespace(select=select, test=test)
    pairs = bench.held_out(parts, masks, 0)
    points = [bench.point(select, mask, 0) for mask in masks]
    before = corrected_square(select.evaluate().table, 0)
    kept = [
        number
        for number, one in enumerate(points)
        if one.square < before
        and not any(other.square <= one.square and other.increase <= one.increase and other != one for other in points)
    ]
    assert 2 <= len(kept) < len(masks)
    order = sorted(kept, key=lambda number: points[number].increase)
    assert [select for select, _ in pairs] == [points[number] for number in order]
    assert [test for _, test in pairs] == [bench.point(test, masks[number], 0) for number in order]
    elsewhere = SimpleNamespace(select=select, test=replace(select))
    assert [select for select, _ in bench.held_out(elsewhere, masks, 0)] == [select for select, _ in pairs]
    assert bench.held_out(parts, [], 0) == []


def test_settings_that_are_alike_for_all_cannot_be_set_for_one() -> None:
    assert bench.told_apart(["annealing.steps=9"], ["annealing", "random-search"]) == {"annealing": {"steps": "9"}}
    for pair_ in ("annealing.evaluations=900", "random-search.block=4", "fasp.seeds=1"):
        with pytest.raises(ValueError, match="cannot be set"):
            bench.told_apart([pair_], ["annealing", "random-search"])
