"""A staggered draw, and what it says of all of fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import fit_of

from secateur.measures.disparity import Table
from secateur.scoring.attribution import disparity, pairs_of_groups
from secateur.search.draw import Draw, staggered
from secateur.units import Mask

GROUPS = np.repeat([0, 1], 40)
SCENARIOS = 10


SCALES = np.geomspace(0.3, 3, SCENARIOS)[:, None]  # scenarios differ in their spread


def population(seed: int, correlation: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Answers of an unpruned and of a pruned model, (scenarios, markers); markers differ alike in all scenarios."""
    rng = np.random.default_rng(seed)
    marker = rng.standard_normal(80) + 1.5 * (GROUPS == 0)
    before = marker + 0.5 * rng.standard_normal((SCENARIOS, 80))
    other = rng.standard_normal(80) + 0.5 * rng.standard_normal((SCENARIOS, 80))
    after = 0.6 * (correlation * before + np.sqrt(1 - correlation**2) * other) - 0.3 * (GROUPS == 0)
    return SCALES * before, SCALES * after


def draw_of(before: np.ndarray, seed: int, markers: int, turns: bool) -> Draw:
    """A draw of a population: other markers from scenario to scenario, or the same ones."""
    pairs = list(pairs_of_groups(Table(before, GROUPS)))
    spread = pairs[0][-1]
    asked, rng = np.zeros(before.shape, dtype=bool), np.random.default_rng(seed)
    for group in (0, 1):
        order = rng.permutation(np.flatnonzero(group == GROUPS))
        for row in range(len(asked)):
            asked[row, np.roll(order, -markers * row * turns)[:markers]] = True
    drawn = Table(np.where(asked, before, np.nan) / spread[:, None], GROUPS)
    gaps = np.array([gap for _, _, gap, _ in pairs]) / spread
    return Draw(None, drawn, gaps, spread, np.zeros(0), list(range(SCENARIOS)))  # type: ignore[arg-type]


def seen(draw: Draw, after: np.ndarray) -> Table:
    return Table(np.where(np.isnan(draw.before.y), np.nan, after), GROUPS)


def test_a_draw_of_everything_gives_the_gaps_themselves() -> None:
    before, after = population(0)
    draw = draw_of(before, 0, 40, turns=False)
    found = draw.read(seen(draw, after))
    gap = after[:, GROUPS == 0].mean(axis=1) - after[:, GROUPS == 1].mean(axis=1)

    def within(y: np.ndarray) -> float:
        y = y / draw.spread[:, None]
        return float(
            sum(((y[:, g == GROUPS] - y[:, g == GROUPS].mean(axis=1, keepdims=True)) ** 2).sum() for g in (0, 1))
        )

    scale = draw.spread * np.sqrt(within(after) / within(before))
    np.testing.assert_allclose(found.value[0], gap / scale)
    assert found.disparity == pytest.approx(disparity(Table(after, GROUPS)), rel=0.1)


def test_few_staggered_markers_tell_more_than_the_same_few_in_all_scenarios() -> None:
    errors: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(60):
        before, after = population(seed)
        truth = disparity(Table(after, GROUPS))
        for turns in errors:
            draw = draw_of(before, seed, 4, turns)
            errors[turns].append(draw.read(seen(draw, after)).disparity - truth)
    spread = {turns: float(np.sqrt(np.mean(np.square(found)))) for turns, found in errors.items()}
    assert spread[True] < 0.8 * spread[False]
    assert abs(np.mean(errors[True])) < 0.1
    plain = []
    for seed in range(60):
        before, after = population(seed)
        some = seen(draw_of(before, seed, 4, False), after).y
        some = some[:, ~np.isnan(some).any(axis=0)]
        plain.append(disparity(Table(some, np.repeat([0, 1], 4))) - disparity(Table(after, GROUPS)))
    assert spread[True] < 0.5 * float(np.sqrt(np.mean(np.square(plain)))), "what D of eight markers alone would say"


def test_the_variance_is_that_of_the_estimate() -> None:
    before, after = population(1)
    everything = draw_of(before, 0, 40, False)
    truth = everything.read(seen(everything, after)).value
    misses, told = [], []
    for seed in range(300):
        draw = draw_of(before, seed, 4, True)
        found = draw.read(seen(draw, after))
        misses.append((found.value - truth) ** 2)
        told.append(found.variance)
    assert np.mean(misses) == pytest.approx(np.mean(told), rel=0.2)
    assert not everything.read(seen(everything, after)).variance.any(), "nothing is left to chance"


def test_answers_that_only_shrink_keep_their_disparity() -> None:
    before, _ = population(2)
    draw = draw_of(before, 0, 4, True)
    assert draw.read(seen(draw, 0.3 * before)).disparity == pytest.approx(draw.unpruned.disparity)


def test_no_difference_is_no_disparity_on_average() -> None:
    squares = []
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        before, _ = population(seed)
        after = SCALES * (rng.standard_normal(80) + 0.5 * rng.standard_normal((SCENARIOS, 80)))
        after -= np.where(GROUPS == 0, after[:, GROUPS == 0].mean(axis=1, keepdims=True), 0)
        after -= np.where(GROUPS == 1, after[:, GROUPS == 1].mean(axis=1, keepdims=True), 0)
        draw = draw_of(before, seed, 4, True)
        found = draw.read(seen(draw, after))
        squares.append(float(np.mean(found.value**2 - found.variance)))
    assert abs(np.mean(squares)) < 3 * np.std(squares) / 10


@given(st.integers(1, 4), st.integers(0, 50))
def test_every_scenario_asks_equally_many_of_each_group(markers: int, seed: int) -> None:
    fit = fit_of()
    drawn = staggered(fit.prompts, markers, seed)
    assert staggered(fit.prompts, markers, seed).prompts == drawn.prompts
    group_of = dict(zip(fit.prompts.markers, fit.prompts.groups.tolist(), strict=True))
    for group in np.unique(fit.prompts.groups):
        count = min(markers, int((fit.prompts.groups == group).sum()))
        by_scenario = [
            {one.marker for one in drawn.prompts if one.scenario == s and group_of[one.marker] == group}
            for s in fit.prompts.scenarios
        ]
        assert all(len(some) == count for some in by_scenario)
        turns = min(int((fit.prompts.groups == group).sum()), count * len(by_scenario))
        assert len(set.union(*by_scenario)) == turns


def test_a_draw_reads_masks_of_a_model() -> None:
    fit = fit_of()
    draw = Draw.staggered(fit, 99, 1, 0)  # all markers
    mask = Mask.removing(fit.model, [0, 20, 40])
    found = draw.read(draw.part.evaluate(mask).table)
    table = fit.evaluate(mask).table
    for number, (_, _, gap, _) in enumerate(pairs_of_groups(table)):
        ratio = gap / (found.value[number] * draw.spread)  # one for all scenarios
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    unpruned = draw.read(draw.part.evaluate().table)
    np.testing.assert_allclose(unpruned.value, draw.unpruned.value, rtol=1e-3)
    half = draw.on(draw.part.on(draw.part.prompts.of_scenarios(draw.scenarios[:1]), None))
    assert half.gaps.shape[1] == len(half.spread) == len(half.before.y) == 1


def test_the_next_draw_asks_other_markers_and_reads_other_windows() -> None:
    fit = fit_of()
    assert fit.text is not None
    draws = [Draw.staggered(fit, 2, 1, 0, turn) for turn in range(3)]
    asked = [frozenset((one.scenario, one.marker) for one in draw.part.prompts.prompts) for draw in draws]
    assert len(set(asked)) > 1
    read = [draw.part.text.windows[0].tokens.tolist() for draw in draws if draw.part.text is not None]
    expected = [fit.text.windows[turn % len(fit.text.windows)].tokens.tolist() for turn in range(3)]
    assert read == expected
    again = Draw.staggered(fit, 2, 1, 0, 1)
    assert again.part.part == draws[1].part.part


def test_the_increase_is_that_of_log_perplexity_on_the_windows_of_the_draw() -> None:
    fit = fit_of()
    draw = Draw.staggered(fit, 2, 2, 0, 1)
    mask = Mask.removing(fit.model, [0, 20, 40])
    found = draw.part.evaluate(mask, utility=True)
    assert found.nll is not None
    expected = np.log(draw.part.perplexity(mask)) - np.log(draw.part.perplexity())
    assert float(draw.increase(found.nll).value) == pytest.approx(expected, abs=1e-5)
    assert draw.part.text is not None
    rates = (found.nll - draw.nll) / draw.part.text.scored
    assert len(rates) == 2
    assert float(draw.increase(found.nll).variance) == pytest.approx(rates.var(ddof=1) / 2)
    assert draw.increase(found.nll).variance > 0
    assert draw.increase(draw.nll).value == 0
