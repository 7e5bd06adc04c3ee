"""What is believed after measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_annealing_rounds import SMALL as SETTINGS
from test_annealing_rounds import effects_of, problem_of, survey_of

from secateur.search.annealing import find_items
from secateur.search.draw import Estimate, Gaps
from secateur.search.survey import NEAR, PRICES, Beliefs, Measured, Prior, Survey

ITEMS = 12


def survey_with(states: np.ndarray, gaps: np.ndarray, increases: np.ndarray, variance: float = 0.0) -> Survey:
    """A survey of states, (states, items), that found gaps, (states,) in units of the unpruned, and increases."""
    problem = problem_of()
    survey = survey_of(problem, [np.array([unit]) for unit in range(states.shape[1])])
    start = survey.draw.unpruned.value
    survey.found = [
        Measured(
            state,
            Gaps(gap * start, np.full(start.shape, variance)),
            Estimate(np.array(increase), np.array(0.0)),
            int(state.sum()),
        )
        for state, gap, increase in zip(states, gaps, increases, strict=True)
    ]
    return survey


def prior_of(effect: float = 0.0, damage: float = 0.0, items: int = ITEMS) -> Prior:
    return Prior(np.full(items, effect), np.full(items, damage), np.arange(items) < items // 2)


def test_a_prior_holds_no_price_of_units() -> None:
    problem = problem_of()
    scores = effects_of(problem)
    items = find_items(scores, problem, SETTINGS)
    prior = Prior.of(scores, items, problem.space.n_heads, 0.25)
    for units, effect, damage, head in zip(items, prior.effect, prior.damage, prior.heads, strict=True):
        assert effect == pytest.approx(scores.effect[units].sum())
        assert damage == pytest.approx(scores.damage[units].sum() - 0.25 * len(units))
        assert head == (units[0] < problem.space.n_heads)


def test_noise_is_not_believed_and_what_is_measured_without_noise_is() -> None:
    rng = np.random.default_rng(0)
    states = rng.random((80, ITEMS)) < 0.3
    truth = 1 - states @ np.linspace(0, 0.15, ITEMS)
    exact = survey_with(states, truth, np.zeros(80)).beliefs(prior_of())
    before = survey_of(problem_of(), []).before
    np.testing.assert_allclose(exact.bias, np.abs(truth) * before, atol=0.02 * before)

    survey = survey_with(states, np.zeros(80), np.zeros(80))
    start = survey.draw.unpruned.value
    noise = 0.4 * before
    survey.found = [
        Measured(
            state,
            Gaps(gap * start + noise * rng.standard_normal(start.shape), np.full(start.shape, noise**2)),
            Estimate(np.array(0.0), np.array(0.0)),
            1,
        )
        for state, gap in zip(states, truth, strict=True)
    ]
    believed = survey.beliefs(prior_of()).bias
    measured = np.array([np.sqrt((one.gaps.value**2).mean()) for one in survey.found])
    wanted = np.abs(truth) * before
    assert np.abs(believed - wanted).mean() < 0.6 * np.abs(measured - wanted).mean()


def test_states_near_the_best_at_any_price_count() -> None:
    states = np.eye(5, dtype=bool)
    limit = np.log1p(0.02)
    gaps, limits = np.array([0.05, 0.5, 1.0, 1.0, 0.0]), np.array([3, 0.3, 0, 4.5, 50])
    survey = survey_with(states, gaps, limits * limit)
    weights = survey.nearness(survey.learnt(prior_of(items=5), np.ones(5)))
    assert (weights[:3] > 0.9).all(), "the least biased, the cheapest, and one between"
    assert weights[3] < 0.2
    assert weights[4] < 0.01, "a model that is destroyed may well be without bias"


def test_luck_does_not_make_the_best_look_better_than_they_are() -> None:
    """All states are alike, so what is believed of those that look best should be what is true of all."""
    misses: dict[str, list[float]] = {"as believed": [], "as measured": []}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        states = rng.random((80, ITEMS)) < 0.3
        states[:, 0] = True  # the one item that does something, as attribution predicts
        survey = survey_with(states, np.zeros(80), np.zeros(80))
        before, start = survey.before, survey.draw.unpruned.value
        noise, prior = 0.4 * before, prior_of()
        prior.effect[0] = -0.5 * before
        survey.found = [
            Measured(
                state,
                Gaps(0.5 * start + noise * rng.standard_normal(start.shape), np.full(start.shape, noise**2)),
                Estimate(np.array(0.0), np.array(0.0)),
                1,
            )
            for state in states
        ]
        energies = np.array([one.gaps.disparity for one in survey.found]) / before
        weights = {"as believed": None, "as measured": 1 / (1 + ((energies - energies.min()) / NEAR) ** 2)}
        for name, one in weights.items():
            beliefs = survey.beliefs(prior) if one is None else survey.learnt(prior, one)
            misses[name].append(float(np.sort(beliefs.bias)[:8].mean()) / (0.5 * before) - 1)
    assert abs(np.mean(misses["as believed"])) < 0.06
    assert np.mean(misses["as measured"]) < -0.12


def test_damage_is_scaled_for_heads_and_neurons_apart() -> None:
    rng = np.random.default_rng(1)
    states = rng.random((60, ITEMS)) < 0.3
    heads = np.arange(ITEMS) < ITEMS // 2
    truth = 0.001 * np.where(heads, 0.5, 2.0)
    survey = survey_with(states, np.ones(60), states @ truth)
    believed = survey.beliefs(prior_of(damage=0.001))
    np.testing.assert_allclose(believed.increases.mean[:, 0], truth, rtol=0.05)


def finalists(points: list[tuple[float, float, int]], count: int) -> list[int]:
    bias, cost, units = (np.array(column) for column in zip(*points, strict=True))
    nothing: Any = None
    return Beliefs(nothing, nothing, nothing, bias, cost, units).finalists(count, 1.0, 0.02)


def test_finalists_are_of_the_front_and_half_of_them_within_the_limit() -> None:
    inside = [(0.9 - 0.1 * n, 0.002 + 0.002 * n, 5 + n) for n in range(6)]
    beyond = [(0.3 - 0.05 * n, 0.03 + 0.01 * n, 30 + n) for n in range(6)]
    dominated = [(0.95, 0.05, 50)]
    nothing = [(1.0, 0.0, 0)]
    found = finalists([*inside, *beyond, *dominated, *nothing], 6)
    assert len(found) == 6
    assert sum(one < 6 for one in found) >= 3
    assert not {12, 13} & set(found)
    assert found[0] == max(one for one in found if one < 6), "the least bias within the limit first"


def test_a_race_takes_winners_at_every_price_in_turn() -> None:
    problem = problem_of()
    survey = survey_of(problem, find_items(effects_of(problem), problem, SETTINGS))
    states = list(np.eye(len(survey.items), dtype=bool))
    kept = {state.tobytes() for state in survey.winners(states, len(PRICES))}
    draw = survey.draw.on(survey.race.first)
    best = set()
    for price in PRICES:
        energies = []
        for state in states:
            found = survey.race.first.evaluate(problem.mask(survey.units_of(state)), utility=True)
            assert found.nll is not None
            bias, increase = draw.read(found.table).disparity, draw.increase(found.nll).value
            energies.append(bias / survey.before + price * max(0.0, float(increase)) / survey.limit)
        best.add(states[int(np.argmin(energies))].tobytes())
    assert best <= kept
