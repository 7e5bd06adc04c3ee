"""Annealing over items: what moves, the energy, the front, and the search on a known function and on a tiny model."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import fit_of

from secateur.errors import NumericalError
from secateur.evaluation import Evaluator
from secateur.evaluation.racing import Race
from secateur.scoring.attribution import Attribution, Effects, disparity
from secateur.scoring.base import notes_of
from secateur.scoring.linear_outcome import joined
from secateur.search.annealing import Annealing, CautiousEnergy, Surveyed, find_items, first_states, with_flips
from secateur.search.base import Outcome, Problem
from secateur.search.chains import draw_states
from secateur.search.draw import Estimate, Gaps
from secateur.search.survey import Measured, Survey
from secateur.units import Mask, UnitSpace

SMALL = Annealing(evaluations=24, rounds=2, heads=4, neurons=30, block=8, chains=16, steps=40, markers=2, windows=1)


def problem_of() -> Problem:
    fit = fit_of()
    return Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None))


def survey_of(problem: Problem, items: list[np.ndarray]) -> Survey:
    return Survey(problem, items, SMALL.markers, SMALL.windows, SMALL.seed)


def effects_of(problem: Problem, seed: int = 0) -> Effects:
    draw = np.random.default_rng(seed)
    units = len(problem.space)
    return Effects(-draw.random(units), np.zeros(units), 0.1 + draw.random(units), np.ones(units))


def test_items_are_heads_and_growing_blocks_in_the_order_of_attribution() -> None:
    problem = problem_of()
    scores = effects_of(problem)
    items = find_items(scores, problem, SMALL)
    heads = [units for units in items if units[0] < problem.space.n_heads]
    blocks = [units for units in items if units[0] >= problem.space.n_heads]
    assert [len(units) for units in heads] == [1] * 4
    assert sorted(map(len, blocks)) == [1, 2, 4, 7, 8, 8]
    everything = np.concatenate(items)
    assert len(set(everything)) == len(everything)
    means = [scores.rank[units].mean() for units in items]
    assert means == sorted(means, reverse=True)
    best = np.argsort(-scores.rank[: problem.space.n_heads])[:4]
    assert sorted(int(units[0]) for units in heads) == sorted(best.tolist())


@given(st.integers(1, 30), st.integers(4, 60), st.integers(0, 20))
def test_first_states_are_as_many_as_asked_and_begin_with_the_first_item(items: int, count: int, seed: int) -> None:
    states = first_states(items, count, np.random.default_rng(seed))
    assert len(states) == count
    assert np.flatnonzero(states[0]).tolist() == [0]
    assert all(state.shape == (items,) for state in states)


@given(st.integers(4, 60), st.integers(1, 30), st.integers(0, 20))
def test_first_states_stay_near_the_beginnings_that_the_model_bears(count: int, reach: int, seed: int) -> None:
    states = first_states(100, count, np.random.default_rng(seed), reach)
    assert not np.any([state[2 * reach + 8 :] for state in states])


def test_flips_are_all_neighbours() -> None:
    states = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()
    found = {tuple(state.tolist()) for state in with_flips(states).int()}
    assert found == {(0, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)}


@given(st.integers(0, 500))
def test_a_cautious_energy_is_mean_plus_disagreement_and_prices_increases_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    gaps, increases = [draw.standard_normal((2, 13, width)) for width in (4, 1)]  # items and, last, offsets; 2 members
    sizes = draw.random((12, 1))
    ensemble = joined(
        [gaps[0, :12], increases[0, :12], gaps[1, :12], increases[1, :12], sizes],
        [gaps[0, 12], increases[0, 12], gaps[1, 12], increases[1, 12], np.zeros(1)],
    )
    states = draw_states(12, (0, 12), 5, torch.Generator().manual_seed(seed))
    prices, alone = np.array([0.1, 2.0, 1.0, 1.0, 3.0]), np.array([-1, -1, 0, 1, 1])
    energy = CautiousEnergy(
        ensemble, 2, 1.5, 0.02, torch.from_numpy(prices).float(), torch.from_numpy(alone), caution=0.5
    )
    x = np.column_stack([states.double().numpy(), np.ones(5)])
    each = np.stack(
        [
            np.sqrt(((x @ gap) ** 2).mean(axis=1)) / 1.5 + prices * np.maximum(0, (x @ increase)[:, 0]) / 0.02
            for gap, increase in zip(gaps, increases, strict=True)
        ]
    )
    cautious = each.mean(axis=0) + 0.5 * each.std(axis=0)
    expected = np.where(alone < 0, cautious, each[np.maximum(alone, 0), np.arange(5)]) + (x[:, :12] @ sizes)[:, 0]
    np.testing.assert_allclose(energy.of(states).numpy(), expected, rtol=1e-3, atol=1e-3)
    unit, sign = torch.zeros(5, dtype=torch.long), 1.0 - 2.0 * states[:, 0].float()
    flipped = states.clone()
    flipped[:, 0] ^= True
    after = energy.read(energy.flipped(energy.hidden(states), unit, sign))
    torch.testing.assert_close(after, energy.of(flipped), rtol=1e-3, atol=1e-3)
    for number, price in enumerate(prices):
        if alone[number] < 0:
            mine = energy.cautiously(states[number : number + 1], float(price))
            torch.testing.assert_close(mine[0], energy.of(states)[number], rtol=1e-3, atol=1e-3)


def propose(search: Annealing, problem: Problem, scorer: Any, most: float = np.inf) -> list[Any]:
    """What is proposed where masks of up to so many units keep to the limit."""
    proposals, found = search.proposals(problem, scorer), []
    with suppress(StopIteration):
        selection = next(proposals)
        while True:
            found.append(selection)
            selection = proposals.send(Outcome(0.1, 0.0, len(selection.removed) <= most))
    return found


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_where_no_finalist_keeps_to_the_limit_the_front_is_halved_towards_fewer_units(most: int) -> None:
    problem = problem_of()
    finalists = propose(SMALL, problem, Attribution())
    assert isinstance(problem.scores, Surveyed)
    units = problem.scores.believed.units[problem.scores.believed.front]
    fewest = min(len(one.removed) for one in finalists)
    smaller = np.sort(units[units < fewest])
    more = propose(SMALL, problem_of(), Attribution(), most)[len(finalists) :]
    if fewest <= most:
        assert not more
        return
    counts = [len(one.removed) for one in more]
    assert len(counts) <= 1 + np.log2(1 + len(smaller))
    kept = [count for count in counts if count <= most]
    assert max(kept, default=0) == max(smaller[smaller <= most], default=0)


def test_the_search_measures_what_it_may_and_proposes_its_front() -> None:
    problem = problem_of()
    found = propose(SMALL, problem, Attribution())
    assert 1 <= len(found) <= SMALL.finalists
    sets = [tuple(selection.removed.tolist()) for selection in found]
    assert len(set(sets)) == len(sets)
    again = propose(SMALL, problem_of(), Attribution())
    assert [tuple(selection.removed.tolist()) for selection in again] == sets
    before = disparity(problem.fit.evaluate().table)
    for selection in found:
        table = problem.fit.evaluate(Mask.removing(problem.model, selection.removed)).table
        assert selection.knobs["fit_bias"] == pytest.approx(disparity(table), abs=0.5 * before)
        assert selection.knobs["fit_units"] == len(selection.removed)


def test_what_is_believed_of_a_proposal_is_its_disparity_where_a_draw_is_all_of_fit() -> None:
    problem = problem_of()
    found = propose(SMALL.model_copy(update={"markers": 99, "windows": 99}), problem, Attribution())
    assert found
    for selection in found:
        mask = Mask.removing(problem.model, selection.removed)
        assert selection.knobs["fit_bias"] == pytest.approx(disparity(problem.fit.evaluate(mask).table), rel=0.15)
        increase = np.log(problem.fit.perplexity(mask) / problem.fit.perplexity())
        assert selection.knobs["fit_cost"] == pytest.approx(max(0.0, increase), abs=0.02)


def test_the_front_is_kept() -> None:
    problem = problem_of()
    found = propose(SMALL, problem, Attribution())
    (note,) = notes_of(problem.scores)
    assert "with 0" not in note
    for selection in found:
        figures = selection.knobs
        assert f"{figures['fit_bias']:.2f} at {np.expm1(figures['fit_cost']):+.1%} with {figures['fit_units']}" in note


@pytest.mark.parametrize("race", [1, 3])
def test_the_search_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch, race: int) -> None:
    asked: list[bytes] = []
    measure = Survey.measure

    def noted(self: Survey, states: list[np.ndarray], advance: Any) -> None:
        asked.extend({state.tobytes() for state in states} - self.asked)
        measure(self, states, advance)

    monkeypatch.setattr(Survey, "measure", noted)
    problem = problem_of()
    survey = survey_of(problem, [])
    propose(SMALL.model_copy(update={"race": race}), problem, Attribution())
    assert len(asked) == len(set(asked)) <= 24
    assert len(asked) > 24 // 4, "rounds measure masks, too"
    if race > 1:  # looks at the slice are paid for
        assert len(asked) <= 6 + 18 / (1 + race * survey.race.share)


def test_a_race_lets_the_best_of_a_fixed_slice_go_on() -> None:
    fit = fit_of()
    race, again = Race.on(fit, seed=3), Race.on(fit, seed=3)
    assert race.first.part == again.first.part != fit.part
    assert set(race.first.prompts.prompts) < set(fit.prompts.prompts)
    assert 0 < race.share < 1
    rng = np.random.default_rng(0)
    units = len(UnitSpace.of(fit.model))
    masks = [Mask.removing(fit.model, rng.choice(units, size=4, replace=False)) for _ in range(6)]
    energies = [disparity(race.first.evaluate(mask).table) for mask in masks]
    winners = race.winners(masks, 2, lambda found: [disparity(found.table)])
    assert winners == sorted(np.argsort(energies)[:2].tolist())


def test_a_race_is_on_another_slice_from_turn_to_turn_and_keeps_states_between_masks() -> None:
    problem = problem_of()
    problem.fit.walk_bytes = 1 << 20
    survey = survey_of(problem, [])
    scenarios = set()
    for turn in range(8):
        survey.turn(turn)
        scenarios.add(tuple(survey.race.first.prompts.scenarios))
        assert survey.race.first.keep_bytes == 1 << 20
    assert len(scenarios) > 1


@pytest.mark.parametrize("race", [1, 3])
def test_the_bar_counts_what_is_paid_for(race: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, done, surveys = problem_of(), list[int](), list[Survey]()
    problem.step = lambda name, total: nullcontext(done.append if total == SMALL.evaluations else lambda _: None)
    turn = Survey.turn
    monkeypatch.setattr(Survey, "turn", lambda self, number: (surveys.append(self), turn(self, number))[1])
    propose(SMALL.model_copy(update={"race": race}), problem, Attribution())
    measured = len(surveys[0].found)
    assert sum(done) == measured if race == 1 else measured < sum(done) <= SMALL.evaluations


def test_a_mask_without_finite_answers_loses_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race.on(fit_of())
    masks = [Mask.removing(race.first.model, [unit]) for unit in range(3)]
    real = Evaluator.evaluate

    def evaluate(self: Evaluator, mask: Any = None, *rest: Any, **named: Any) -> Any:
        if mask is masks[0]:
            raise NumericalError("not finite")
        return real(self, mask, *rest, **named)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    assert race.winners(masks, 2, lambda _: [0.0]) == [1, 2]


def test_a_race_that_no_mask_finishes_lets_the_first_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race.on(fit_of())
    masks = [Mask.removing(race.first.model, [unit]) for unit in range(3)]

    def evaluate(*_: Any, **__: Any) -> Any:
        raise NumericalError("not finite")

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    assert race.winners(masks, 2, lambda _: [0.0, 1.0]) == [0, 1]


class Elsewhere:
    """In place of actors: measures here, and notes how far the search has been told to be after each mask."""

    def __init__(self, here: Evaluator, told: list[int]) -> None:
        self.here, self.told, self.seen = here, told, list[int]()

    def measure(self, _: Evaluator, masks: Any, utility: bool) -> Any:
        for mask in masks:
            self.seen.append(sum(self.told))
            self.here.evaluate(mask, utility=utility)
            yield mask, self.here.figures(mask)


def test_the_search_is_told_of_every_mask_that_actors_measure() -> None:
    problem, told = problem_of(), list[int]()
    items = find_items(effects_of(problem), problem, SMALL)
    survey = survey_of(problem, items)
    part = survey.draw.part
    pool = Elsewhere(part.on(part.prompts, part.text), told)
    part.cluster = pool
    states = first_states(len(items), 6, np.random.default_rng(0))
    survey.measure(states, told.append)
    assert sum(told) == part.work(utility=True) * len({state.tobytes() for state in states})
    assert pool.seen[-1] > pool.seen[0]


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_the_search_finds_the_best_of_a_known_function(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """Bias falls with the wanted items, by less the more there are, and rises with the others; every item costs a
    little. With noise, the best by measurement is one that was lucky."""
    problem = problem_of()
    scores = effects_of(problem)
    wanted, luck = np.random.default_rng(5).random(10) < 0.5, np.random.default_rng(6)

    def bias_of(state: np.ndarray) -> float:
        good, bad = float((state & wanted).sum()), float((state & ~wanted).sum())
        return 1 + 0.3 * bad - 0.15 * good + 0.01 * good**2

    def measure(self: Survey, states: list[np.ndarray], advance: Any) -> None:
        for state in states:
            if state.tobytes() not in self.asked:
                self.asked.add(state.tobytes())
                self.spent += 1
                shape = self.draw.gaps.shape
                gaps = Gaps(
                    bias_of(state) * self.draw.unpruned.value + noise * luck.standard_normal(shape),
                    np.full(shape, noise**2),
                )
                increase = Estimate(np.array(1e-4 * float(state.sum())), np.array(0.0))
                self.found.append(Measured(state, gaps, increase, int(state.sum())))

    monkeypatch.setattr(Survey, "measure", measure)
    monkeypatch.setattr(Attribution, "score", lambda *_, **__: scores)
    search = SMALL.model_copy(update={"evaluations": 120, "rounds": 6, "steps": 200, "chains": 64})
    items = find_items(scores, problem, search)
    assert len(items) == 10
    chosen = set(propose(search, problem, Attribution())[0].removed.tolist())
    best = [set(items[i].tolist()) for i in np.flatnonzero(wanted)]
    others = [set(items[i].tolist()) for i in np.flatnonzero(~wanted)]
    assert not any(units & chosen for units in others)
    assert sum(units <= chosen for units in best) >= len(best) - (noise > 0)


def test_a_model_without_promising_units_gets_no_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of()
    units = len(UnitSpace.of(problem.model))
    nothing = Effects(np.ones(units), np.zeros(units), np.ones(units), np.ones(units))
    monkeypatch.setattr(Attribution, "score", lambda *_, **__: nothing)
    assert propose(SMALL, problem, Attribution()) == []


def test_states_that_lose_a_race_are_paid_for_and_not_proposed_again() -> None:
    problem = problem_of()
    survey = survey_of(problem, find_items(effects_of(problem), problem, SMALL))
    states = list(np.eye(len(survey.items), dtype=bool)[:5])
    kept = survey.winners(states, 2)
    assert [state.tobytes() for state in kept] == [one.tobytes() for one in states if one.tobytes() not in survey.asked]
    assert len(kept) == 2
    assert survey.spent == pytest.approx(5 * survey.race.share)
    assert survey.winners(kept, 2) == kept, "no race where all may go on"
    assert survey.spent == pytest.approx(5 * survey.race.share)


def test_a_race_that_costs_more_than_there_is_measures_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, measured_at = problem_of(), []
    measure = Survey.measure

    def noted(self: Survey, states: list[np.ndarray], advance: Any) -> None:
        measure(self, states, advance)
        measured_at.append(self.spent)

    monkeypatch.setattr(Survey, "measure", noted)
    propose(SMALL.model_copy(update={"race": 1000}), problem, Attribution())
    assert len(measured_at) == 1
    assert measured_at[0] <= 6
