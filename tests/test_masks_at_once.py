"""Several masks in one pass: equal to one after the other in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import means_of, model_of, prompts_of, text_of
from tiny import NAMES

from secateur.errors import MaskError, NumericalError
from secateur.evaluation import Evaluator, evaluator
from secateur.evaluation.evaluator import Measurement
from secateur.evaluation.store import Store
from secateur.units import Mask, UnitSpace, masked_each


def evaluator_of(name: str = "llama", **options: Any) -> Evaluator:
    return Evaluator(model_of(name), prompts_of(name), text_of(name), 5, **options)


def some_masks(name: str, count: int, mean: bool = False, seed: int = 0) -> list[Mask]:
    model = model_of(name)
    space, rng = UnitSpace.of(model), np.random.default_rng(seed)
    means = means_of(name) if mean else None
    drawn = [np.flatnonzero(rng.random(len(space)) < share) for share in np.linspace(0, 0.3, count)]
    return [Mask.removing(model, units, means) for units in drawn]


def assert_same(found: Measurement | None, expected: Measurement) -> None:
    assert found is not None
    np.testing.assert_allclose(found.table.y, expected.table.y, atol=1e-5)
    np.testing.assert_allclose(found.nll, expected.nll, atol=1e-3)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_masks_in_one_pass_measure_what_they_measure_alone(name: str, mean: bool) -> None:
    masks, plain = some_masks(name, 5, mean), evaluator_of(name, divergence=True)
    together = evaluator_of(name, divergence=True, masks_at_once=3)
    for mask, found in zip(masks, together.evaluate_each(masks, utility=True), strict=True):
        assert_same(found, plain.evaluate(mask, utility=True))
        assert together.kl_divergence(mask) == pytest.approx(plain.kl_divergence(mask), abs=1e-5)


@given(seed=st.integers(0, 1000), count=st.integers(1, 7), at_once=st.integers(1, 8))
@settings(max_examples=15)
def test_any_number_in_one_pass_gives_the_same(seed: int, count: int, at_once: int) -> None:
    masks = some_masks("llama", count, seed=seed)
    plain, together = evaluator_of(), evaluator_of(masks_at_once=at_once)
    for mask, found in zip(masks, together.evaluate_each(masks, utility=True), strict=True):
        assert_same(found, plain.evaluate(mask, utility=True))


def test_masks_in_one_pass_count_their_tokens_and_are_not_measured_again() -> None:
    masks = some_masks("llama", 4)[1:]
    plain, together = evaluator_of(), evaluator_of(masks_at_once=3)
    usage = plain.model.usage
    before = usage.forward
    list(plain.evaluate_each(masks, utility=True))
    alone = usage.forward - before
    list(together.evaluate_each([*masks, *masks], utility=True))
    assert usage.forward - before - alone == alone


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let figures show the shape of their pass: the last digits of large models do."""
    of_each = evaluator.measure_y_of_each
    monkeypatch.setattr(evaluator, "measure_y_of_each", lambda *told: of_each(*told) + 1e-4 * told[-1])


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("stored", [[0], [1, 2], [0, 1, 2, 3, 5]])
def test_what_a_store_holds_of_a_group_changes_no_digit(stored: list[int], tmp_path: Path) -> None:
    masks, whole = some_masks("llama", 8)[1:], evaluator_of(divergence=True, masks_at_once=4)
    expected = list(whole.evaluate_each(masks, utility=True))
    with Store(tmp_path / "measured.sqlite", whole.model.fingerprint) as store:
        for number in stored:  # what was written before the run was killed
            store.put(whole.part, masks[number].key, whole.figures(masks[number]))
        resumed = evaluator_of(divergence=True, masks_at_once=4, store=store)
        for found, one in zip(resumed.evaluate_each(masks, utility=True), expected, strict=True):
            assert found is not None
            assert one is not None
            assert found.table.y.tobytes() == one.table.y.tobytes()
            assert (found.log_perplexity, found.kl) == (one.log_perplexity, one.kl)


@pytest.mark.usefixtures("shown")
def test_what_is_known_of_a_mask_stays_when_it_fills_a_group() -> None:
    masks, together = some_masks("llama", 4)[1:], evaluator_of(masks_at_once=3)
    alone = together.evaluate(masks[1]).table.y
    list(together.evaluate_each(masks, utility=True))
    assert together.evaluate(masks[1]).table.y.tobytes() == alone.tobytes()


def test_progress_is_told_of_every_mask() -> None:
    masks, together = some_masks("llama", 5), evaluator_of(masks_at_once=2)
    done: list[int] = []
    list(together.evaluate_each(masks, done.append, utility=True))
    assert sum(done) == 5 * together.work(utility=True)


def test_one_mask_without_finite_answers_does_not_spoil_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, plain, together = some_masks("llama", 4)[1:], evaluator_of(), evaluator_of(masks_at_once=3)

    def broken(*_: Any) -> None:
        raise NumericalError("not finite")

    monkeypatch.setattr(evaluator, "measure_y_of_each", broken)
    for mask, found in zip(masks, together.evaluate_each(masks, utility=True), strict=True):
        assert_same(found, plain.evaluate(mask, utility=True))


def test_masks_with_different_means_are_refused_in_one_pass_but_measured() -> None:
    masks = [*some_masks("llama", 2)[1:], *some_masks("llama", 2, mean=True)[1:]]
    with pytest.raises(MaskError, match="different means"), masked_each(model_of("llama"), masks):
        pass
    plain, together = evaluator_of(), evaluator_of(masks_at_once=2)
    for mask, found in zip(masks, together.evaluate_each(masks, utility=True), strict=True):
        assert_same(found, plain.evaluate(mask, utility=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_technique_can_be_switched_off_and_changes_nothing(name: str) -> None:
    plain = evaluator_of(name, share_prefixes=False, logits_where_read=False)
    engine = evaluator_of(name, keep_bytes=1 << 30, masks_at_once=2)
    for mask, found in zip(masks := some_masks(name, 4), engine.evaluate_each(masks, utility=True), strict=True):
        assert_same(found, plain.evaluate(mask, utility=True))
