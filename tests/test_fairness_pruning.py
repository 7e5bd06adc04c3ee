"""Fairness pruning against plain loops over prompts, tokens and weights."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor

from secateur.evaluation import Evaluator
from secateur.measures.prompts import PromptSet, build_prompts
from secateur.measures.splits import Part, whole
from secateur.measures.utility import NeutralText, cut
from secateur.models import LanguageModel
from secateur.scoring.fairness_pruning import FairnessPruning, minmax, pairs, shares
from secateur.scoring.magnitude import neuron_importance
from secateur.suites import Suite
from secateur.units import Mask, UnitSpace, masked

# Packed in trees; in rows because of its local layers, its window or its position bias; with a flat MLP.
FAMILIES = ["llama", "gpt2", "gpt_neo", "mistral-windowed", "falcon-alibi", "opt", "phi3"]
TEXT = "A lighthouse is a tower built to carry a bright lamp above the sea. " * 3
SUITE = Suite.model_validate(
    {
        "name": "small",
        "attribute": "any",
        "groups": {"men": ["he", "him", "sir", "mister"], "women": ["she", "her", "miss"], "none": ["they", "one"]},
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
PAIRS = [(0, 4), (1, 5), (2, 6), (0, 7), (1, 8)]  # men and women, three; men and none, two


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


def activations(model: LanguageModel, ids: Tensor) -> Tensor:
    """Inputs of the MLP output projections for one sequence run alone, (layers, tokens, neurons)."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(len(ids), -1).clone()))
        for module in model.mlp_outputs
    ]
    with torch.no_grad():
        model.model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def plain_bias(model: LanguageModel, prompts: PromptSet) -> np.ndarray:
    """Bias scores of all neurons, (neurons,), one prompt at a time."""
    context = {(p.scenario, p.paraphrase, p.marker): torch.tensor(p.context) for p in prompts.prompts}
    differences = []
    for scenario, paraphrase in sorted({key[:2] for key in context}):
        for one, other in PAIRS:
            means = [activations(model, context[scenario, paraphrase, m]).mean(dim=1) for m in (one, other)]
            differences.append((means[0] - means[1]).abs().flatten())
    return torch.stack(differences).double().mean(dim=0).numpy()


def of_neurons(values: np.ndarray, model: LanguageModel) -> np.ndarray:
    heads = UnitSpace.of(model).n_heads
    assert np.isnan(values[:heads]).all()
    return values[heads:]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_bias_equals_a_loop_over_prompt_pairs_run_alone(name: str, batch_size: int) -> None:
    model = model_of(name)
    found = FairnessPruning(importance="l2").score(fit_of(name, batch_size)).values["bias"]
    expected = plain_bias(model, prompts_of(name))
    np.testing.assert_allclose(of_neurons(found, model), expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_removed_units_are_removed_while_scoring() -> None:
    fit = fit_of()
    mask = Mask.removing(fit.model, [1, 2, 20, 60])
    bias = of_neurons(FairnessPruning().score(fit, mask).values["bias"], fit.model)
    with masked(fit.model, mask):
        expected = plain_bias(fit.model, fit.prompts)
    np.testing.assert_allclose(bias, expected, rtol=1e-4, atol=1e-5 * expected.max())
    assert bias[20 - UnitSpace.of(fit.model).n_heads] == 0


def test_prompts_of_a_part_are_paired_within_the_part() -> None:
    model = model_of()
    part = Part(((1,), (0,)), (1, 3, 5, 6, 8))  # two men, two women, one of none
    prompts = build_prompts(model, SUITE, part)
    context = {(p.scenario, p.marker): torch.tensor(p.context) for p in prompts.prompts}
    expected = np.mean(
        [
            (activations(model, context[s, a]).mean(1) - activations(model, context[s, b]).mean(1)).abs().flatten()
            for s in (0, 1)
            for a, b in ((1, 5), (3, 6), (1, 8))
        ],
        axis=0,
    )
    found = FairnessPruning().score(Evaluator(model, prompts, text_of())).values["bias"]
    np.testing.assert_allclose(of_neurons(found, model), expected, rtol=1e-4, atol=1e-6)


def test_pairs_match_markers_by_their_place_in_the_group() -> None:
    one, other = pairs(np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]))
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == [(0, 3), (1, 4), (0, 5), (1, 6), (2, 7)]


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_data_driven_importance_equals_a_loop_over_windows_and_neurons(name: str) -> None:
    model = model_of(name)
    found = FairnessPruning(importance="data").score(fit_of(name)).values["importance"]
    squares = torch.stack([activations(model, w.tokens).double().square().sum(1) for w in text_of(name).windows]).sum(0)
    expected = []
    for layer, square in enumerate(squares):
        mlp = model.blocks[layer].get_submodule("mlp")
        fused = getattr(mlp, "gate_up_proj", None)
        gate, up = fused.weight.chunk(2) if fused is not None else (mlp.gate_proj.weight, mlp.up_proj.weight)
        peaks = [[max(row) + abs(min(row)) for row in w.tolist()] for w in (gate, up, mlp.down_proj.weight.T)]
        for neuron, total in enumerate(square.tolist()):
            expected.append(sum(part[neuron] / max(part) for part in peaks) * total**0.5)
    np.testing.assert_allclose(of_neurons(found, model), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ppm", "vow", "pon", "l2"])
def test_static_importance_is_that_of_magnitude(kind: str) -> None:
    model = model_of()
    ranking = FairnessPruning.model_validate({"importance": kind}).score(fit_of())
    expected = torch.cat([neuron_importance(model, layer, kind) for layer in range(2)])  # type: ignore[arg-type]
    np.testing.assert_array_equal(of_neurons(ranking.values["importance"], model), expected)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_score_weighs_bias_against_importance_within_each_layer(weight: float) -> None:
    model = model_of()
    ranking = FairnessPruning(weight=weight, scope="global").score(fit_of())
    space = UnitSpace.of(model)
    for layer in range(space.n_layers):
        part = space.neuron_slice(layer)
        bias, importance = (ranking.values[name][part].tolist() for name in ("bias", "importance"))
        for neuron, score in enumerate(ranking.values["score"][part]):
            scaled = [(v[neuron] - min(v)) / (max(v) - min(v)) for v in (bias, importance)]
            assert score == pytest.approx(weight * scaled[0] + (1 - weight) * (1 - scaled[1]), abs=1e-9)
    np.testing.assert_array_equal(ranking.rank, ranking.values["score"])


def test_scope_layer_takes_the_same_share_of_every_layer() -> None:
    model = model_of()
    ranking = FairnessPruning().score(fit_of())
    order, space = ranking.order(), UnitSpace.of(model)
    score = ranking.values["score"]
    assert len(order) == space.n_neurons
    for count in (2, 10, 60):
        for layer in range(2):
            part = range(len(space))[space.neuron_slice(layer)]
            best = sorted(part, key=lambda unit: -score[unit])[: count // 2]
            assert set(order[:count]) & set(part) == set(best)
    flat = FairnessPruning(scope="global").score(fit_of()).order()
    assert flat.tolist() == sorted(range(space.n_heads, len(space)), key=lambda unit: -score[unit])


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=4))
def test_shares_order_units_by_place_in_the_layer_then_score_then_position(layers: list[list[int]]) -> None:
    rank = shares([np.array(layer, dtype=float) for layer in layers])
    keys = []
    for number, layer in enumerate(layers):
        for unit, score in enumerate(layer):
            before = sum(s > score for s in layer) + sum(s == score for s in layer[:unit])
            keys.append((before / len(layer), -score, number, unit))
    in_order = [keys[unit] for unit in np.argsort(-rank)]
    assert all(earlier < later for earlier, later in pairwise(in_order))


def test_minmax_of_equal_values_is_zero() -> None:
    np.testing.assert_array_equal(minmax(np.full(3, 2.0)), np.zeros(3))
    np.testing.assert_array_equal(minmax(np.array([2.0, 4.0, 3.0])), [0, 1, 0.5])


@pytest.mark.parametrize("scorer", [FairnessPruning(), FairnessPruning(importance="data")])
def test_work_is_what_is_reported_and_the_model_is_left_as_it_was(scorer: FairnessPruning) -> None:
    fit = fit_of()
    done: list[int] = []
    before = fit.model.usage.copy()
    scorer.score(fit, advance=done.append)
    assert sum(done) == scorer.work(fit)
    assert fit.model.usage.since(before).forward > 0
    assert not any(module._forward_pre_hooks for module in fit.model.model.modules())
