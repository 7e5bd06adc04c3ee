"""Passes begun where masks differ: equal to whole ones in every family, at a share of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import means_of, model_of, prompts_of, text_of
from tiny import HEADS, LAYERS, NAMES

from secateur.attenuation import Attenuation
from secateur.evaluation import Evaluator
from secateur.evaluation.walk import Walk, first_difference, walking_order
from secateur.models import LanguageModel
from secateur.units import Mask, UnitSpace
from secateur.weights import AnyMask, WeightMask, linear_layers, weight_matrix

PLENTY = 1 << 30


def evaluator(name: str = "llama", **options: Any) -> Evaluator:
    return Evaluator(model_of(name), prompts_of(name), text_of(name), 5, **options)


def walked_masks(name: str = "llama") -> list[Mask | None]:
    """A walk with single flips, long jumps, means, the same mask again and the unpruned model in between."""
    model = model_of(name)
    space = UnitSpace.of(model)
    last = space.head_slice(LAYERS - 1).start
    steps: list[Any] = [
        [0],
        [0, last],
        [last],
        [],
        [last + 1],
        [last + 1, space.n_heads],
        None,
        list(range(0, len(space), 3)),
    ]
    masks: list[Mask | None] = [None if step is None else Mask.removing(model, step) for step in steps]
    return [*masks, Mask.removing(model, [0, last], means_of(name)), Mask.removing(model, [last])]


@pytest.mark.parametrize("name", NAMES)
def test_a_walk_measures_what_whole_passes_measure(name: str) -> None:
    walk, plain = evaluator(name, keep_bytes=PLENTY), evaluator(name)
    for mask in walked_masks(name):
        found, expected = walk.evaluate(mask, utility=True), plain.evaluate(mask, utility=True)
        np.testing.assert_allclose(found.table.y, expected.table.y, atol=1e-5)
        np.testing.assert_allclose(found.nll, expected.nll, atol=1e-3)


def test_a_flip_in_a_later_layer_runs_the_later_layers_alone() -> None:
    walk = evaluator(keep_bytes=PLENTY)
    model = walk.model
    walk.evaluate(utility=True)
    whole = sum(batch.tokens for batch in walk.batches) + sum(len(window.tokens) for window in text_of().windows)
    removed: list[int] = []
    for layer in reversed(range(LAYERS)):
        removed.append(layer * HEADS)
        before = model.usage.forward
        walk.evaluate(Mask.removing(model, removed), utility=True)
        assert model.usage.forward - before == pytest.approx(whole * (LAYERS - layer) / LAYERS, abs=9)


@pytest.mark.parametrize("kept", [2, LAYERS])
def test_memory_is_bounded(kept: int) -> None:
    model = model_of()
    width, tokens = model.model.config.hidden_size, 100
    walk = Walk.within(model, tokens, kept * tokens * width * 4 + 1)
    assert walk is not None
    assert len(walk.layers) == kept
    assert walk.layers[0] == 0
    assert Walk.within(model, tokens, tokens * width * 4) is None


def test_a_failed_pass_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walk, plain = model_of(), evaluator(keep_bytes=PLENTY), evaluator()
    first, broken, last = (Mask.removing(model, [unit]) for unit in (0, 1, HEADS))
    walk.evaluate(first)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "log_probabilities", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            walk.evaluate(broken)
    np.testing.assert_allclose(walk.evaluate(last).table.y, plain.evaluate(last).table.y, atol=1e-5)


def weight_mask(model: LanguageModel) -> WeightMask:
    name, module = next(iter(linear_layers(model).items()))
    return WeightMask.removing(model, {name: np.ones(tuple(weight_matrix(module).shape), dtype=bool)})


def attenuation(model: LanguageModel) -> Attenuation:
    space = UnitSpace.of(model)
    return Attenuation(space, np.linspace(0, 1, len(space)), model.fingerprint)


@pytest.mark.parametrize("other", [weight_mask, attenuation])
def test_masks_of_other_kinds_take_whole_passes(other: Callable[[LanguageModel], AnyMask]) -> None:
    model, walk, plain = model_of(), evaluator(keep_bytes=PLENTY), evaluator()
    first, mask, last = Mask.removing(model, [0]), other(model), Mask.removing(model, [HEADS])
    walk.evaluate(first)
    before, unpruned = model.usage.forward, plain.evaluate().table.y
    whole = model.usage.forward - before
    found = walk.evaluate(mask).table.y
    assert model.usage.forward - before == 2 * whole
    np.testing.assert_allclose(found, plain.evaluate(mask).table.y, atol=1e-5)
    assert np.abs(found - unpruned).max() > 1e-3
    np.testing.assert_allclose(walk.evaluate(last).table.y, plain.evaluate(last).table.y, atol=1e-5)


@settings(max_examples=40)
@given(one=st.sets(st.integers(0, LAYERS * HEADS - 1)), other=st.sets(st.integers(0, LAYERS * HEADS - 1)))
def test_first_difference_is_the_layer_of_the_first_head_that_differs(one: set[int], other: set[int]) -> None:
    model = model_of()
    masks = [Mask.removing(model, sorted(removed)) if removed else None for removed in (one, other)]
    differ = one ^ other
    expected = min((head // HEADS for head in differ), default=LAYERS - 1)
    assert first_difference(masks[0], masks[1], LAYERS) == expected


@settings(max_examples=30)
@given(st.lists(st.sets(st.integers(0, LAYERS * HEADS - 1)), max_size=12))
def test_the_walking_order_restarts_latest(sets: list[set[int]]) -> None:
    model = model_of()
    masks = [Mask.removing(model, sorted(removed)) for removed in sets]
    order = walking_order(masks)
    assert sorted(order) == list(range(len(masks)))

    def restarts(numbers: list[int]) -> int:
        pairs = pairwise(masks[number] for number in numbers)
        return sum(first_difference(one, other, LAYERS) for one, other in pairs)

    shuffled = np.random.default_rng(len(sets)).permutation(len(masks)).tolist()
    assert restarts(order) >= restarts(shuffled)
