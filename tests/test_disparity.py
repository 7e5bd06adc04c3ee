"""Disparities against plain loops; nulls, intervals and comparisons against planted truths."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, stdev, variance

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.measures.disparity import (
    SPREAD_FLOOR,
    Interval,
    Table,
    bootstrap_squares,
    by_draw,
    compare,
    compare_squares,
    corrected_choice,
    corrected_square,
    fall_if_closed,
    gaps_closed,
    group_means,
    holm,
    interval_of_bias,
    largest_pairs,
    largest_reduction,
    null,
    p_value,
    permutation_p_values,
    reduction,
    reduction_interval,
    resamples_by_name,
    scenario_intervals,
    statistics,
    suite_bias,
    suite_p_value,
)

SCENARIOS = 12
MARKERS = 16  # per group


def simulate(seed: int, effect: float = 0.0, n_groups: int = 2, markers: int = MARKERS) -> Table:
    """Unit noise, half of it shared by a marker's scenarios; the first group stands ``effect`` higher."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), markers)
    shared = rng.normal(size=len(groups))
    noise = (shared + rng.normal(size=(SCENARIOS, len(groups)))) / math.sqrt(2)
    return Table(noise + effect * (groups == 0), groups)


def shuffled_table(seed: int, n_groups: int) -> Table:
    """Groups of different sizes in any order, means and spreads that differ by scenario."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n_groups), np.arange(3, 3 + n_groups)))
    scale, shift = rng.uniform(0.5, 5, size=(6, 1)), rng.normal(0, 50, size=(6, 1))
    return Table(shift + scale * (rng.normal(size=(6, len(groups))) + 0.7 * groups), groups)


def by_group(table: Table, scenario: int) -> list[list[float]]:
    values: list[list[float]] = [[] for _ in range(table.n_groups)]
    for y, group in zip(table.y[scenario], table.groups, strict=True):
        values[group].append(float(y))
    return values


def smd_of(one: list[float], other: list[float]) -> float:
    return (fmean(one) - fmean(other)) / math.sqrt((stdev(one) ** 2 + stdev(other) ** 2) / 2)


@pytest.mark.parametrize("n_groups", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_statistics_equal_plain_loops(n_groups: int, seed: int) -> None:
    table = shuffled_table(seed, n_groups)
    result, means = statistics(table), group_means(table)
    for scenario in range(len(table.y)):
        groups = by_group(table, scenario)
        pair = max(combinations(range(n_groups), 2), key=lambda p: abs(smd_of(groups[p[0]], groups[p[1]])))
        one, other = groups[pair[0]], groups[pair[1]]
        centre = fmean(fmean(group) for group in groups)
        assert largest_pairs(table)[scenario] == pair
        assert result["smd"][scenario] == pytest.approx(smd_of(one, other))
        assert result["gap"][scenario] == pytest.approx(fmean(one) - fmean(other))
        assert result["deviation"][scenario] == pytest.approx(sum(abs(fmean(group) - centre) for group in groups))
        assert means[scenario] == pytest.approx([fmean(group) for group in groups])


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_smd_keeps_its_value_under_scaling_and_the_gap_scales(seed: int, scale: float, shift: float) -> None:
    table = shuffled_table(seed, 3)
    before, after = statistics(table), statistics(Table(scale * table.y + shift, table.groups))
    np.testing.assert_allclose(after["smd"], before["smd"], rtol=1e-6)
    np.testing.assert_allclose(after["gap"], scale * before["gap"], rtol=1e-6)
    np.testing.assert_allclose(after["deviation"], scale * before["deviation"], rtol=1e-6)


def test_sign_is_first_group_minus_second() -> None:
    result = statistics(Table(np.array([[2.0, 3.0, 0.0, 1.0], [0.0, 1.0, 2.0, 3.0]]), np.array([0, 0, 1, 1])))
    np.testing.assert_allclose(result["gap"], [2, -2])
    np.testing.assert_allclose(result["smd"], [2 / math.sqrt(0.5), -2 / math.sqrt(0.5)])


def test_constant_answers_have_no_disparity() -> None:
    table = Table(np.full((2, 8), 3.0), np.repeat([0, 1], 4))
    for values in statistics(table).values():
        np.testing.assert_array_equal(values, 0)
    assert suite_bias(table).corrected == 0
    assert interval_of_bias(table) == Interval(0, 0, 0)


@pytest.mark.parametrize("markers", [8, 16, 32])
def test_null_is_the_known_noise_floor(markers: int) -> None:
    floor = fmean(np.abs(null(simulate(seed, markers=markers), seed)["smd"]).mean() for seed in range(8))
    assert floor == pytest.approx(0.8 * math.sqrt(2 / markers), rel=0.1)


def test_null_shuffles_all_scenarios_alike() -> None:
    table = simulate(0, effect=1)
    twice = Table(np.vstack([table.y[:1], 2 * table.y[:1]]), table.groups)
    shuffled = null(twice)["smd"]
    np.testing.assert_allclose(shuffled[:, 0], shuffled[:, 1], rtol=1e-9)
    assert len(np.unique(shuffled[:, 0].round(9))) > 300


def test_null_is_about_the_same_with_and_without_an_effect() -> None:
    without, planted = (suite_bias(simulate(0, effect)).null_abs_smd for effect in (0.0, 2.0))
    assert planted == pytest.approx(without, rel=0.1)


def test_suite_figures_are_means_over_scenarios() -> None:
    table = shuffled_table(1, 3)
    bias, observed, shuffled = suite_bias(table, 5), statistics(table), null(table, 5)
    assert bias.mean_abs_smd == pytest.approx(fmean(abs(v) for v in observed["smd"]))
    assert bias.mean_abs_gap == pytest.approx(fmean(abs(v) for v in observed["gap"]))
    assert bias.deviation == pytest.approx(fmean(observed["deviation"]))
    assert bias.null_abs_smd == pytest.approx(fmean(abs(v) for v in shuffled["smd"].flatten()))
    square = fmean(v**2 for v in observed["smd"]) - fmean(v**2 for v in shuffled["smd"].flatten())
    assert square > 0
    assert corrected_square(table, 5) == pytest.approx(square)
    assert bias.corrected == pytest.approx(math.sqrt(square))


@given(seed=st.integers(0, 10_000), n_groups=st.integers(2, 4))
def test_square_is_the_mean_over_pairs_with_one_spread(seed: int, n_groups: int) -> None:
    table = shuffled_table(seed, n_groups)
    for row, found in zip(table.y, statistics(table)["square"], strict=True):
        of_group = [row[table.groups == group] for group in range(n_groups)]
        floor = (SPREAD_FLOOR * stdev(row.tolist())) ** 2
        within = fmean(max(floor, variance(values.tolist())) for values in of_group)
        pairs = [(a.mean() - b.mean()) ** 2 / within for a, b in combinations(of_group, 2)]
        assert found == pytest.approx(fmean(pairs))


def test_two_groups_are_chosen_by_their_bias() -> None:
    table = simulate(3, 0.8)
    assert corrected_choice(table, 1) == pytest.approx(corrected_square(table, 1))


def test_with_many_groups_the_choice_tells_a_fall_apart_better_than_the_bias_does() -> None:
    falls: dict[str, list[float]] = {"choice": [], "bias": []}
    for seed in range(60):
        before, after = (simulate(seed, effect, n_groups=6, markers=4) for effect in (1.5, 1.0))
        falls["choice"].append(corrected_choice(before, seed) - corrected_choice(after, seed))
        falls["bias"].append(corrected_square(before, seed) - corrected_square(after, seed))
    signal = {name: np.mean(values) / np.std(values) for name, values in falls.items()}
    assert signal["choice"] > 1.2 * signal["bias"]


def test_corrected_square_is_zero_on_noise_on_average() -> None:
    raw = [float((statistics(simulate(seed))["smd"] ** 2).mean()) for seed in range(60)]
    corrected = [corrected_square(simulate(seed), seed) for seed in range(60)]
    assert fmean(raw) == pytest.approx(2 / MARKERS, rel=0.35)
    assert abs(fmean(corrected)) < 0.25 * fmean(raw)
    assert min(corrected) < 0 < max(corrected)


@pytest.mark.parametrize("effect", [0.6, 1.2])
def test_corrected_bias_is_close_to_the_planted_effect(effect: float) -> None:
    squares = [corrected_square(simulate(seed, effect, markers=32), seed) for seed in range(200)]
    assert math.sqrt(fmean(squares)) == pytest.approx(effect, rel=0.1)


def test_interval_of_bias_covers_the_planted_truth() -> None:
    effect, tables = 0.8, 60
    intervals = [interval_of_bias(simulate(seed, effect, markers=32), seed) for seed in range(tables)]
    assert sum(i.low <= effect <= i.high for i in intervals) >= 0.85 * tables
    # Wide enough to cover, but not by saying nothing.
    assert sum(i.low > 0 for i in intervals) > 0.5 * tables
    assert fmean(i.high - i.low for i in intervals) < 1.5 * effect
    assert all(i.low <= i.value <= i.high for i in intervals)


def test_interval_narrows_with_more_markers() -> None:
    few, many = (interval_of_bias(simulate(0, 0.8, markers=n)) for n in (8, 64))
    assert many.high - many.low < 0.6 * (few.high - few.low)


def test_scenario_intervals_cover_the_planted_truth() -> None:
    covered = []
    for seed in range(30):
        low, high = scenario_intervals(simulate(seed, 0.8), seed)["smd"]
        covered.append(((low <= 0.8) & (high >= 0.8)).mean())
    assert 0.85 <= fmean(covered) < 1


def test_scenario_intervals_belong_to_the_largest_pair() -> None:
    table = shuffled_table(0, 4)
    observed, intervals = statistics(table), scenario_intervals(table)
    for name in ("smd", "gap"):
        low, high = intervals[name]
        assert ((low <= observed[name]) & (observed[name] <= high)).all()


def test_reduction_is_one_where_the_effect_vanishes() -> None:
    before = simulate(0, effect=2, markers=32)
    after = Table(before.y - 2 * (before.groups == 0), before.groups)
    figures = compare(before, after)
    assert figures.reduction.value > 0.8
    assert figures.reduction.high == 1
    assert figures.reduction.low > 0
    assert figures.change.high < 0
    # An effect of exactly nothing, beyond any noise.
    assert compare(before, Table(np.zeros_like(before.y), before.groups)).reduction == Interval(1, 1, 1)


def test_reduction_is_about_zero_where_nothing_but_noise_changes() -> None:
    before = simulate(0, effect=1.5)
    noise = np.random.default_rng(1).normal(0, 0.05, size=before.y.shape)
    figures = compare(before, Table(before.y + noise, before.groups))
    assert abs(figures.reduction.value) < 0.1
    assert figures.reduction.low < 0 < figures.reduction.high


def test_reduction_is_negative_where_the_bias_grows() -> None:
    figures = compare(simulate(0, effect=0.7, markers=32), simulate(0, effect=2.5, markers=32))
    assert figures.reduction.value < -1
    assert figures.change.low > 0


def test_comparison_is_paired() -> None:
    before = simulate(0, effect=1)
    same = compare(before, before)
    assert same.reduction == Interval(0, 0, 0)
    assert same.change == Interval(0, 0, 0)
    assert same.before == same.after == interval_of_bias(before)
    assert same.before.high - same.before.low > 0.1
    halved = compare(before, Table(before.y - 0.5 * (before.groups == 0), before.groups))
    unpaired = halved.before.high - halved.before.low + halved.after.high - halved.after.low
    assert halved.change.high - halved.change.low < 0.5 * unpaired


def test_comparison_carries_the_corrected_figures() -> None:
    before, after = simulate(0, effect=1), simulate(1, effect=0.4)
    figures = compare(before, after, seed=3)
    assert figures.before.value == pytest.approx(suite_bias(before, 3).corrected)
    assert figures.after.value == pytest.approx(suite_bias(after, 3).corrected)
    assert figures.change.value == pytest.approx(figures.after.value - figures.before.value)
    assert figures.reduction.value == pytest.approx(1 - figures.after.value / figures.before.value)


def of_squares(before: float, after: float, seed: int, spread: float) -> np.ndarray:
    """Replicates of B^2 before and after with errors in common, (2, replicates)."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(0, spread, 1000), rng.normal(0, spread / 5, 1000)
    return np.stack([before + shared, after + shared + own])


@given(before=st.floats(0.05, 3), after=st.floats(-0.1, 3), seed=st.integers(0, 1000), spread=st.floats(0.01, 1))
def test_a_reduction_is_above_zero_where_the_fall_is(before: float, after: float, seed: int, spread: float) -> None:
    found = compare_squares(np.array([before, after]), of_squares(before, after, seed, spread))
    assert found.reduction.low <= found.reduction.value <= found.reduction.high <= 1
    assert found.fall.value == pytest.approx(before - after)
    if found.reduction.value > 0:
        assert (found.reduction.low > 0) == (found.fall.low > 0)
    if found.reduction.value < 0:
        assert (found.reduction.high < 0) == (found.fall.high < 0)


def test_a_fall_can_be_shown_where_the_bias_before_is_hardly_known() -> None:
    replicates = of_squares(1.0, 0.3, 0, spread=0.8)
    assert (replicates[0] < 0).mean() > 0.05, "in many resamples there is no bias before"
    assert compare_squares(np.array([1.0, 0.3]), replicates).reduction.low > 0


def test_the_interval_of_a_reduction_is_that_of_the_ratio_where_the_bias_is_well_known() -> None:
    replicates = of_squares(4.0, 1.0, 0, spread=0.2)
    found = reduction_interval(0.5, replicates)
    low, high = np.percentile(1 - np.sqrt(replicates[1] / replicates[0]), [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_a_fall_is_hardly_ever_shown_where_nothing_changes_but_noise() -> None:
    shown = 0
    for seed in range(40):
        before = simulate(seed, effect=0.7)
        rng = np.random.default_rng(1000 + seed)
        after = Table(0.9 * before.y + math.sqrt(0.19) * rng.normal(size=before.y.shape), before.groups)
        after.y[:] += 0.1 * 0.7 * (before.groups == 0)
        shown += compare(before, after, seed).fall.low > 0
    assert shown <= 1, "2.5 % of 40"


def test_the_largest_reduction_goes_draw_by_draw() -> None:
    """Of two suites with B^2 of 4 and 0 under the second mask: 2 on average, of 5 before."""
    suites = [np.array([8.0, 8.0, 4.0, 0.0]), np.array([2.0, 0.0, 0.0])]
    np.testing.assert_allclose(by_draw(suites), [5, 4, 2])
    assert largest_reduction(by_draw(suites)) == pytest.approx(1 - math.sqrt(2 / 5))
    assert largest_reduction(np.array([5.0])) is None


def test_closed_gaps_leave_spreads_as_they_are() -> None:
    table = shuffled_table(0, 3)
    closed = gaps_closed(table)
    np.testing.assert_allclose(statistics(closed)["smd"], 0, atol=1e-9)
    for scenario in range(len(table.y)):
        for one, other in zip(by_group(table, scenario), by_group(closed, scenario), strict=True):
            assert stdev(one) == pytest.approx(stdev(other))


@pytest.mark.parametrize(("effect", "markers", "provable"), [(1.5, 32, True), (0.3, 4, False)])
def test_whether_a_test_part_could_prove_any_repair(effect: float, markers: int, provable: bool) -> None:
    assert (fall_if_closed(simulate(0, effect, markers=markers)).low > 0) == provable


def test_a_p_value_goes_by_the_side_towards_no_difference() -> None:
    assert p_value(Interval(1.0, 0.0, 9.0)) == pytest.approx(p_value(Interval(-1.0, -9.0, 0.0))) == pytest.approx(0.05)
    assert p_value(Interval(1.0, 0.2, 9.0)) < 0.05 < p_value(Interval(1.0, -0.2, 1.1))
    assert p_value(Interval(0.0, -1.0, 1.0)) == 1
    assert p_value(Interval(1.0, 1.0, 1.0)) == 0


def test_reduction_of_nothing() -> None:
    np.testing.assert_array_equal(
        reduction(np.array([0.0, 0.0, 2.0, 2.0]), np.array([0.0, 1.0, 0.0, 3.0])), [0, -1, 1, -0.5]
    )


def test_bootstrap_squares_are_about_the_corrected_square() -> None:
    mean = fmean(float(bootstrap_squares([simulate(seed, 1)], seed).mean()) for seed in range(20))
    assert mean == pytest.approx(fmean(corrected_square(simulate(seed, 1), seed) for seed in range(20)), rel=0.2)


def test_permutation_p_is_small_for_a_planted_effect_alone() -> None:
    assert permutation_p_values(simulate(0, effect=2)).max() < 0.01
    p_values = np.concatenate([permutation_p_values(simulate(seed), seed) for seed in range(40)])
    assert p_values.min() >= 1 / 1001
    assert (p_values <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert p_values.mean() == pytest.approx(0.5, abs=0.1)


def test_the_p_value_of_a_suite_is_exact_and_sees_more_than_its_scenarios() -> None:
    nothing = np.array([suite_p_value(simulate(seed), seed) for seed in range(200)])
    assert nothing.min() >= 1 / 1001
    assert (nothing <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert nothing.mean() == pytest.approx(0.5, abs=0.1)
    weak = [simulate(seed, effect=0.4) for seed in range(40)]
    whole = fmean(suite_p_value(table, seed) <= 0.05 for seed, table in enumerate(weak))
    single = fmean(float(holm(permutation_p_values(table, seed)).min() <= 0.05) for seed, table in enumerate(weak))
    interval = fmean(interval_of_bias(table, seed).low > 0 for seed, table in enumerate(weak))
    assert whole > single
    assert whole > interval


def test_the_p_value_of_a_suite_counts_all_ways_to_label_its_markers() -> None:
    """Two groups of three: twenty ways, of which two, one the other's mirror, are as far apart as these."""
    groups = np.repeat([0, 1], 3)
    y = np.array([[5.0, 6.0, 7.0, 1.0, 2.0, 3.5], [2.0, 2.5, 3.0, 0.0, 0.5, 0.2]])
    assert suite_p_value(Table(y, groups)) == pytest.approx(2 / 20, abs=0.03)


def test_everything_is_deterministic_in_the_seed() -> None:
    table, other = simulate(0, effect=0.5), simulate(1, effect=0.2)
    assert interval_of_bias(table, 7) == interval_of_bias(table, 7)
    assert interval_of_bias(table, 7) != interval_of_bias(table, 8)
    assert compare(table, other, 7) == compare(table, other, 7)
    assert suite_bias(table, 7).null_abs_smd == suite_bias(table, 7).null_abs_smd
    assert suite_bias(table, 7).null_abs_smd != suite_bias(table, 8).null_abs_smd
    np.testing.assert_array_equal(permutation_p_values(table, 7), permutation_p_values(table, 7))
    np.testing.assert_array_equal(scenario_intervals(table, 7)["smd"], scenario_intervals(table, 7)["smd"])


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, 0.9, 0.02])), [1.0, 1.0, 0.06])
    np.testing.assert_allclose(holm(np.array([0.2])), [0.2])
    assert holm(np.array([])).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_properties(values: list[float]) -> None:
    p_values = np.array(values)
    adjusted = holm(p_values)
    assert (adjusted >= p_values).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()
    assert adjusted[p_values.argmin()] == pytest.approx(min(1.0, len(values) * p_values.min()))


def test_interval_reads_as_a_figure_with_its_range() -> None:
    interval = Interval(0.5, 0.25, 0.75)
    assert str(interval) == "0.500 [0.250, 0.750]"
    assert interval.as_dict() == {"value": 0.5, "low": 0.25, "high": 0.75}


def test_resamples_by_name_are_those_of_a_bootstrap() -> None:
    """In every group as many draws as markers, each equally often; their variance is the multinomial's, 1 - 1/n."""
    groups = np.repeat([0, 1], [5, 9])
    table = Table(np.zeros((1, 14)), groups)
    weights = np.concatenate([resamples_by_name(table, [f"{m}" for m in range(14)], seed) for seed in range(20)])
    for group, size in ((0, 5), (1, 9)):
        of_group = weights[:, group]
        assert (of_group.sum(axis=1) == size).all()
        assert (of_group[:, groups != group] == 0).all()
        assert of_group[:, groups == group].mean(axis=0) == pytest.approx(np.ones(size), abs=0.04)
        assert of_group[:, groups == group].var(axis=0) == pytest.approx(np.full(size, 1 - 1 / size), abs=0.06)


def test_markers_of_the_same_name_are_drawn_alike_in_all_tables() -> None:
    def drawn(names: list[str]) -> dict[str, np.ndarray]:
        table = Table(np.zeros((1, len(names))), np.zeros(len(names), dtype=int))
        return dict(zip(names, resamples_by_name(table, names)[:, 0].T, strict=True))

    names = [f"name {number}" for number in range(12)]
    whole, part, other = drawn(names), drawn(names[:8][::-1]), drawn([f"another {name}" for name in names])
    turned = drawn(names[::-1])
    assert all((turned[name] == whole[name]).all() for name in names)
    assert fmean(float(np.corrcoef(whole[name], part[name])[0, 1]) for name in part) > 0.8
    unrelated = zip(whole.values(), other.values(), strict=True)
    assert abs(fmean(float(np.corrcoef(one, two)[0, 1]) for one, two in unrelated)) < 0.05
