"""Linear outcomes learnt beside a prior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.scoring.linear_outcome import STRENGTHS, Posterior, joined, learn

ITEMS, OUTCOMES = 12, 3


def learnt(seed: int, masks: int, noise: float, prior: np.ndarray | None = None) -> tuple[Posterior, np.ndarray, tuple]:
    rng = np.random.default_rng(seed)
    truth, offset = rng.standard_normal((ITEMS, OUTCOMES)), rng.standard_normal(OUTCOMES)
    removed = rng.random((masks, ITEMS)) < 0.3
    outcomes = offset + removed @ truth + noise * rng.standard_normal((masks, OUTCOMES))
    weights = rng.uniform(0.2, 1, masks)
    prior = np.zeros_like(truth) if prior is None else prior
    return learn(removed, outcomes, offset, prior, weights), truth, (removed, outcomes, offset, prior, weights)


def test_without_noise_the_coefficients_are_found() -> None:
    found, truth, _ = learnt(0, 60, 0.0)
    np.testing.assert_allclose(found.mean, truth, atol=1e-2)
    assert (found.deviation < 1e-2).all()


@given(st.integers(0, 200), st.integers(3, 30))
def test_the_mean_is_the_ridge_towards_the_prior_that_foretells_best_what_is_left_out(seed: int, masks: int) -> None:
    prior = np.random.default_rng(seed + 1).standard_normal((ITEMS, OUTCOMES))
    found, _, (removed, outcomes, offset, prior, weights) = learnt(seed, masks, 0.5, prior)
    x, rest = removed.astype(float), outcomes - offset - removed @ prior

    def ridge(kept: np.ndarray, strength: float) -> np.ndarray:
        gram = x[kept].T @ (weights[kept, None] * x[kept]) + strength * np.eye(ITEMS)
        return np.linalg.solve(gram, x[kept].T @ (weights[kept, None] * rest[kept]))

    everything = np.arange(masks)
    values = np.linalg.svd(np.sqrt(weights)[:, None] * x, compute_uv=False)
    strengths = (values**2).mean() * STRENGTHS
    missed = []
    for strength in strengths:
        foretold = [x[one] @ ridge(everything[everything != one], strength) for one in everything]
        missed.append(float((weights[:, None] * (rest - np.array(foretold)) ** 2).sum()))
    apart = [np.abs(prior + ridge(everything, strength) - found.mean).max() for strength in strengths]
    taken = int(np.argmin(apart))
    assert apart[taken] < 1e-6
    assert missed[taken] <= min(missed) * (1 + 1e-9)
    gram = x.T @ (weights[:, None] * x) + strengths[taken] * np.eye(ITEMS)
    np.testing.assert_allclose(found.root @ found.root.T, np.linalg.inv(gram), rtol=1e-4, atol=1e-8)


def test_where_nothing_was_removed_the_prior_stands() -> None:
    prior = np.random.default_rng(0).standard_normal((ITEMS, OUTCOMES))
    found = learn(np.zeros((4, ITEMS), dtype=bool), np.ones((4, OUTCOMES)), np.ones(OUTCOMES), prior, np.ones(4))
    np.testing.assert_array_equal(found.mean, prior)


def test_draws_vary_as_the_posterior_says() -> None:
    found, _, _ = learnt(3, 30, 0.5)
    rng = np.random.default_rng(0)
    drawn = np.stack([found.draw(rng) for _ in range(2000)])
    np.testing.assert_allclose(drawn.mean(axis=0), found.mean, atol=0.05)
    expected = np.sqrt(np.diag(found.root @ found.root.T))[:, None] * found.deviation
    np.testing.assert_allclose(drawn.std(axis=0), expected, rtol=0.1)


def test_doubts_of_outcomes_go_together_as_their_residuals_do() -> None:
    rng = np.random.default_rng(0)
    removed = rng.random((60, ITEMS)) < 0.3
    shared = rng.standard_normal((60, 1)) @ np.ones((1, 2))
    outcomes = np.column_stack([shared, rng.standard_normal(60)])
    found = learn(removed, outcomes, np.zeros(3), np.zeros((ITEMS, 3)), np.ones(60))
    drawn = np.stack([found.draw(rng)[0] for _ in range(2000)])
    correlation = np.corrcoef(drawn.T)
    assert correlation[0, 1] > 0.99
    assert abs(correlation[0, 2]) < 0.5


@given(st.integers(0, 100))
def test_masks_that_do_not_count_change_nothing(seed: int) -> None:
    found, _, (removed, outcomes, offset, prior, weights) = learnt(seed, 40, 0.5)
    rng = np.random.default_rng(seed)
    more = rng.random((200, ITEMS)) < 0.5
    again = learn(
        np.concatenate([removed, more]),
        np.concatenate([outcomes, rng.standard_normal((200, OUTCOMES))]),
        offset,
        prior,
        np.concatenate([weights, np.full(200, 1e-9)]),
    )
    np.testing.assert_allclose(again.mean, found.mean, atol=1e-4)
    np.testing.assert_allclose(again.deviation, found.deviation, rtol=1e-3)


@pytest.mark.parametrize("far", [0.0, 0.5])
def test_the_truth_lies_where_the_posterior_expects_it(far: float) -> None:
    """Also where a part of the masks counts next to nothing."""
    inside = []
    for seed in range(60):
        _, truth, (removed, outcomes, offset, prior, weights) = learnt(seed, 80, 0.5)
        weights = np.where(np.random.default_rng(seed).random(80) < far, 1e-3, weights)
        found = learn(removed, outcomes, offset, prior, weights)
        error = np.sqrt(np.diag(found.root @ found.root.T))[:, None] * found.deviation
        inside.append(float((np.abs(truth - found.mean) < 1.96 * error).mean()))
    # Weights are taken for precision: where masks of little weight are no noisier, doubt is a little too large.
    assert 0.94 < np.mean(inside) < 0.99


def test_with_equal_weights_doubt_is_just_right() -> None:
    inside = []
    for seed in range(100):
        _, truth, (removed, outcomes, offset, prior, _) = learnt(seed, 80, 0.5)
        found = learn(removed, outcomes, offset, prior, np.ones(80))
        error = np.sqrt(np.diag(found.root @ found.root.T))[:, None] * found.deviation
        inside.append(float((np.abs(truth - found.mean) < 1.96 * error).mean()))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_predictions_are_those_of_the_coefficients() -> None:
    found, _, (removed, *_) = learnt(1, 20, 0.1)
    one, other = found.draw(np.random.default_rng(0)), found.mean[:, :1]
    both = joined([one, other], [found.offset, found.offset[:1]])
    expected = np.column_stack([removed @ one + found.offset, found.of(removed)[:, 0]])
    np.testing.assert_allclose(both.hidden(torch.from_numpy(removed)).numpy(), expected, rtol=1e-4, atol=1e-5)
