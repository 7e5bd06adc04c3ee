"""Attribution against finite differences and against one plain backward pass per marker or window."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from secateur.evaluation import Evaluator
from secateur.measures.answers import batch_y, measure_y, pack
from secateur.measures.disparity import Table, statistics
from secateur.measures.prompts import PromptSet, build_prompts
from secateur.measures.splits import whole
from secateur.measures.utility import NeutralText, Window, activation_means, cut
from secateur.models import LanguageModel
from secateur.scoring import Attribution
from secateur.scoring.attribution import (
    CONFIDENCE,
    DisparityGradient,
    Effects,
    LossChange,
    disparity,
    disparity_gradient,
    disparity_weights,
    loss_change,
)
from secateur.suites import Suite
from secateur.units import ActivationMeans, Gates, Mask, UnitSpace, gated, masked

TEXT = "A lighthouse is a tower built to carry a bright lamp above the sea. " * 3
SUITE = Suite.model_validate(
    {
        "name": "small",
        "attribute": "any",
        "groups": {"men": ["he", "him", "sir"], "women": ["she", "her", "miss"], "none": ["they", "one", "it"]},
        "scenarios": [
            {
                "id": "go",
                "measure": {"kind": "preference", "a": [" yes", " y"], "b": [" no"]},
                "paraphrases": [{"prompt": "May {marker} go?"}, {"prompt": "Will {marker} go?"}],
            },
            {
                "id": "pay",
                "measure": {"kind": "quantity", "values": [1, 5, 10]},
                "paraphrases": [{"prompt": "Pay {marker}", "reply": "$"}],
            },
        ],
    }
)


@cache
def model_of(name: str = "llama") -> LanguageModel:
    return tiny_model(name)


@cache
def prompts_of(name: str = "llama") -> PromptSet:
    return build_prompts(model_of(name), SUITE, whole(SUITE))


@cache
def text_of(name: str = "llama") -> NeutralText:
    return cut(model_of(name), TEXT, window=50, stride=30)


def fit_of(name: str = "llama", batch_size: int = 5) -> Evaluator:
    return Evaluator(model_of(name), prompts_of(name), text_of(name), batch_size)


@cache
def means_of(name: str = "llama") -> ActivationMeans:
    return activation_means(model_of(name), text_of(name))


def some_mask(model: LanguageModel, means: ActivationMeans | None = None) -> Mask:
    return Mask.removing(model, [1, 9, 20, 70], means)


def table_of(fit: Evaluator) -> Table:
    y = measure_y(fit.model, fit.prompts, fit.batches).numpy().astype(float)
    return Table(fit.prompts.table(y), fit.prompts.groups)


def disparity_with(fit: Evaluator, unit: int, value: float, means: ActivationMeans | None) -> float:
    gates = Gates.ones(fit.model, means=means)
    with torch.no_grad():
        for leaf in gates.leaves():
            if 0 <= unit < len(leaf):
                leaf[unit] = value
            unit -= len(leaf)
    with gated(fit.model, gates):
        return disparity(table_of(fit))


def slope_of(fit: Evaluator, unit: int, means: ActivationMeans | None) -> float:
    """dD/dm of one unit at m = 1 by central differences of fourth order."""
    step = 0.02
    near, far = (
        disparity_with(fit, unit, 1 + h, means) - disparity_with(fit, unit, 1 - h, means) for h in (step, 2 * step)
    )
    return (8 * near - far) / (12 * step)


CASES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("pruned", "mean"), CASES)
def test_effects_equal_finite_differences_of_the_disparity(pruned: bool, mean: bool) -> None:
    fit = fit_of()
    means = means_of() if mean else None
    mask = some_mask(fit.model, means) if pruned else None
    effect = Attribution().score(fit, mask, means).effect
    strong = np.flatnonzero(np.abs(effect) > 0.1 * np.abs(effect).max())
    with masked(fit.model, mask):
        for unit in np.random.default_rng(0).choice(strong, size=20, replace=False):
            # Switching off lowers the gate, so the effect is minus the slope.
            assert effect[unit] == pytest.approx(-slope_of(fit, unit, means), rel=1e-2)


def test_removed_units_have_no_effect_left() -> None:
    fit = fit_of()
    mask = some_mask(fit.model)
    scores = Attribution().score(fit, mask)
    np.testing.assert_array_equal(scores.effect[mask.removed], 0)
    assert np.count_nonzero(scores.effect) > 0.9 * len(scores.effect)


@given(seed=st.integers(0, 10_000), n_groups=st.integers(2, 4))
def test_disparity_weights_are_the_derivative(seed: int, n_groups: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n_groups), rng.integers(2, 6, size=n_groups)))
    y = rng.normal(size=(3, len(groups))) + groups
    direction, step = rng.normal(size=y.shape), 1e-6
    above, below = (disparity(Table(y + sign * step * direction, groups)) for sign in (1, -1))
    slope = float((disparity_weights(Table(y, groups)) * direction).sum())
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("n_groups", [2, 5])
def test_disparity_is_the_root_of_the_mean_square(n_groups: int) -> None:
    rng = np.random.default_rng(0)
    table = Table(rng.normal(size=(4, 5 * n_groups)), np.repeat(np.arange(n_groups), 5))
    assert disparity(table) == pytest.approx(np.sqrt(statistics(table)["square"].mean()))


def test_disparity_of_constant_answers_has_finite_weights() -> None:
    table = Table(np.ones((2, 6)), np.repeat([0, 1], 3))
    assert np.isfinite(disparity_weights(table)).all()


def lonely_positions(fit: Evaluator) -> list[torch.Tensor]:
    """Per batch of packed trees, the positions through which one prompt of the set passes, from the texts."""
    found = []
    for batch in fit.batches:
        visible = batch.layout.attention_mask[0, 0] == 0
        paths = [tuple(batch.layout.input_ids[0, row].tolist()) for row in visible]
        passing = [
            sum(any((*p.context, *a[:-1])[: len(path)] == path for a in p.answers) for p in fit.prompts.prompts)
            for path in paths
        ]
        found.append(torch.tensor(passing) == 1)
    return found


def backward_by_marker(fit: Evaluator, weights: np.ndarray, lonely: list[torch.Tensor]) -> np.ndarray:
    """Gradients (markers, units) at lonely positions, one backward pass per batch and marker."""
    rows = []
    for marker in fit.prompts.markers:
        own = torch.tensor([w if p.marker == marker else 0 for w, p in zip(weights, fit.prompts.prompts, strict=True)])
        parts, start = [], 0
        for batch, alone in zip(fit.batches, lonely, strict=True):
            gates = Gates.ones(fit.model, tuple(batch.layout.input_ids.shape))
            stop = start + len(batch.prompts)
            with gated(fit.model, gates):
                (batch_y(fit.model, fit.prompts.suite, batch) * own[start:stop]).sum().backward()
            start = stop
            parts.append(torch.cat([gate.grad[0, alone].sum(0) for gate in gates.leaves()]))  # type: ignore[index]
        rows.append(torch.stack(parts).sum(0).double().numpy())
    return np.stack(rows)


def spread_of(parts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Standard error of the sum of parts (markers, units): each group's parts are a sample."""
    variances = [(groups == g).sum() * parts[groups == g].var(axis=0, ddof=1) for g in np.unique(groups)]
    return np.asarray(np.sqrt(np.sum(variances, axis=0)))


def weights_of(fit: Evaluator) -> np.ndarray:
    return fit.prompts.spread(disparity_weights(table_of(fit)))


def gradient_of(fit: Evaluator) -> DisparityGradient:
    return disparity_gradient(fit, weights_of(fit))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_error_equals_one_backward_pass_per_marker(batch_size: int) -> None:
    fit = fit_of(batch_size=batch_size)
    lonely = lonely_positions(fit)
    assert any(bool((~alone).any()) for alone in lonely), "the test needs shared positions"
    expected = spread_of(backward_by_marker(fit, weights_of(fit), lonely), fit.prompts.groups)
    np.testing.assert_allclose(gradient_of(fit).error, expected, rtol=1e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize("batch_size", [1, 5])
def test_error_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    expected = gradient_of(fit_of(batch_size=64)).error
    np.testing.assert_allclose(
        gradient_of(fit_of(batch_size=batch_size)).error, expected, rtol=1e-3, atol=1e-5 * expected.max()
    )


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_gradient_equals_one_backward_pass_over_all_prompts(name: str, batch_size: int) -> None:
    fit = fit_of(name, batch_size)
    weights = torch.from_numpy(weights_of(fit)).float()
    gates = Gates.ones(fit.model)
    whole_batch = pack(fit.model, fit.prompts)
    with gated(fit.model, gates):
        (torch.cat([batch_y(fit.model, SUITE, batch) for batch in whole_batch]) @ weights).backward()
    expected = torch.cat([gate.grad for gate in gates.leaves()]).numpy()  # type: ignore[misc]
    np.testing.assert_allclose(gradient_of(fit).value, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def plain_loss(model: LanguageModel, window: Window, gates: Gates) -> torch.Tensor:
    """Loss of a window from the transformers model's own logits."""
    with gated(model, gates):
        logits = model.model(window.tokens[None], use_cache=False).logits[0]
    scored = logits[window.start - 1 : -1].log_softmax(-1)
    return -scored.gather(1, window.tokens[window.start :, None]).sum()


def joined(gradients: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.cat(list(gradients), dim=-1).numpy().astype(float)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "opt"])
@pytest.mark.parametrize("mean", [False, True])
def test_loss_change_equals_a_backward_pass_per_window(name: str, mean: bool) -> None:
    model, text = model_of(name), text_of(name)
    means = means_of(name) if mean else None
    slope, square = np.zeros(len(UnitSpace.of(model))), np.zeros(len(UnitSpace.of(model)))
    assert len(text.windows) > 3
    for window in text.windows:
        shared = Gates.ones(model, means=means)
        slope -= joined(torch.autograd.grad(plain_loss(model, window, shared), shared.leaves()))
        apart = Gates.ones(model, (1, len(window.tokens)), means)
        by_position = joined(torch.autograd.grad(plain_loss(model, window, apart), apart.leaves()))[0]
        square += (by_position**2).sum(axis=0)
    tokens = len(model.tokenizer(TEXT)["input_ids"]) - 1
    change = loss_change(model, text, means)
    np.testing.assert_allclose(change.slope, slope / tokens, rtol=1e-3, atol=1e-4 * np.abs(slope / tokens).max())
    np.testing.assert_allclose(change.curvature, square / tokens / 2, rtol=2e-3, atol=1e-5 * square.max() / tokens)


def test_half_of_a_predicted_fall_of_the_loss_is_counted_on() -> None:
    change = LossChange(slope=np.array([2.0, -2.0, -2.0]), curvature=np.array([1.0, 3.0, 0.5]))
    np.testing.assert_allclose(change.cost, [3.0, 2.0, 0.0])


def test_scores_weigh_gain_against_cost() -> None:
    scores = Effects(
        effect=np.array([-3.0, -3.0, 1.0]),
        error=np.array([0.0, 1.0, 0.0]),
        cost=np.array([2.0, 1.0, 4.0]),
        damage=np.ones(3),
    )
    np.testing.assert_allclose(scores.gain, [3, 3 - CONFIDENCE, -1])
    np.testing.assert_allclose(scores.rank, [1.5, 3 - CONFIDENCE, -0.25])


def test_cost_is_priced_estimated_once_and_positive() -> None:
    fit = fit_of()
    attribution = Attribution(unit_price=0.5)
    first = attribution.score(fit)
    change = loss_change(fit.model, text_of())
    np.testing.assert_allclose(first.cost, change.cost + 0.5)
    np.testing.assert_allclose(first.damage, change.curvature + 0.5)
    with_mask = attribution.score(fit, some_mask(fit.model))
    np.testing.assert_array_equal(with_mask.cost, first.cost)
    assert not np.allclose(with_mask.effect, first.effect)
    assert (Attribution().score(fit).cost > 0).all()


def test_work_is_what_is_reported() -> None:
    fit, attribution = fit_of(), Attribution()
    for _ in range(2):  # the second call knows the cost
        announced = attribution.work(fit)
        done: list[int] = []
        attribution.score(fit, advance=done.append)
        assert sum(done) == announced


def test_scoring_leaves_the_model_as_it_was() -> None:
    fit = fit_of()
    before = table_of(fit).y
    Attribution().score(fit, some_mask(fit.model), means_of())
    np.testing.assert_array_equal(table_of(fit).y, before)
    assert all(parameter.grad is None for parameter in fit.model.model.parameters())
    assert not any(module._forward_pre_hooks for module in fit.model.model.modules())
