"""Removing heads one by one against plain masked measurements, and the selection on the published scores."""

from __future__ import annotations

import csv
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import SUITE, fit_of, means_of, model_of, prompts_of, some_mask, text_of
from tiny import HEADS, LAYERS, NAMES, prompts, tiny_model

from secateur.errors import NumericalError, SettingError
from secateur.evaluation import Evaluator
from secateur.evaluation.store import Store
from secateur.measures.disparity import Table
from secateur.models.restart import Entries, recorded, restarted
from secateur.scoring.attribution import disparity
from secateur.scoring.fasp import Fasp, HeadRemovals, reliability
from secateur.search.base import Outcome, Problem
from secateur.search.protected import Protected, protected_selection
from secateur.units import Mask, UnitSpace, masked

DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).parents[2] / "shared" / "data")) / "fasp-reference"
ALL = Fasp(seeds=1, markers=3, scenarios=50, windows=50)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_restarted_pass_equals_the_whole_pass(name: str) -> None:
    model = tiny_model(name)
    ids = prompts(model)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0

    def run() -> torch.Tensor:
        return model.hidden(ids, None, mask)[mask == 1]

    entries = Entries()
    with recorded(model, entries):
        before = run()
    for head in range(LAYERS * HEADS):
        removed = Mask.removing(model, [head])
        with masked(model, removed):
            expected = run()
        with restarted(model, head // HEADS, entries), masked(model, removed):
            found = run()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (found - before).abs().max() > 1e-3, "a head that changes nothing tests nothing"
    torch.testing.assert_close(run(), before, rtol=0, atol=0)


def test_a_restarted_pass_runs_the_later_blocks_alone_and_counts_its_share() -> None:
    model, calls = tiny_model(), []
    ids = prompts(model)
    entries = Entries()
    with recorded(model, entries):
        model.hidden(ids, None, None)
    handles = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in model.attention_outputs]
    before = model.usage.forward
    with restarted(model, 1, entries):
        model.hidden(ids, None, None)
    assert calls == model.attention_outputs[1:]
    assert model.usage.forward - before == ids.numel() * (LAYERS - 1) // LAYERS
    for handle in handles:
        handle.remove()


def test_the_model_is_restored_after_an_error() -> None:
    model = tiny_model()
    forwards = [block.forward for block in model.blocks]
    entries = Entries()
    with recorded(model, entries):
        model.hidden(prompts(model), None, None)
    with pytest.raises(RuntimeError), restarted(model, 1, entries):
        raise RuntimeError
    assert [block.forward for block in model.blocks] == forwards
    assert not any("forward" in block.__dict__ for block in model.blocks)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_plain_measurements_without_each_head(name: str) -> None:
    check_against_plain(name, None, False)


@pytest.mark.parametrize(("pruned", "mean"), [(True, False), (False, True), (True, True)])
def test_scores_of_pruned_models_and_mean_ablation(pruned: bool, mean: bool) -> None:
    check_against_plain("llama", some_mask(model_of(), means_of() if mean else None) if pruned else None, mean)


def check_against_plain(name: str, mask: Mask | None, mean: bool) -> None:
    fit = fit_of(name, batch_size=7)
    model, means = fit.model, means_of(name) if mean else None
    scores = ALL.score(fit, mask, means)
    plain = Evaluator(model, prompts_of(name), text_of(name))

    def check(removed: Mask | None, bias: float, loss: float) -> None:
        measured = plain.evaluate(removed, utility=True)
        assert bias == pytest.approx(disparity(measured.table), rel=2e-3, abs=1e-4)
        assert loss == pytest.approx(np.log(plain.perplexity(removed)), abs=1e-4)

    check(mask, scores.unpruned_bias[0], scores.unpruned_log_perplexity[0])
    for head in range(LAYERS * HEADS):
        alone = Mask.removing(model, [head], means)
        check(alone if mask is None else alone & mask, scores.mean_bias[head], scores.mean_log_perplexity[head])
    assert np.isnan(scores.rank[LAYERS * HEADS :]).all()
    assert not np.isnan(scores.rank[: LAYERS * HEADS]).any()


def test_each_seed_measures_its_own_draw() -> None:
    fit, scorer = fit_of(), Fasp(seeds=3, markers=2, scenarios=1, windows=2)
    scores = scorer.score(fit)
    for seed, (draw, windows) in enumerate(zip(scorer.prompt_draws(fit), scorer.window_draws(fit), strict=True)):
        assert [sum(m // 3 == group for m in draw.markers) for group in range(3)] == [2, 2, 2]
        part = draw.of(fit.prompts)
        assert tuple(part.scenarios) == draw.scenarios
        assert len(part.scenarios) == 1 < len(fit.prompts.scenarios)
        asked = [prompt for prompt in fit.prompts.prompts if prompt.scenario in draw.scenarios]
        assert len(part) == len(asked) * 2 // 3
        y = fit.evaluate().table.y[np.array(draw.scenarios)][:, np.array(draw.markers)]
        groups = np.array([marker // 3 for marker in draw.markers])
        expected = disparity(Table(y, groups))
        assert scores.unpruned_bias[seed] == pytest.approx(expected, rel=1e-3)
        nll, text = fit.evaluate(utility=True).nll, text_of()
        assert nll is not None
        loss = sum(nll[n] for n in windows) / sum(text.windows[n].scored for n in windows)
        assert scores.unpruned_log_perplexity[seed] == pytest.approx(loss, rel=1e-4)
    assert len(set(scores.unpruned_bias)) > 1
    again = scorer.score(fit)
    np.testing.assert_array_equal(scores.bias, again.bias)


@pytest.mark.parametrize(
    "scorer", [Fasp(), Fasp(seeds=2, markers=3, scenarios=50, windows=50), Fasp(seeds=1, markers=2)]
)
def test_work_is_what_is_reported(scorer: Fasp) -> None:
    fit = fit_of()
    done: list[int] = []
    scorer.score(fit, advance=done.append)
    assert sum(done) == scorer.work(fit)


def test_scoring_costs_about_half_of_plain_passes() -> None:
    fit = replace(fit_of(), walk_bytes=1 << 30)
    before = fit.model.usage.forward
    ALL.score(fit)
    spent = fit.model.usage.forward - before
    tokens = sum(batch.tokens for batch in fit.batches) + sum(len(window.tokens) for window in text_of().windows)
    by_layer = sum(HEADS * (LAYERS - layer) / LAYERS for layer in range(LAYERS))
    assert spent == pytest.approx(tokens * (1 + by_layer), rel=2e-3)  # tokens of every pass are rounded


def test_every_window_is_read_once_and_so_are_equal_draws_of_prompts() -> None:
    fit = fit_of()
    same_prompts = Fasp(seeds=3, markers=3, scenarios=50, windows=2)
    (windows,) = same_prompts.draws(fit).values()
    assert sorted(windows) == sorted(set().union(*same_prompts.window_draws(fit)))
    same_windows = Fasp(seeds=3, markers=2, scenarios=1, windows=50)
    read = [number for windows in same_windows.draws(fit).values() for number in windows]
    assert sorted(read) == list(range(len(text_of().windows)))


def test_what_is_stored_is_not_measured_again(tmp_path: Path) -> None:
    model, scorer = model_of(), Fasp(seeds=2, markers=2, scenarios=1)
    with Store(tmp_path / "measured.sqlite", model.fingerprint) as store:
        first = scorer.score(replace(fit_of(), store=store))
        before = model.usage.forward
        again = scorer.score(replace(fit_of(), store=store))
        assert model.usage.forward == before
    np.testing.assert_array_equal(first.bias, again.bias)
    np.testing.assert_array_equal(first.log_perplexity, again.log_perplexity)


def test_a_head_without_which_nothing_is_finite_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Evaluator.evaluate

    def evaluate(self: Evaluator, mask: Any = None, *rest: Any, **named: Any) -> Any:
        if 3 in mask.removed:
            raise NumericalError("not finite")
        return real(self, mask, *rest, **named)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    rank = ALL.score(fit_of()).rank
    assert np.flatnonzero(np.isnan(rank[: LAYERS * HEADS])).tolist() == [3]


def test_a_search_is_told_of_the_best_so_far() -> None:
    fit, said = fit_of(), list[str]()
    problem = Problem(fit.model, fit, [fit], lambda *_: nullcontext(lambda done: None), limit=9.0, status=said.append)
    scores = problem.score(ALL)
    assert len(said) == ALL.work(fit) == 1 + LAYERS * HEADS
    least = min(float(np.nanmin(scores.mean_bias)), float(scores.unpruned_bias[0]))
    assert said[-1].startswith(f"best so far D {least:.2f} at ")


def test_reliability_is_that_of_the_spearman_brown_formula() -> None:
    rng = np.random.default_rng(0)
    by_seed = rng.normal(size=400) + rng.normal(size=(3, 400))
    correlations = [np.corrcoef(by_seed[i], by_seed[j])[0, 1] for i, j in [(0, 1), (0, 2), (1, 2)]]
    r = sum(correlations) / 3
    padded = np.concatenate([by_seed, np.full((3, 5), np.nan)], axis=1)
    assert reliability(padded) == pytest.approx(3 * r / (1 + 2 * r))
    assert reliability(padded) == pytest.approx(0.75, abs=0.06)  # signal 1 against noise 1/3
    assert reliability(np.stack([by_seed[0], -by_seed[0]])) == 0


@pytest.mark.parametrize(
    "by_seed", [np.array([[1.0, 2, 3]]), np.array([[1.0, 2, 3]] * 2), np.array([[1.0, 1, 1], [1, 2, 3]])]
)
def test_unknown_reliability_is_said(by_seed: np.ndarray) -> None:
    assert np.isnan(reliability(by_seed))
    scores = HeadRemovals(by_seed, by_seed, by_seed[:, 0], by_seed[:, 0])
    assert "not known" in scores.notes[0]


def test_low_reliability_is_said() -> None:
    rng = np.random.default_rng(0)
    noise, signal = rng.normal(size=(3, 50)), rng.normal(size=50) + 0.01 * rng.normal(size=(3, 50))
    notes = HeadRemovals(noise, signal, np.zeros(3), np.zeros(3)).notes
    assert len(notes) == 3
    assert "chance" in notes[2]
    assert "reliability of 1.00" in notes[1]
    assert len(HeadRemovals(signal, signal, np.zeros(3), np.zeros(3)).notes) == 2


FINITE = st.integers(-5, 5).map(float)  # few values, so that ties are common
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: sum(pair) <= 1)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=60), SHARES, st.integers(0, 5))
def test_selection_prunes_alpha_of_all_heads_and_none_that_is_protected(
    scores: list[tuple[float, float]], shares: tuple[float, float], neurons: int
) -> None:
    (gamma, alpha), n = shares, len(scores)
    bias, perplexity = (np.array([*column, *[np.nan] * neurons]) for column in zip(*scores, strict=True))
    chosen = protected_selection(bias, perplexity, gamma, alpha).tolist()
    assert len(chosen) == len(set(chosen)) == int(alpha * n + 1e-9)
    protected = sorted(range(n), key=lambda h: (-perplexity[h], h))[: int(gamma * n + 1e-9)]
    assert not set(chosen) & set(protected)
    free = [h for h in range(n) if h not in protected]
    assert chosen == sorted(free, key=lambda h: (bias[h], h))[: len(chosen)]
    np.testing.assert_array_equal(chosen, protected_selection(bias, np.exp(perplexity), gamma, alpha))


def test_selection_by_hand() -> None:
    bias, perplexity = np.array([0.1, 0.5, 0.2, 0.4, 0.3]), np.array([90.0, 10, 11, 12, 13])
    assert protected_selection(bias, perplexity, 0.2, 0.4).tolist() == [2, 4]
    assert protected_selection(bias, perplexity, 0.6, 0.4).tolist() == [2, 1]
    assert protected_selection(bias, perplexity, 0, 0.2).tolist() == [0]


@pytest.mark.parametrize("options", [{"gamma": 0.8, "alpha": 0.3}, {"gamma": 0.995}, {"alpha": 0.9}])
def test_shares_above_one_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="more than 1"):
        Protected(**options)


class Scored:
    """A problem whose scores are known."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values

    def score(self, scorer: object) -> Scored:
        return self


def proposed(search: Any, problem: Any, passes: Any) -> list[Any]:
    """All proposals of a search whose outcomes depend on the number of removed units."""
    proposals, seen = search.proposals(problem, None), []
    try:
        selection = next(proposals)
        while True:
            seen.append(selection)
            selection = proposals.send(Outcome(1.0, 0.0, passes(len(selection.removed))))
    except StopIteration:
        return seen


def test_alphas_grow_until_the_limit_is_broken_for_every_gamma() -> None:
    bias = np.random.default_rng(0).normal(size=100)
    # Perplexity needs the heads with the least bias most, so every gamma gives other masks.
    problem = Scored({"bias": bias, "log_perplexity": -bias})
    all_of_them = [s.knobs for s in proposed(Protected(), problem, lambda n: True)]
    assert all_of_them == [{"gamma": g, "alpha": a} for g in (0.3, 0.5, 0.7) for a in (0.01, 0.02, 0.05, 0.1, 0.2)]
    some = [s.knobs["alpha"] for s in proposed(Protected(), problem, lambda n: n < 5)]
    assert some == [0.01, 0.02, 0.05] * 3
    assert [len(s.removed) for s in proposed(Protected(gamma=0.4, alpha=0.25), problem, lambda n: True)] == [25]


def test_equal_masks_are_proposed_once_and_their_outcome_is_remembered() -> None:
    bias = np.arange(50.0)
    # The heads with the least bias are never protected, so gamma makes no difference.
    problem = Scored({"bias": bias, "log_perplexity": bias})
    assert len(proposed(Protected(), problem, lambda n: True)) == 4  # 1 % of 50 is none
    assert [len(s.removed) for s in proposed(Protected(), problem, lambda n: n < 2)] == [1, 2]


def published(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bias and perplexity, (seeds, heads) each, for gender on the validation split."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    with file.open() as lines:
        for row in csv.DictReader(lines):
            if row["Group"] == "gender_and_sex" and row["Split"] == "valid":
                found[int(row["Seed"]), int(float(row["Head id"])) - 1] = float(row["Bias"]), float(row["PPL"])
    both = np.full((2, 3, 1 + max(head for _, head in found)), np.nan)
    for (seed, head), values in found.items():
        both[:, seed - 1, head] = values
    return both[0], both[1]


MODELS = ["distilgpt2", "gpt2", "EleutherAI/gpt-neo-125M", "EleutherAI/gpt-neo-1.3B", "meta-llama/Llama-2-7b-chat-hf"]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no published FASP scores in {DATA}")


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_published_scores_select_the_heads_that_the_paper_describes(name: str) -> None:
    config = json.loads((DATA / "models_config.json").read_text())[name]
    heads = config["num_heads"] * config["num_layers"]
    by_seed, ppl = published(DATA / f"head_scores_{name.replace('/', '_')}.csv")
    assert by_seed.shape == (3, heads)
    bias, perplexity = np.nanmean(by_seed, axis=0), np.nanmean(ppl, axis=0)
    contributions = json.loads((DATA / "head_contributions.json").read_text())[name]
    np.testing.assert_allclose(bias, contributions["cont_to_gender_and_sex_bias"])

    for gamma in np.arange(0.2, 0.71, 0.1).round(2):
        for alpha in np.arange(0.02, 0.21, 0.02).round(2):
            chosen = protected_selection(bias, np.log(perplexity), gamma, alpha).tolist()
            assert chosen == as_described(bias.tolist(), perplexity.tolist(), gamma, alpha)


def as_described(bias: list[float], perplexity: list[float], gamma: float, alpha: float) -> list[int]:
    """The selection in the paper's words; of equal heads the first comes first."""
    heads = list(range(len(bias)))
    critical = sorted(heads, key=lambda head: (-perplexity[head], head))[: int(gamma * len(heads))]
    others = set(heads) - set(critical)
    return sorted(others, key=lambda head: (bias[head], head))[: int(alpha * len(heads))]


@needs_data
def test_reliability_of_the_published_scores_ranges_widely() -> None:
    found = {name: reliability(published(DATA / f"head_scores_{name.replace('/', '_')}.csv")[0]) for name in MODELS}
    assert min(found.values()) == pytest.approx(0.06, abs=0.01)
    assert max(found.values()) == pytest.approx(0.90, abs=0.01)


def test_settings_are_checked() -> None:
    Fasp().check(model_of(), SUITE)
    for options in ({"seeds": 0}, {"markers": 1}, {"scenarios": 0}, {"windows": 0}):
        with pytest.raises(ValueError, match="greater than or equal"):
            Fasp(**options)


@pytest.mark.parametrize("heads", [1, 7, 270, 999])
def test_a_share_below_one_head_is_refused_with_one_that_is_enough(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    space = UnitSpace(heads=(heads,), kv_heads=(1,), neurons=(1,), head_dim=1)
    monkeypatch.setattr("secateur.search.protected.UnitSpace.of", lambda _: space)
    with pytest.raises(SettingError, match="is less than one head; set alpha to") as caught:
        Protected(alpha=0.9 / heads, gamma=0).check(tiny_model(), ALL, "zero")
    advised = float(str(caught.value).split("set alpha to ")[1].split()[0])
    Protected(alpha=advised, gamma=0).check(tiny_model(), ALL, "zero")
