"""Judge a mask once, on the test part: before and after, random masks of its size, a control suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.errors import NumericalError
from secateur.measures.disparity import (
    SIGNIFICANT,
    Comparison,
    Interval,
    Table,
    compare,
    fall_if_closed,
    suite_p_value,
)
from secateur.studies.parts import Parts
from secateur.studies.record import Recorder
from secateur.weights import AnyMask

Verdict = Literal["verified", "not verified"]
VERIFIED: Verdict = "verified"
NOT_VERIFIED: Verdict = "not verified"

# What keeps a reduction on test from being proven.
NO_BIAS = "no bias shown"
DID_NOT_FALL = "did not fall"
CHANCE = "may be chance"
NO_RANDOM = "no random masks judged"
LIKE_RANDOM = "random masks do as well"
OVER_LIMIT = "over the limit"


@dataclass(frozen=True, eq=False)
class Examination:
    """What the test part says about one mask.

    Attributes
    ----------
    before, after: y by scenario and marker.
    comparison: the suite bias before and after. control: the same for the control suite.
    p_before: permutation p-value of the bias before.
    fall_if_closed: of B^2 under a full repair, one that closes every gap.
    perplexity_before, perplexity_after, perplexity_increase, kl: on the test part of the text; KL where it has that.
    """

    before: Table
    after: Table
    comparison: Comparison
    p_before: float
    fall_if_closed: Interval
    control: Comparison | None
    perplexity_before: float
    perplexity_after: float
    perplexity_increase: Interval
    kl: float | None


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
        p_before=suite_p_value(before, seed),
        fall_if_closed=fall_if_closed(before, seed),
        control=control,
        perplexity_before=test.perplexity(),
        perplexity_after=test.perplexity(mask),
        perplexity_increase=test.perplexity_increase(mask, seed),
        kl=test.kl_divergence(mask) if test.divergence else None,
    )


def examine_if_finite(parts: Parts, mask: AnyMask, seed: int, recorder: Recorder) -> Examination | None:
    """The same; None where the model gives no finite answers under the mask, so that one mask ends no study."""
    try:
        return examine(parts, mask, seed, recorder)
    except NumericalError:
        return None


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


def judge(found: Examination, random: list[Comparison], limit: float) -> tuple[Verdict, str]:
    """The verdict on the test figures, and its reasons in words.

    Verified means: there was a bias (shuffled labels hardly ever give as much), it fell (the reduction's
    lower end is above 0), by more than under every random mask, and perplexity kept to the limit.
    """
    reduction, increase = found.comparison.reduction, found.perplexity_increase
    faults = find_faults(found, random, limit)
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


def find_faults(found: Examination, random: list[Comparison], limit: float) -> list[str]:
    """What keeps a reduction on test from being proven, in sentences with their figures.

    Parameters
    ----------
    random: the same under random masks of the same size; none where they were not measured, which is no fault here.
    """
    before, reduction, increase = found.comparison.before, found.comparison.reduction, found.perplexity_increase
    most = max((draw.reduction.value for draw in random), default=None)
    no_effect = f"the interval of the reduction ({reduction.low:.0%} to {reduction.high:.0%}) includes no effect"
    too_small = (
        ", as would that of a repair that closes every gap: the test part is too small; judge by more markers or "
        "scenarios"
        if found.fall_if_closed.low <= 0
        else ""
    )
    sentences = {
        NO_BIAS: f"the bias before the repair ({before}) cannot be told from chance on the test part (permutation "
        f"test: p = {found.p_before:.2g})",
        DID_NOT_FALL: no_effect if reduction.high >= 0 else "the bias is shown to have risen",
        CHANCE: no_effect + too_small,
        LIKE_RANDOM: "" if most is None else f"a random mask of the same size did as well ({most:.0%})",
        OVER_LIMIT: f"perplexity rose by {increase.value:.2%}, above the limit of {100 * limit:.3g}%",
    }
    faults = faults_of(found.p_before, reduction, most, increase.value > limit)
    return [sentences[fault] for fault in faults if fault != NO_RANDOM]


def faults_of(
    p_before: float, reduction: Interval, most_random: float | None, over_limit: bool, p_value: float = 0.0
) -> list[str]:
    """What keeps a reduction on test from being proven, in a few words each; the one rule of all studies.

    Parameters
    ----------
    p_before: permutation p-value of the bias before the repair. reduction: of B.
    most_random: the largest reduction under random masks; None where none were measured.
    over_limit: whether perplexity rose by more than the limit.
    p_value: of no change, corrected, where several reductions are judged at once.
    """
    faults = []
    if p_before >= SIGNIFICANT:
        faults.append(NO_BIAS)
    if reduction.value <= 0:
        faults.append(DID_NOT_FALL)
    elif reduction.low <= 0 or p_value >= SIGNIFICANT:
        faults.append(CHANCE)
    if most_random is None:
        faults.append(NO_RANDOM)
    elif reduction.value <= most_random:
        faults.append(LIKE_RANDOM)
    if over_limit:
        faults.append(OVER_LIMIT)
    return faults
