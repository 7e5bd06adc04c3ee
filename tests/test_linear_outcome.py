"""Linear outcomes learnt beside a prior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.scoring.linear_outcome import STRENGTHS, Posterior, learn

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


@given(st.integers(0, 200), st.integers(3, 40))
def test_the_mean_is_a_ridge_towards_the_prior_of_one_of_the_strengths(seed: int, masks: int) -> None:
    prior = np.random.default_rng(seed + 1).standard_normal((ITEMS, OUTCOMES))
    found, _, (removed, outcomes, offset, prior, weights) = learnt(seed, masks, 0.5, prior)
    x, rest = removed.astype(float), outcomes - offset - removed @ prior
    distances = []
    for strength in STRENGTHS:
        gram = x.T @ (weights[:, None] * x) + strength * np.eye(ITEMS)
        plain = prior + np.linalg.solve(gram, x.T @ (weights[:, None] * rest))
        distances.append(np.abs(plain - found.mean).max())
        if distances[-1] < 1e-6:
            np.testing.assert_allclose(found.root @ found.root.T, np.linalg.inv(gram), rtol=1e-4, atol=1e-8)
    assert min(distances) < 1e-6


def test_where_nothing_was_removed_the_prior_stands() -> None:
    prior = np.random.default_rng(0).standard_normal((ITEMS, OUTCOMES))
    found = learn(np.zeros((4, ITEMS), dtype=bool), np.ones((4, OUTCOMES)), np.ones(OUTCOMES), prior, np.ones(4))
    np.testing.assert_array_equal(found.mean, prior)


def test_draws_vary_as_the_posterior_says() -> None:
    found, _, _ = learnt(3, 30, 0.5)
    drawn = torch.stack([one.inward for one in found.draw(2000, np.random.default_rng(0))]).numpy()
    np.testing.assert_allclose(drawn.mean(axis=0), found.mean, atol=0.05)
    expected = np.sqrt(np.diag(found.root @ found.root.T))[:, None] * found.deviation
    np.testing.assert_allclose(drawn.std(axis=0), expected, rtol=0.1)


def test_the_truth_lies_where_the_posterior_expects_it() -> None:
    inside = []
    for seed in range(60):
        found, truth, _ = learnt(seed, 80, 0.5)
        error = np.sqrt(np.diag(found.root @ found.root.T))[:, None] * found.deviation
        inside.append(float((np.abs(truth - found.mean) < 1.96 * error).mean()))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.05)


def test_predictions_are_those_of_the_coefficients() -> None:
    found, _, (removed, *_) = learnt(1, 20, 0.1)
    (one,) = found.draw(1, np.random.default_rng(0))
    expected = removed @ one.inward.numpy() + one.offset.numpy()
    np.testing.assert_allclose(one.hidden(torch.from_numpy(removed)).numpy(), expected, rtol=1e-5, atol=1e-5)
