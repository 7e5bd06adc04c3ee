"""Surrogates, chains and attention-pruning: against known functions, plain loops and plain measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import SUITE, fit_of, means_of, model_of, some_mask
from tiny import HEADS, LAYERS, tiny_model
from torch import Tensor

from secateur.errors import SettingError
from secateur.evaluation import Evaluator
from secateur.measures.prompts import PromptDraw
from secateur.scoring.attribution import disparity
from secateur.scoring.sampled_masks import SampledMasks
from secateur.scoring.surrogate import Quality, Surrogate, _fit, draw_states, train
from secateur.search.attention_pruning import SurrogateAnnealing, best_states
from secateur.search.base import Outcome, Problem
from secateur.search.chains import WALK_STEPS, Annealed, Energy, _temperature, anneal
from secateur.search.methods import method
from secateur.units import Mask

UNITS = LAYERS * HEADS


def linear(weights: Tensor) -> Surrogate:
    """A surrogate that is exactly removed @ weights: relu(x) - relu(-x) = x."""
    inward = torch.stack([weights, -weights], dim=1)
    return Surrogate(inward, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.0, Quality(1, 1, 0))


def random_surrogate(seed: int, units: int = 12, width: int = 5) -> Surrogate:
    draw = torch.Generator().manual_seed(seed)
    return Surrogate(
        torch.randn(units, width, generator=draw),
        torch.randn(width, generator=draw),
        torch.randn(width, generator=draw),
        0.5,
        Quality(1, 1, 0),
    )


# Surrogates


def test_a_surrogate_learns_an_additive_function_and_tells_its_quality() -> None:
    rng = np.random.default_rng(0)
    removed = rng.random((400, 12)) < 0.3
    measured = removed @ rng.normal(size=12) + 5
    learnt = train(removed, measured)
    assert learnt.quality.masks == 80
    assert learnt.quality.r2 > 0.9
    assert learnt.quality.spearman > 0.9
    shuffled = train(removed, rng.permutation(measured))
    assert shuffled.quality.r2 < 0.1
    assert abs(shuffled.quality.spearman) < 0.3


def test_quality_is_told_by_masks_that_training_has_not_seen() -> None:
    rng = np.random.default_rng(1)
    removed, measured = rng.random((50, 6)) < 0.5, rng.normal(size=50)
    held = np.random.default_rng(3).permutation(50)[:10]
    changed = measured.copy()
    changed[held] += 100
    one, other = train(removed, measured, seed=3), train(removed, changed, seed=3)
    kept = np.setdiff1d(np.arange(50), held)
    alone = [
        _fit(torch.from_numpy(removed[kept]).float(), torch.from_numpy(y[kept]).float(), 3, 64, 400)
        for y in (measured, changed)
    ]
    for whole, part, y in zip((one, other), alone, (measured, changed), strict=True):
        predicted = part.predict(torch.from_numpy(removed[held])).numpy()
        assert whole.quality.r2 == pytest.approx(1 - ((predicted - y[held]) ** 2).mean() / y[held].var(), rel=1e-3)


def test_what_was_held_out_to_tell_the_quality_is_learnt_in_the_end() -> None:
    removed, held = np.eye(40) > 0, np.random.default_rng(3).permutation(40)[:8]
    measured = np.zeros(40)
    measured[held] = 1  # seen in no other mask
    predicted = train(removed, measured, seed=3).predict(torch.eye(40)).numpy()
    assert predicted[held].min() > 0.9
    assert np.delete(predicted, held).max() < 0.1


def test_a_constant_has_no_quality_to_tell() -> None:
    learnt = train(np.eye(20) > 0, np.full(20, 3.0))
    assert math.isnan(learnt.quality.r2)
    assert math.isnan(learnt.quality.spearman)
    torch.testing.assert_close(learnt.predict(torch.zeros(1, 20)), torch.tensor([3.0]), atol=1e-3, rtol=0)


def test_training_is_determined_by_its_seed() -> None:
    rng = np.random.default_rng(0)
    removed, measured = rng.random((40, 6)) < 0.5, rng.normal(size=40)
    torch.testing.assert_close(train(removed, measured, 1).inward, train(removed, measured, 1).inward, rtol=0, atol=0)
    assert not torch.equal(train(removed, measured, 1).inward, train(removed, measured, 2).inward)


@settings(max_examples=30)
@given(units=st.integers(1, 20), data=st.data())
def test_drawn_states_keep_to_their_bounds(units: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, units))
    most = data.draw(st.integers(least, units))
    states = draw_states(units, (least, most), 50, torch.Generator().manual_seed(0))
    sizes = states.sum(dim=1)
    assert states.shape == (50, units)
    assert least <= int(sizes.min()) <= int(sizes.max()) <= most


def test_all_counts_and_units_are_drawn() -> None:
    states = draw_states(6, (1, 4), 2000, torch.Generator().manual_seed(0))
    counts = torch.bincount(states.sum(dim=1))[1:]
    assert (counts - 500).abs().max() < 100
    by_unit = states.sum(dim=0)
    assert (by_unit - by_unit.float().mean()).abs().max() < 150


# Chains


def test_chains_find_the_least_of_a_linear_energy() -> None:
    weights = torch.randn(12, generator=torch.Generator().manual_seed(0))
    found = anneal(Energy([linear(weights)], [1.0]), 12, (0, 12), chains=20, steps=2000, cooling="geometric")
    assert float(found.energy.min()) == pytest.approx(float(weights.clamp(max=0).sum()), rel=1e-5)
    best = found.removed[found.energy.argmin()]
    assert torch.equal(best, weights < 0)


@pytest.mark.parametrize("cooling", ["logarithmic", "geometric"])
@pytest.mark.parametrize("bounds", [(2, 4), (3, 3), (0, 12)])
def test_chains_keep_to_the_bounds_and_their_energies_are_those_of_their_states(
    bounds: tuple[int, int], cooling: str
) -> None:
    energy = Energy([random_surrogate(0), random_surrogate(1)], [0.3, 0.7])
    found = anneal(energy, 12, bounds, chains=40, steps=1200, cooling=cooling)  # type: ignore[arg-type]
    sizes = found.removed.sum(dim=1)
    assert bounds[0] <= int(sizes.min()) <= int(sizes.max()) <= bounds[1]
    torch.testing.assert_close(found.energy, energy.of(found.removed))


def test_chains_with_room_to_move_do_better_than_where_they_start() -> None:
    energy, start = Energy([random_surrogate(0)], [1.0]), draw_states(12, (1, 6), 30, torch.Generator().manual_seed(5))
    found = anneal(energy, 12, (1, 6), steps=300, start=start)
    assert (found.energy <= energy.of(start) + 1e-6).all()
    assert (found.energy < energy.of(start) - 1e-3).any()
    assert 0 < found.accepted < 1


@given(st.integers(0, 1000))
def test_a_flip_changes_the_hidden_layer_as_a_whole_pass_would(seed: int) -> None:
    energy = Energy([random_surrogate(seed), random_surrogate(seed + 1)], [1.0, 2.0])
    draw = torch.Generator().manual_seed(seed)
    state, unit = draw_states(12, (1, 11), 7, draw), torch.randint(12, (7,), generator=draw)
    sign = 1 - 2 * state[torch.arange(7), unit].long()
    flipped = state.clone()
    flipped[torch.arange(7), unit] ^= True
    after = energy.flipped(energy.hidden(state), unit, sign.float())
    torch.testing.assert_close(energy.read(after), energy.of(flipped), rtol=1e-4, atol=1e-4)


def test_annealing_is_determined_by_its_seed() -> None:
    energy = Energy([random_surrogate(0)], [1.0])
    runs = [anneal(energy, 12, (1, 6), chains=9, steps=200, seed=seed) for seed in (4, 4, 5)]
    assert torch.equal(runs[0].removed, runs[1].removed)
    assert not torch.equal(runs[0].removed, runs[2].removed)


def test_the_start_accepts_the_asked_share_of_rises() -> None:
    weights = torch.ones(12)  # every removal raises the energy by 1
    found = anneal(Energy([linear(weights)], [1.0]), 12, (0, 12), chains=50, steps=1, acceptance=0.75)
    assert math.exp(-1 / found.start_temperature) == pytest.approx(0.75, rel=1e-5)


class Recording(Energy):
    """Remembers how many units were removed whenever it was read."""

    def __init__(self) -> None:
        one = Surrogate(torch.ones(12, 1), torch.zeros(1), torch.ones(1), 0.0, Quality(1.0, 1.0, 1))
        super().__init__([one], [1.0])
        object.__setattr__(self, "counts", [])

    def read(self, hidden: Sequence[Tensor]) -> Tensor:
        self.counts.append(hidden[0][:, 0].clone())
        return super().read(hidden)


def test_chains_begin_where_they_are_told_to_after_the_walk_that_sets_their_temperature() -> None:
    start, energy = torch.zeros(50, 12, dtype=torch.bool), Recording()
    anneal(energy, 12, (0, 12), steps=1, start=start, seed=3)
    first = energy.counts[2 + WALK_STEPS]  # after the start and the steps of the walk, and the start again
    assert (energy.counts[WALK_STEPS] > 1).any()
    assert (first == 1).all()


def test_temperatures_fall_as_they_should() -> None:
    logarithmic = [_temperature(2.0, step, 100, "logarithmic") for step in range(100)]
    assert logarithmic[0] == pytest.approx(2 / math.log(2))
    assert logarithmic[9] == pytest.approx(2 / math.log(11))
    geometric = [_temperature(2.0, step, 100, "geometric") for step in range(100)]
    assert (geometric[0], geometric[-1]) == (2.0, pytest.approx(0.002))
    ratios = [after / before for before, after in pairwise(geometric)]
    assert max(ratios) == pytest.approx(min(ratios))


def test_an_energy_without_rises_does_not_stop_the_chains() -> None:
    found = anneal(Energy([linear(torch.zeros(4))], [1.0]), 4, (1, 2), chains=3, steps=10)
    assert torch.equal(found.energy, torch.zeros(3))


# Attention-pruning

SMALL = SampledMasks(evaluations=12, most=3, markers=2, windows=1, window_tokens=60)


@pytest.mark.parametrize(("pruned", "mean"), [(False, False), (True, False), (False, True)])
def test_sampled_masks_are_measured_as_plain_evaluations_do(pruned: bool, mean: bool) -> None:
    fit, means = fit_of(), means_of("llama") if mean else None
    mask = some_mask(fit.model) if pruned else None
    scores = SMALL.score(fit, mask, means)
    prompts = PromptDraw.stratified(fit.prompts, 2, None, 0).of(fit.prompts)
    assert prompts.scenarios == fit.prompts.scenarios
    assert fit.text is not None
    plain = Evaluator(fit.model, prompts, fit.text.first(1, 60))
    for removed, bias, log_perplexity in zip(scores.removed, scores.bias, scores.log_perplexity, strict=True):
        alone = Mask.removing(fit.model, np.flatnonzero(removed), means)
        both = alone if mask is None else mask & alone
        assert bias == pytest.approx(disparity(plain.evaluate(both).table), rel=1e-3)
        assert log_perplexity == pytest.approx(math.log(plain.perplexity(both)), rel=1e-4)
    assert scores.removed.shape == (12, UNITS)
    assert (scores.removed.sum(axis=1) <= 3).all()
    assert np.isnan(scores.rank[UNITS:]).all()
    assert np.isfinite(scores.rank[:UNITS]).all()
    assert "trained on the others alone" in scores.notes[0]
    assert scores.unpruned_bias == pytest.approx(disparity(plain.evaluate(mask).table), rel=1e-3)
    assert scores.unpruned_log_perplexity == pytest.approx(math.log(plain.perplexity(mask)), rel=1e-4)


def test_work_is_what_is_reported() -> None:
    fit, done = fit_of(), []
    SMALL.score(fit, advance=done.append)
    assert sum(done) == SMALL.work(fit)


@pytest.mark.parametrize("options", [{"least": 5, "most": 4}, {"least": 3, "most": 3}, {"most": UNITS + 1}])
def test_bounds_that_nothing_keeps_to_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=r"^attention-pruning: no mask of 8 heads removes at least"):
        method("attention-pruning", options).check(model_of(), SUITE)


def test_the_best_distinct_states_are_proposed_in_the_order_of_their_energy() -> None:
    removed = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]]).bool()
    found = Annealed(removed, torch.tensor([0.2, 0.5, 0.2, 0.1]), 1.0, 0.5)
    assert best_states(found, 2) == [(1, 2), (0,)]
    assert best_states(found, 9) == [(1, 2), (0,), (1,)]


def test_proposals_keep_to_the_bounds_and_come_once() -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda *_: nullcontext(lambda done: None))
    search = SurrogateAnnealing(chains=20, steps=50, finalists=3, proposed=3)
    proposals = search.proposals(problem, SMALL)
    found = [next(proposals)]
    with suppress(StopIteration):
        while True:
            found.append(proposals.send(Outcome(0.1, 0.0, True)))
    masks = [tuple(sorted(selection.removed.tolist())) for selection in found]
    assert 3 <= len(masks) == len(set(masks)) <= 12
    assert all(1 <= len(mask) <= 3 and max(mask) < UNITS for mask in masks)
    assert {selection.knobs["epsilon"] for selection in found} <= {0.1, 0.25, 0.5, 0.75}
    assert problem.localise_tokens > 0


def test_a_model_of_few_heads_leaves_annealing_room_to_flip_one() -> None:
    assert SampledMasks().bounds(tiny_model()) == (1, 2)
    assert SampledMasks(least=2).bounds(tiny_model()) == (2, 3)


def test_of_the_finalists_those_go_on_that_measure_best_and_search_is_what_is_forwarded() -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda *_: nullcontext(lambda done: None))
    search = SurrogateAnnealing(epsilon=0.9, chains=20, steps=50, finalists=4, proposed=2)
    before = fit.model.usage.forward
    found = list(search.proposals(problem, SMALL))
    assert problem.localise_tokens == fit.model.usage.forward - before
    scores = SMALL.score(fit)
    every = SurrogateAnnealing(epsilon=0.9, chains=20, steps=50, finalists=4, proposed=4)
    others = [one.removed for one in every.proposals(problem, SMALL)]
    bias, log_perplexity = SMALL.measure(fit, [problem.mask(removed) for removed in others])
    energy = 0.9 * bias / scores.bias.std() + 0.1 * log_perplexity / scores.log_perplexity.std()
    best = [others[number].tolist() for number in np.argsort(energy)[:2]]
    assert [one.removed.tolist() for one in found] == best


def test_a_front_is_of_all_that_was_measured() -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda *_: nullcontext(lambda done: None), limit=10.0)
    options = {"chains": 20, "steps": 50, "finalists": 3}
    found = list(SurrogateAnnealing(**options, front=9).proposals(problem, SMALL))
    annealed = SurrogateAnnealing(**options, proposed=3).proposals(problem, SMALL)
    scores = SMALL.score(fit)
    states = {tuple(one.removed.tolist()) for one in annealed} | {tuple(np.flatnonzero(s)) for s in scores.removed}
    bias, log_perplexity = SMALL.measure(fit, [problem.mask(state) for state in states])
    points = np.column_stack([bias, np.maximum(0, log_perplexity - scores.unpruned_log_perplexity)])
    front = {state for state, one in zip(states, points, strict=True) if not any((points < one).all(axis=1))}
    assert 1 <= len(found) <= 9
    assert {tuple(one.removed.tolist()) for one in found} <= front
    told = [one.knobs["fit_bias"] for one in found]
    assert told == sorted(told)
    assert told[0] == pytest.approx(bias[points[:, 1] < 5 * problem.log_limit].min(), abs=1e-4)


def test_the_bar_counts_masks_and_says_the_best_so_far() -> None:
    fit, steps, said = fit_of(), [], []

    def step(name: str, total: int) -> Any:
        done: list[int] = []
        steps.append((name, total, done))
        return nullcontext(done.append)

    problem = Problem(fit.model, fit, [fit], step, limit=10.0, status=said.append)
    list(SurrogateAnnealing(epsilon=0.9, chains=20, steps=50, finalists=3).proposals(problem, SMALL))
    (_, sampled, first), _, (_, finalists, last) = steps
    assert (sampled, finalists) == (13, 3)
    assert (sum(first), sum(last)) == (13, 3)
    assert len(said) == 12 + 3
    scores = SMALL.score(fit)
    bias, cost = min(zip(scores.bias, scores.log_perplexity - scores.unpruned_log_perplexity, strict=True))
    assert said[11] == f"best so far D {bias:.2f} at {math.expm1(cost):+.1%}"


def test_the_best_so_far_keeps_to_the_limit_where_a_mask_does() -> None:
    fit, said = fit_of(), []
    problem = Problem(fit.model, fit, [fit], lambda *_: nullcontext(lambda done: None), status=said.append)
    for bias, increase in ((0.5, 0.3), (0.9, 0.01), (0.7, 0.01), (0.1, 0.1)):
        problem.saw(bias, increase)
    assert [words.split()[4] for words in said] == ["0.50", "0.90", "0.70", "0.70"]


def test_finalists_without_finite_answers_are_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda *_: nullcontext(lambda done: None))
    search = SurrogateAnnealing(epsilon=0.9, chains=20, steps=50, finalists=3, proposed=3)
    measure = SampledMasks.measure

    def some(self: SampledMasks, fit: Evaluator, masks: Sequence[Mask], *rest: Any) -> tuple[np.ndarray, np.ndarray]:
        bias, log_perplexity = measure(self, fit, masks, *rest)
        if len(masks) <= 3:
            bias[0] = np.nan
        return bias, log_perplexity

    whole = [one.removed.tolist() for one in search.proposals(problem, SMALL)]
    monkeypatch.setattr(SampledMasks, "measure", some)
    assert len(list(search.proposals(problem, SMALL))) == len(whole) - 1
