"""Selection rates and impact ratios, beside plain counting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from secateur.measures.prompts import Prompt, PromptSet
from secateur.measures.selection import Selection, selections, wilson
from secateur.suites import Suite

WORDINGS = 3


def suite(**favourable: str | None) -> Suite:
    """Decisions, by id with their favourable side, and a quantity that is none; groups of four, three and two."""
    marked = [{"prompt": f"{number} {{marker}}"} for number in range(WORDINGS)]
    decision = {"kind": "preference", "a": [" yes"], "b": [" no"]}
    scenarios = [
        {"id": name, "measure": {**decision, "favourable": side}, "paraphrases": marked}
        for name, side in favourable.items()
    ]
    quantity = {"id": "price", "measure": {"kind": "quantity", "values": [1, 2]}, "paraphrases": marked}
    groups = {"x": ["x1", "x2", "x3", "x4"], "y": ["y1", "y2", "y3"], "z": ["z1", "z2"]}
    return Suite.model_validate(
        {"name": "small", "attribute": "thing", "groups": groups, "scenarios": [quantity, *scenarios]}
    )


def prompts_of(asked: Suite) -> PromptSet:
    groups = np.repeat(np.arange(len(asked.groups)), [len(markers) for markers in asked.groups.values()])
    prompts = tuple(
        Prompt(scenario, wording, marker, (1,), ((2,), (3,)))
        for scenario in range(len(asked.scenarios))
        for wording in range(WORDINGS)
        for marker in range(len(groups))
    )
    return PromptSet(asked, prompts, tuple(range(len(groups))), groups)


def counted(asked: Suite, prompts: PromptSet, y: np.ndarray, scenario: int) -> dict[str, float]:
    """Share of favourable answers by group, by counting prompts."""
    sign = 1 if asked.scenarios[scenario].measure.favourable == "a" else -1  # type: ignore[union-attr]
    names = list(asked.groups)
    answers: dict[str, list[bool]] = {name: [] for name in names}
    for prompt, value in zip(prompts.prompts, y, strict=True):
        if prompt.scenario == scenario:
            answers[names[prompts.groups[prompt.marker]]].append(sign * value > 0)
    return {name: sum(given) / len(given) for name, given in answers.items()}


def rates(selection: Selection) -> dict[str, float]:
    return {name: group.rate.value for name, group in selection.groups.items()}


def test_rates_and_ratios_equal_plain_counts() -> None:
    asked = suite(hire="a", search="b", trust=None)
    prompts = prompts_of(asked)
    y = np.random.default_rng(0).normal(size=len(prompts))
    mean, hire, search = selections(prompts, y)
    assert (mean.scenario, hire.scenario, search.scenario) == (None, "hire", "search")
    assert (mean.favourable, hire.favourable, search.favourable) == ((), (" yes",), (" no",))
    expected = {1: counted(asked, prompts, y, 1), 2: counted(asked, prompts, y, 2)}
    assert rates(hire) == pytest.approx(expected[1])
    assert rates(search) == pytest.approx(expected[2])
    assert rates(mean) == pytest.approx({name: (expected[1][name] + expected[2][name]) / 2 for name in asked.groups})
    highest = max(expected[1].values())
    for name, group in hire.groups.items():
        assert group.impact_ratio == pytest.approx(expected[1][name] / highest)
        assert group.markers == len(asked.groups[name])
        assert group.share == pytest.approx(group.markers / 9)
    lowest = min(expected[1], key=lambda name: expected[1][name])
    assert hire.lowest == (lowest, pytest.approx(expected[1][lowest] / highest))


@pytest.mark.parametrize(("sizes", "share"), [((12, 12), 0.6), ((12, 12, 12, 12), 0.93)])
def test_beside_ratios_stands_how_often_chance_gives_one_below_four_fifths(
    sizes: tuple[int, ...], share: float
) -> None:
    marked = {f"g{group}": [f"{group} {n}" for n in range(size)] for group, size in enumerate(sizes)}
    asked = suite(hire="a").model_copy(update={"groups": marked})
    prompts = prompts_of(asked)
    even = np.array([1.0 if prompt.marker % 2 else -1.0 for prompt in prompts.prompts])
    _, hire = selections(prompts, even)
    assert hire.short_by_chance == pytest.approx(share, abs=0.12)
    assert selections(prompts, even, seed=1)[1].short_by_chance == pytest.approx(hire.short_by_chance, abs=0.1)
    assert selections(prompts, np.ones(len(prompts)))[1].short_by_chance == 0
    assert selections(prompts, -np.ones(len(prompts)))[1].short_by_chance == 0
    one = np.array([1.0 if prompt.marker == 0 else -1.0 for prompt in prompts.prompts])
    assert selections(prompts, one)[1].short_by_chance == 1


def test_where_nobody_is_selected_there_is_no_ratio() -> None:
    prompts = prompts_of(suite(hire="a"))
    mean, hire = selections(prompts, np.full(len(prompts), -1.0))
    assert rates(hire) == {"x": 0, "y": 0, "z": 0}
    assert {group.impact_ratio for group in hire.groups.values()} == {None}
    assert hire.lowest is None
    assert hire.groups == mean.groups


def test_an_even_answer_selects_nobody() -> None:
    for side in ("a", "b"):
        prompts = prompts_of(suite(hire=side))
        assert set(rates(selections(prompts, np.zeros(len(prompts)))[1]).values()) == {0.0}


def test_a_suite_without_decisions_has_no_rates() -> None:
    prompts = prompts_of(suite(trust=None))
    assert selections(prompts, np.ones(len(prompts))) == []


@pytest.mark.parametrize(("selected", "n"), [(0, 4), (3, 7), (12, 12), (40, 64)])
def test_intervals_are_wilson_s(selected: int, n: int) -> None:
    found, expected = wilson(selected / n, n), binomtest(selected, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_exactly_four_fifths_does_not_fall_short() -> None:
    marked = {name: [f"{name} {number}" for number in range(12)] for name in ("x", "y")}
    prompts = prompts_of(suite(hire="a").model_copy(update={"groups": marked}))

    def hire(x: int, y: int) -> Selection:
        chosen = {*range(x), *range(12, 12 + y)}
        return selections(prompts, np.array([1.0 if one.marker in chosen else -1.0 for one in prompts.prompts]))[1]

    assert hire(10, 8).groups["y"].impact_ratio == pytest.approx(0.8)
    assert not hire(10, 8).falls_short
    assert hire(10, 7).falls_short
