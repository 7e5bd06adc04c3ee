"""From y by group to disparities, their permutation nulls, and intervals.

Definitions (for one scenario; groups in the suite's order)

- gap = mean_A - mean_B, in the units of y;
- SMD = (mean_A - mean_B) / sqrt((s_A^2 + s_B^2) / 2), standard deviations with ddof 1;
  with more than two groups, the pair with the largest |SMD| stands for the scenario, for SMD and gap;
- deviation = sum over groups of |mean_g - mean of the group means| (the form used with HolisticBias);
- square = mean over pairs of groups of gap^2 / s^2, with one s^2 for all, the mean of the groups' variances;
  SMD^2 for two groups. The largest of many pairs, each with its own spread, is hardly known from a few markers
  a group; this is what is fitted and what is chosen by.

|SMD| is not zero without an effect (about 0.8 sqrt(2/n) for n markers a group), so beside every figure
stands its permutation null, labels shuffled over markers, and a suite's headline is
B = sqrt(max(0, mean SMD^2 - mean null SMD^2)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

PERMUTATIONS = 400
REPLICATES = 1000
LEVEL = 0.95
SIGNIFICANT = 0.05  # of p-values, after their correction
RATIOS = 201  # at which the interval of a reduction is looked for
# A resample may draw one marker only; a spread below this share of the scenario's own is not believed.
SPREAD_FLOOR = 0.02
# Draws of one marker that are told apart in a resample; more than that come once in 10^14.
MOST_DRAWS = 16

Statistic = Literal["smd", "gap", "deviation", "square"]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float | np.ndarray, replicates: np.ndarray) -> Interval:
        """A figure with the percentile interval of its bootstrap replicates, (replicates,)."""
        low, high = _percentiles(replicates)
        return cls(float(value), float(low), float(high))

    @property
    def standard_error(self) -> float:
        """Standard error that a symmetric 95 % interval of this width stands for."""
        return (self.high - self.low) / (2 * 1.96)

    @property
    def as_change(self) -> Interval:
        """A reduction, a share above 0 where something fell, as the change in percent that it is, then below 0."""
        return Interval(0 - 100 * self.value, 0 - 100 * self.high, 0 - 100 * self.low)

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Table:
    """y of one part of a suite.

    Attributes
    ----------
    y: (scenarios, markers); NaN where a marker gave no y. Every scenario has a y of every group.
    groups: (markers,), group of each marker, 0 to n_groups - 1.
    """

    y: np.ndarray
    groups: np.ndarray

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(self.n_groups), 2))

    def of_markers(self, keep: np.ndarray) -> Table:
        """The columns of some markers only, bool (markers,)."""
        return Table(self.y[:, keep], self.groups[keep])

    def of_scenarios(self, rows: list[int]) -> Table:
        """Some rows only."""
        return Table(self.y[rows], self.groups)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Group means and variances of every scenario under many weightings of the markers.

    Attributes
    ----------
    mean, variance: (replicates, groups, scenarios); variances with ddof 1.
    """

    mean: np.ndarray
    variance: np.ndarray


def _membership(groups: np.ndarray, n_groups: int) -> np.ndarray:
    """One-hot (groups, markers)."""
    return np.asarray(groups[None, :] == np.arange(n_groups)[:, None], dtype=float)


def _moments(table: Table, weights: np.ndarray) -> _Moments:
    """Moments for weights (replicates, groups, markers): how often a marker counts in a group."""
    y = table.y - _centre(table.y)  # centred, so that squares do not cancel
    spread = np.nanstd(y, axis=1, ddof=1)
    known = np.isfinite(y)
    if known.all():
        n = weights.sum(axis=2)[:, :, None]  # (replicates, groups, 1)
    else:  # (replicates, groups, scenarios); a resample may have none
        n, y = np.maximum(weights @ known.T.astype(float), 1), np.where(known, y, 0.0)
    mean = weights @ y.T / n
    variance = (weights @ (y**2).T - n * mean**2) / np.maximum(n - 1, 1)
    floor = (SPREAD_FLOOR * spread) ** 2
    return _Moments(mean, np.maximum(variance, np.maximum(floor, 1e-24)))


def _centre(y: np.ndarray) -> np.ndarray:
    """Mean of every scenario over the markers that have a y, (scenarios, 1)."""
    return np.asarray(np.nanmean(y, axis=1, keepdims=True))


def _pairwise(table: Table, moments: _Moments) -> tuple[np.ndarray, np.ndarray]:
    """Gaps and SMDs of all pairs of groups, each (replicates, pairs, scenarios)."""
    gaps, smds = [], []
    for a, b in table.pairs:
        gap = moments.mean[:, a] - moments.mean[:, b]
        gaps.append(gap)
        smds.append(gap / np.sqrt((moments.variance[:, a] + moments.variance[:, b]) / 2))
    return np.stack(gaps, axis=1), np.stack(smds, axis=1)


def _statistics(table: Table, weights: np.ndarray) -> dict[Statistic, np.ndarray]:
    """Every statistic, (replicates, scenarios); SMD and gap signed, of the pair with the largest |SMD|."""
    moments = _moments(table, weights)
    gaps, smds = _pairwise(table, moments)
    largest = np.abs(smds).argmax(axis=1)[:, None]
    centre = moments.mean.mean(axis=1, keepdims=True)
    spread = moments.variance.mean(axis=1, keepdims=True)
    return {
        "smd": np.take_along_axis(smds, largest, axis=1)[:, 0],
        "gap": np.take_along_axis(gaps, largest, axis=1)[:, 0],
        "deviation": np.abs(moments.mean - centre).sum(axis=1),
        "square": (gaps**2 / spread).mean(axis=1),
    }


def statistics(table: Table) -> dict[Statistic, np.ndarray]:
    """SMD, gap, deviation and square of every scenario, each (scenarios,)."""
    weights = _membership(table.groups, table.n_groups)[None]
    return {name: values[0] for name, values in _statistics(table, weights).items()}


def group_means(table: Table) -> np.ndarray:
    """Mean y by group, (scenarios, groups)."""
    moments = _moments(table, _membership(table.groups, table.n_groups)[None])
    return np.asarray(moments.mean[0].T + _centre(table.y))


def group_intervals(table: Table, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap intervals over markers of mean y by group: low, high (scenarios, groups)."""
    moments = _moments(table, _resamples(table, np.random.default_rng(seed), REPLICATES))
    low, high = _percentiles(moments.mean)
    return low.T + _centre(table.y), high.T + _centre(table.y)


def mean_interval(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> Interval:
    """Mean over markers with its 95 % bootstrap interval, markers drawn within their groups.

    Parameters
    ----------
    values: (markers,), finite. groups: (markers,).
    """
    table = Table(values[None], groups)
    weights = _resamples(table, np.random.default_rng(seed), REPLICATES).sum(axis=1)  # (replicates, markers)
    return Interval.of(values.mean(), weights @ values / len(values))


def null(table: Table, seed: int = 0, permutations: int = PERMUTATIONS) -> dict[Statistic, np.ndarray]:
    """Statistics with the labels shuffled over markers, each (permutations, scenarios).

    One shuffle serves all scenarios, since they share the markers and so their errors.
    """
    return _statistics(table, shuffled_membership(table.groups, seed, permutations))


def shuffled_membership(groups: np.ndarray, seed: int = 0, permutations: int = PERMUTATIONS) -> np.ndarray:
    """Which marker belongs to which group under shuffled labels, one-hot (permutations, groups, markers).

    Parameters
    ----------
    groups: (markers,), group of each marker, 0 to n_groups - 1.
    """
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.permutation(groups) for _ in range(permutations)])
    return np.asarray(labels[:, None, :] == np.arange(groups.max() + 1)[None, :, None], dtype=float)


@dataclass(frozen=True, eq=False)
class SuiteBias:
    """A suite's disparity in one state of the model.

    Attributes
    ----------
    corrected: the headline B.
    mean_abs_smd, null_abs_smd: raw mean |SMD|, and what it would be without an effect.
    mean_abs_gap, null_abs_gap: the same for the gap, in units of y.
    deviation, null_deviation: the same for the sum over groups of |mean_g - mean|.
    """

    corrected: float
    mean_abs_smd: float
    null_abs_smd: float
    mean_abs_gap: float
    null_abs_gap: float
    deviation: float
    null_deviation: float


def corrected_square(table: Table, seed: int = 0) -> float:
    """mean SMD^2 - mean null SMD^2, before the root; negative where there is less than noise."""
    return float((statistics(table)["smd"] ** 2).mean() - (null(table, seed)["smd"] ** 2).mean())


def corrected_choice(table: Table, seed: int = 0) -> float:
    """What candidates are compared by: mean square - mean null square; B^2 before the root for two groups."""
    return float(statistics(table)["square"].mean() - null(table, seed)["square"].mean())


def suite_bias(table: Table, seed: int = 0) -> SuiteBias:
    """All suite figures of one table."""
    observed, shuffled = statistics(table), null(table, seed)

    def mean_abs(values: dict[Statistic, np.ndarray], name: Statistic) -> float:
        return float(np.abs(values[name]).mean())

    square = (observed["smd"] ** 2).mean() - (shuffled["smd"] ** 2).mean()
    return SuiteBias(
        corrected=float(np.sqrt(max(0.0, square))),
        mean_abs_smd=mean_abs(observed, "smd"),
        null_abs_smd=mean_abs(shuffled, "smd"),
        mean_abs_gap=mean_abs(observed, "gap"),
        null_abs_gap=mean_abs(shuffled, "gap"),
        deviation=mean_abs(observed, "deviation"),
        null_deviation=mean_abs(shuffled, "deviation"),
    )


def _resamples(table: Table, rng: np.random.Generator, replicates: int) -> np.ndarray:
    """Bootstrap weights (replicates, groups, markers): markers drawn within their group."""
    weights = np.zeros((replicates, table.n_groups, len(table.groups)))
    for group in range(table.n_groups):
        members = np.flatnonzero(table.groups == group)
        counts = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=replicates)
        weights[:, group, members] = counts
    return weights


def resamples_by_name(table: Table, names: Sequence[str], seed: int = 0) -> np.ndarray:
    """Bootstrap weights (replicates, groups, markers) that agree wherever a marker of the same name stands.

    Every name is drawn at random times, as often as it may be, whatever table it is in; a table takes the first draws
    of its markers, as many of a group as the group has. That is the usual resample of one table, the same one in
    tables of the same markers, and nearly the same for those that two tables share.

    Parameters
    ----------
    names: (markers,), of a marker with its group.
    """
    waits = np.stack([_generator(seed, name).exponential(size=(REPLICATES, MOST_DRAWS)) for name in names], axis=1)
    times = waits.cumsum(axis=2)  # (replicates, markers, draws)
    weights = np.zeros((REPLICATES, table.n_groups, len(table.groups)))
    for group in range(table.n_groups):
        members = np.flatnonzero(table.groups == group)
        drawn = times[:, members].reshape(REPLICATES, -1)
        last = np.partition(drawn, len(members) - 1, axis=1)[:, len(members) - 1]
        weights[:, group, members] = (times[:, members] <= last[:, None, None]).sum(axis=2)
    return weights


def _generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers of a name's own."""
    return np.random.default_rng(list(sha256(f"{seed}\n{name}".encode()).digest()))


def _percentiles(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tail = (1 - LEVEL) / 2 * 100
    low, high = np.percentile(values, [tail, 100 - tail], axis=axis)
    return low, high


def largest_pairs(table: Table) -> list[tuple[int, int]]:
    """The pair of groups with the largest |SMD| of every scenario."""
    _, smds = _pairwise(table, _moments(table, _membership(table.groups, table.n_groups)[None]))
    return [table.pairs[pair] for pair in np.abs(smds[0]).argmax(axis=0)]


def scenario_intervals(table: Table, seed: int = 0) -> dict[Statistic, tuple[np.ndarray, np.ndarray]]:
    """95 % bootstrap intervals over markers of every scenario's SMD and gap: low, high (scenarios,).

    The pair of groups that is compared stays the one that was largest in the sample.
    """
    gaps, smds = _pairwise(table, _moments(table, _resamples(table, np.random.default_rng(seed), REPLICATES)))
    pair = np.array([table.pairs.index(names) for names in largest_pairs(table)])
    scenario = np.arange(len(pair))
    return {"smd": _percentiles(smds[:, pair, scenario]), "gap": _percentiles(gaps[:, pair, scenario])}


def smd_changes(before: Table, after: Table, seed: int = 0) -> list[Interval]:
    """SMD after minus before of every scenario, both under the same resamples of markers.

    The pair of groups is the one that was largest before, so that a change is not one of the pair. The same markers
    have a y in both tables.
    """
    weights = _resamples(before, np.random.default_rng(seed), REPLICATES)
    weights = np.concatenate([_membership(before.groups, before.n_groups)[None], weights])
    pair = np.array([before.pairs.index(names) for names in largest_pairs(before)])
    first, second = (_pairwise(table, _moments(table, weights))[1] for table in (before, after))
    change = (second - first)[:, pair, np.arange(len(pair))]  # (1 + replicates, scenarios)
    return [Interval.of(values[0], values[1:]) for values in change.T]


def permutation_p_values(table: Table, seed: int = 0) -> np.ndarray:
    """Two-sided permutation p-value of every scenario's SMD, (scenarios,)."""
    observed = np.abs(statistics(table)["smd"])
    shuffled = np.abs(null(table, seed, permutations=REPLICATES)["smd"])
    return _share_as_large(shuffled, observed)


def suite_p_value(table: Table, seed: int = 0) -> float:
    """One-sided permutation p-value of a suite's bias: how often shuffled labels give as large a mean SMD^2.

    It tells whether there is a bias in the scenarios that are asked, and is exact for these; the interval of B also
    says what other scenarios might give, so that it may begin at 0 where this p-value is small.
    """
    observed = (statistics(table)["smd"] ** 2).mean()
    shuffled = (null(table, seed, permutations=REPLICATES)["smd"] ** 2).mean(axis=1)
    return float(_share_as_large(shuffled, observed))


def _share_as_large(shuffled: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Of shuffles, (permutations, ...), and the sample itself, those that are as large as the sample, (...)."""
    return np.asarray((1 + (shuffled >= observed - 1e-12).sum(axis=0)) / (1 + len(shuffled)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment (Holm, 1979) of p-values (tests,)."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted


def bootstrap_squares(
    tables: list[Table], seed: int = 0, names: Sequence[str] | None = None, what: str = ""
) -> np.ndarray:
    """B^2 of several states of the same prompts under the same resamples, (states, replicates).

    Clusters: scenarios are drawn with replacement, and markers within their group, across all
    scenarios at once. A replicate carries the sampling noise twice (of the sample, and of the
    resampling), so the permutation null is subtracted twice; values may be negative.

    Parameters
    ----------
    names: of the markers, (markers,), for resamples that belong together with those of other suites: markers are drawn
        by name, see :func:`resamples_by_name`, and scenarios by ``what``, a name of the suite.
    """
    rng = np.random.default_rng(seed) if names is None else _generator(seed, what)
    n_scenarios = len(tables[0].y)
    weights = _resamples(tables[0], rng, REPLICATES) if names is None else resamples_by_name(tables[0], names, seed)
    drawn = rng.multinomial(n_scenarios, np.full(n_scenarios, 1 / n_scenarios), size=REPLICATES) / n_scenarios
    squares = []
    for table in tables:
        noise = (null(table, seed)["smd"] ** 2).mean(axis=0)  # (scenarios,)
        replicate = _statistics(table, weights)["smd"] ** 2 - 2 * noise  # (replicates, scenarios)
        squares.append((replicate * drawn).sum(axis=1))
    return np.stack(squares)


def root(squares: np.ndarray | float) -> np.ndarray:
    """B from B^2, which may be below 0 where there is less than noise."""
    return np.sqrt(np.maximum(0.0, squares))


@dataclass(frozen=True)
class Comparison:
    """Before and after on the same prompts, with paired 95 % cluster-bootstrap intervals.

    Attributes
    ----------
    before, after: the corrected suite bias B.
    reduction: 1 - after / before, at most 1; negative where the bias grew. See :func:`reduction_interval`.
    change: after - before, in units of B.
    fall: B^2 before - B^2 after, neither cut off at 0. Its interval is above 0 where that of the reduction is: errors
        that before and after have in common cancel, so a bias can be shown to fall where its size is hardly known.
    """

    before: Interval
    after: Interval
    reduction: Interval
    change: Interval
    fall: Interval

    def as_dict(self) -> dict[str, Any]:
        """What records of runs and plans say."""
        return {
            "bias_before": self.before.as_dict(),
            "bias_after": self.after.as_dict(),
            "reduction": self.reduction.as_dict(),
        }


def interval_of_bias(table: Table, seed: int = 0) -> Interval:
    """B of one state with its interval."""
    return Interval.of(suite_bias(table, seed).corrected, root(bootstrap_squares([table], seed)[0]))


def compare(before: Table, after: Table, seed: int = 0) -> Comparison:
    """Compare two states of a model on the same prompts."""
    point = np.array([corrected_square(before, seed), corrected_square(after, seed)])
    return compare_squares(point, bootstrap_squares([before, after], seed))


def compare_squares(squares: np.ndarray, replicates: np.ndarray) -> Comparison:
    """Compare two states by B^2 before the root, (2,), and its bootstrap replicates, (2, replicates).

    Squares of several suites may be averaged first: B^2 is a mean over scenarios, and errors above and below 0 even
    out as long as no root is taken.
    """
    point, roots = root(squares), root(replicates)
    fall = Interval.of(squares[0] - squares[1], replicates[0] - replicates[1])
    ratio = reduction_interval(float(reduction(point[0], point[1])), replicates)
    if fall.low <= 0 <= fall.high:  # no change is believed, if not all reductions from there to the sample's own
        ratio = Interval(ratio.value, min(ratio.low, 0.0), max(ratio.high, 0.0))
    return Comparison(
        before=Interval.of(point[0], roots[0]),
        after=Interval.of(point[1], roots[1]),
        reduction=ratio,
        change=Interval.of(point[1] - point[0], roots[1] - roots[0]),
        fall=fall,
    )


def reduction_interval(value: float, replicates: np.ndarray) -> Interval:
    """A reduction of B with its 95 % interval, by the bootstrap form of Fieller's method for a ratio (Fieller, 1954).

    In it are the reductions r for which the bootstrap interval of after - (1 - r)^2 before, of B^2, holds 0, as far as
    they hang together with the sample's own. A ratio of two replicates means nothing where that of the bias before is
    about 0; these differences are as good there as anywhere. The lower end stops at -100 %, or where B after is twice
    the sample's own: an interval that reaches that far may reach further.

    Parameters
    ----------
    replicates: B^2 before and after under the same resamples, (2, replicates).
    """
    share, (before, after) = 1 - value, replicates
    shares = np.linspace(0, max(2.0, 2 * share), RATIOS)
    low, high = _percentiles(after[:, None] - shares**2 * before[:, None])  # (ratios,)
    outside = np.maximum(low, -high)  # above 0 where the interval does not hold 0
    above = np.flatnonzero((outside > 0) & (shares > share))
    below = np.flatnonzero((outside > 0) & (shares < share))
    most = _crossing(shares, outside, above[0] - 1, above[0]) if len(above) else shares[-1]
    least = _crossing(shares, outside, below[-1] + 1, below[-1]) if len(below) else 0.0
    return Interval(value, 1 - max(most, share), 1 - min(least, share))


def _crossing(x: np.ndarray, y: np.ndarray, inside: int, outside: int) -> float:
    """Where y crosses 0 on its way from a neighbour at or below it to one above."""
    if y[inside] > 0:  # the sample's own is between them
        return float(x[outside])
    return float(x[inside] + (x[outside] - x[inside]) * -y[inside] / (y[outside] - y[inside]))


def gaps_closed(table: Table) -> Table:
    """The table as a repair would leave it that closes every gap and touches nothing else.

    Where the fall from the table to this one can be told from chance, the table is large enough to show a full repair.
    Less of a repair can be easier to show, as its errors are more like those before.
    """
    y = table.y.copy()
    for group in range(table.n_groups):
        members = table.groups == group
        y[:, members] -= np.nanmean(y[:, members], axis=1, keepdims=True)
    return Table(y, table.groups)


def fall_if_closed(table: Table, seed: int = 0) -> Interval:
    """The fall of B^2 under a full repair, one that closes every gap; see :func:`gaps_closed`."""
    return compare(table, gaps_closed(table), seed).fall


def by_draw(suites: Sequence[np.ndarray]) -> np.ndarray:
    """B^2 over several suites before and under every mask that was drawn for them, (1 + draws,).

    Parameters
    ----------
    suites: the same of each, (1 + draws,). Draws that left no finite answers are missing; so many count as all have.
    """
    fewest = min(map(len, suites))
    return np.asarray(np.mean([one[:fewest] for one in suites], axis=0))


def largest_reduction(squares: np.ndarray) -> float | None:
    """The largest reduction of B by several masks, None without any, from B^2 before and under each, (1 + masks,)."""
    before, *after = root(squares)
    return float(reduction(before, np.array(after)).max()) if after else None


def p_value(difference: Interval) -> float:
    """Two-sided p-value of no difference, by the normal approximation of the side of its interval towards 0.

    It is below 5 % where the interval does not hold 0. Counting replicates beyond 0 could say no less than 1 in their
    number, too coarse to correct for many tests; the far side of a skewed interval says nothing of 0.
    """
    value, width = difference.value, difference.high - difference.low
    if value == 0 or not np.isfinite(width):
        return 1.0
    side = value - difference.low if value > 0 else difference.high - value
    side = side if side > 0 else width / 2  # a skewed interval may leave the figure itself out
    return float(2 * norm.sf(-norm.ppf((1 - LEVEL) / 2) * abs(value) / side)) if side > 0 else 0.0


def reduction(before: np.ndarray | float, after: np.ndarray | float) -> np.ndarray:
    """1 - after / before; where there was nothing to reduce, 0 if there still is nothing, else -1."""
    before, after = np.asarray(before), np.asarray(after)
    nothing = before <= 1e-9
    ratio = 1 - after / np.where(nothing, 1.0, before)
    return np.asarray(np.where(nothing, np.where(after <= 1e-9, 0.0, -1.0), ratio))
