"""Judge a mask once, on the test part: before and after, random masks of its size, a control suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.measures.disparity import Comparison, Interval, Table, compare
from secateur.studies.parts import Parts
from secateur.studies.record import Recorder
from secateur.weights import AnyMask

Verdict = Literal["verified", "not verified"]
VERIFIED: Verdict = "verified"
NOT_VERIFIED: Verdict = "not verified"


@dataclass(frozen=True, eq=False)
class Examination:
    """What the test part says about one mask.

    Attributes
    ----------
    before, after: y by scenario and marker.
    comparison: the suite bias before and after. control: the same for the control suite.
    perplexity_before, perplexity_after, perplexity_increase, kl: on the test part of the text.
    """

    before: Table
    after: Table
    comparison: Comparison
    control: Comparison | None
    perplexity_before: float
    perplexity_after: float
    perplexity_increase: Interval
    kl: float


def examine(parts: Parts, mask: AnyMask, seed: int, recorder: Recorder) -> Examination:
    """Read the test part and the control suite for a mask."""
    test = parts.test
    with recorder.step("Test: before", test.work(utility=True)) as advance:
        before = test.evaluate(None, advance, utility=True).table
    with recorder.step("Test: after", test.work(utility=True)) as advance:
        after = test.evaluate(mask, advance, utility=True).table
    control = None
    if parts.control is not None:
        name = f"Control suite {parts.control.prompts.suite.name}"
        with recorder.step(name, 2 * parts.control.work()) as advance:
            one = parts.control.evaluate(None, advance).table
            other = parts.control.evaluate(mask, advance).table
        control = compare(one, other, seed)
    return Examination(
        before=before,
        after=after,
        comparison=compare(before, after, seed),
        control=control,
        perplexity_before=test.perplexity(),
        perplexity_after=test.perplexity(mask),
        perplexity_increase=test.perplexity_increase(mask, seed),
        kl=test.kl_divergence(mask),
    )


def examine_random(parts: Parts, mask: AnyMask, draws: int, seed: int, recorder: Recorder) -> list[Comparison]:
    """The bias on test under masks of the same size, drawn at random; without those that leave no finite answers."""
    rng = np.random.default_rng(seed + 1)
    before = parts.test.evaluate().table
    # Masks of few units differ in late layers only from one another, so each pass begins where that is.
    test = parts.test.on(parts.test.prompts, None, walk=True)
    comparisons = []
    with recorder.step("Test: random masks of the same size", draws * test.work()) as advance:
        drawn = [mask.random_like(rng) for _ in range(draws)]
        for _, found in test.evaluate_walking(drawn, advance):
            if found is not None:
                comparisons.append(compare(before, found.table, seed))
    return comparisons


def judge(comparison: Comparison, increase: Interval, random: list[Comparison], limit: float) -> tuple[Verdict, str]:
    """The verdict on the test figures, and its reasons in words.

    Verified means: there was a bias (B before has a lower end above 0), it fell (the reduction's
    lower end is above 0), by more than under every random mask, and perplexity kept to the limit.
    """
    reduction, faults = comparison.reduction, find_faults(comparison, increase, random, limit)
    baseline = "under every random mask of the same size the model gave no finite answers"
    if random:
        mean = np.mean([draw.reduction.value for draw in random])
        baseline = f"random masks of the same size reduced the bias by {mean:.0%} on average"
    else:
        faults.append(baseline)
    figures = (
        f"On unseen markers and wordings the bias {_change(reduction)}, perplexity changed by {increase.value:+.2%}, "
        f"and {baseline}."
    )
    if not faults:
        return VERIFIED, figures
    return NOT_VERIFIED, f"Not proven: {'; '.join(faults)}. {figures}"


def _change(reduction: Interval) -> str:
    if reduction.value >= 0:
        return f"fell by {reduction.value:.0%} (95 % interval {reduction.low:.0%} to {reduction.high:.0%})"
    return (
        f"rose by {-reduction.value:.0%} (95 % interval of the change {-reduction.high:+.0%} to {-reduction.low:+.0%})"
    )


def find_faults(comparison: Comparison, increase: Interval, random: list[Comparison], limit: float) -> list[str]:
    """What keeps a reduction on test from being proven, in words.

    Parameters
    ----------
    random: the same under random masks of the same size; none where they were not measured.
    """
    reduction, faults = comparison.reduction, []
    if comparison.before.low <= 0:
        faults.append(f"the bias before the repair ({comparison.before}) cannot be told from chance on the test part")
    if reduction.low <= 0:
        faults.append(f"the interval of the reduction ({reduction.low:.0%} to {reduction.high:.0%}) includes no effect")
    best_random = max((draw.reduction.value for draw in random), default=-np.inf)
    if reduction.value <= best_random:
        faults.append(f"a random mask of the same size did as well ({best_random:.0%})")
    if increase.value > limit:
        faults.append(f"perplexity rose by {increase.value:.2%}, above the limit of {100 * limit:.3g}%")
    return faults
