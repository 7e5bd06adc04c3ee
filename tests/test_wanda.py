"""Wanda's difference of sets against plain loops over prompts, weights and sorted lists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from secateur.errors import SettingError
from secateur.evaluation import Evaluator
from secateur.measures.prompts import PromptSet, build_prompts
from secateur.measures.splits import whole
from secateur.measures.utility import activation_means, cut
from secateur.models import LanguageModel
from secateur.scoring.wanda_difference import WandaDifference, WandaScores
from secateur.search.base import Outcome, Problem, Selection
from secateur.search.percent_difference import GRID, PUBLISHED, PercentDifference, difference, top
from secateur.suites import Suite
from secateur.units import Mask, UnitSpace, masked
from secateur.weights import linear_layers, weight_matrix

SUITE = Suite.model_validate(
    {
        "name": "small",
        "attribute": "any",
        "groups": {"men": ["he", "him", "sir"], "women": ["she", "her"], "none": ["they", "one"]},
        "scenarios": [
            {
                "id": "go",
                "measure": {"kind": "preference", "a": [" yes", " y"], "b": [" no"]},
                "paraphrases": [{"prompt": "May {marker} go?"}, {"prompt": "Will {marker} go?"}],
            },
            {
                "id": "say",
                "measure": {"kind": "likelihood-pair", "more": "So {marker} cried.", "less": "So {marker} won."},
                "paraphrases": [{"prompt": ""}],
            },
        ],
    }
)
# Trees, Conv1D, fused gate and up, an MLP that sees flat inputs, padded rows.
NAMES = ("llama", "gpt2", "phi3", "opt", "gpt_neo", "mistral-windowed", "falcon-new")


@cache
def model_of(name: str = "llama") -> LanguageModel:
    return tiny_model(name)


@cache
def prompts_of(name: str = "llama") -> PromptSet:
    return build_prompts(model_of(name), SUITE, whole(SUITE))


def fit_of(name: str = "llama", batch_size: int = 5) -> Evaluator:
    return Evaluator(model_of(name), prompts_of(name), batch_size=batch_size)


@torch.no_grad()
def inputs_of(model: LanguageModel, texts: list[str]) -> dict[str, np.ndarray]:
    """Inputs of every linear layer, (tokens of all texts, inputs), one text at a time through the plain model."""
    seen: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as hooks:
        for name, module in linear_layers(model).items():

            def hook(_: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        for text in texts:
            model.model(input_ids=model.tokenizer(text, return_tensors="pt")["input_ids"], use_cache=False)
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


def texts_of(majority: bool, scenarios: tuple[str, ...] = ("go", "say")) -> list[str]:
    texts = []
    for marker in ["he", "him", "sir"] if majority else ["she", "her", "they", "one"]:
        if "go" in scenarios:
            texts += [f"May {marker} go?\n", f"Will {marker} go?\n"]
        if "say" in scenarios:
            # An empty prompt starts with the start token.
            texts += [f"<s>So {marker} cried.", f"<s>So {marker} won."]
    return texts


def s_of(model: LanguageModel, texts: list[str]) -> dict[str, np.ndarray]:
    """S of every linear layer, (out, in), by the formula."""
    inputs = inputs_of(model, texts)
    return {
        name: weight_matrix(module).abs().double().numpy() * np.sqrt((inputs[name] ** 2).sum(axis=0))
        for name, module in linear_layers(model).items()
    }


def neurons_of(model: LanguageModel, s: dict[str, np.ndarray]) -> np.ndarray:
    """Sum of S over every neuron's weights, layer by layer, neuron by neuron."""
    scores = []
    for layer, count in enumerate(model.neurons_per_layer):
        prefix = f"{model.family.blocks}.{layer}."
        for neuron in range(count):
            score = s[prefix + model.family.mlp_out][:, neuron].sum()
            for path in model.family.mlp_in:
                matrix = s[prefix + path]
                score += matrix[neuron].sum()
                if model.model.config.model_type == "phi3":
                    score += matrix[count + neuron].sum()
            scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_formula(name: str, batch_size: int) -> None:
    model = model_of(name)
    scores = WandaDifference().score(fit_of(name, batch_size))
    heads = UnitSpace.of(model).n_heads
    for group, majority in (("majority", True), ("minority", False)):
        s = s_of(model, texts_of(majority))
        np.testing.assert_allclose(scores.values[group][heads:], neurons_of(model, s), rtol=1e-4)
        assert np.isnan(scores.values[group][:heads]).all()
        for layer, module in linear_layers(model).items():
            found = weight_matrix(module).abs().numpy() * scores.norms[layer][int(not majority), 0]
            np.testing.assert_allclose(found, s[layer], rtol=1e-3, atol=1e-4 * s[layer].max())


def test_scores_of_a_masked_model_and_its_restoration() -> None:
    model, mask = tiny_model("llama"), Mask.removing(model_of(), [1, 9, 20])
    with masked(model, mask):
        expected = neurons_of(model, s_of(model, texts_of(True)))
    fit = Evaluator(model, prompts_of())
    plain = WandaDifference().score(fit)
    scores = WandaDifference().score(fit, mask)
    np.testing.assert_allclose(scores.values["majority"][8:], expected, rtol=1e-4)
    assert not np.allclose(plain.neurons, scores.neurons)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


@pytest.mark.parametrize("scenario", [0, 1])
def test_scenarios_are_kept_apart_for_the_intersection(scenario: int) -> None:
    scores = WandaDifference(intersection=True).score(fit_of())
    assert scores.scenarios == 2
    for group, majority in enumerate((True, False)):
        s = s_of(model_of(), texts_of(majority, (("go",), ("say",))[scenario]))
        np.testing.assert_allclose(scores.neurons[group, scenario], neurons_of(model_of(), s), rtol=1e-4)
    together = WandaDifference().score(fit_of())
    np.testing.assert_allclose(scores.values["minority"], together.values["minority"], rtol=1e-6)
    np.testing.assert_allclose(scores.rank, together.rank, rtol=1e-5)


def test_rank_is_the_difference_of_scores_relative_to_the_layer() -> None:
    scores = WandaDifference().score(fit_of())
    space = UnitSpace.of(model_of())
    for layer in range(space.n_layers):
        part = space.neuron_slice(layer)
        minority, majority = scores.values["minority"][part], scores.values["majority"][part]
        np.testing.assert_allclose(scores.rank[part], minority / minority.mean() - majority / majority.mean())
    assert np.isnan(scores.rank[: space.n_heads]).all()


def test_work_and_tokens_are_what_is_reported() -> None:
    fit, done = fit_of(), list[int]()
    before = fit.model.usage.copy()
    WandaDifference().score(fit, advance=done.append)
    assert sum(done) == WandaDifference().work(fit) == len(fit.prompts)
    spent = fit.model.usage.since(before)
    plain = sum(len(fit.model.tokenizer(t)["input_ids"]) for m in (True, False) for t in texts_of(m))
    assert 0 < spent.forward < plain  # shared positions are computed once
    assert spent.backward == 0


def problem_of(mean: bool = False) -> Problem:
    @contextmanager
    def step(name: str, work: int) -> Iterator[Any]:
        yield lambda _: None

    fit = fit_of()
    means = activation_means(fit.model, cut(fit.model, "A lamp above the sea. " * 9, 50, 30)) if mean else None
    return Problem(model=fit.model, fit=fit, folds=[fit], step=step, means=means)


def proposed(search: PercentDifference, scorer: WandaDifference, within: tuple[bool, ...] = ()) -> list[Selection]:
    """All proposals, told that they keep to the limit, or what ``within`` says of each."""
    proposals, found = search.proposals(problem_of(), scorer), list[Selection]()
    try:
        found.append(next(proposals))
        while True:
            inside = within[len(found) - 1] if within else True
            found.append(proposals.send(Outcome(0.0, 0.0, inside)))
    except StopIteration:
        return found


def plain_top(values: list[float], percent: float) -> set[int]:
    """Positions of the largest values, of equal ones the first."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return set(order[: int(len(values) * percent / 100)])


PERCENTS = [(40.0, 35.0), (15.0, 15.0), (100.0, 50.0), (12.5, 90.0)]


@pytest.mark.parametrize("intersection", [False, True])
@pytest.mark.parametrize(("p", "q"), PERCENTS)
def test_neurons_are_those_of_one_set_and_not_the_other(p: float, q: float, intersection: bool) -> None:
    scorer = WandaDifference(intersection=intersection)
    found = proposed(PercentDifference(p=p, q=q), scorer)
    expected = []
    space = UnitSpace.of(model_of())
    scenarios = [("go",), ("say",)] if intersection else [("go", "say")]
    for layer in range(space.n_layers):
        part = slice(layer * 48, layer * 48 + 48)
        sets = []
        for chosen in scenarios:
            minority, majority = (neurons_of(model_of(), s_of(model_of(), texts_of(m, chosen))) for m in (False, True))
            sets.append(plain_top(minority[part].tolist(), p) - plain_top(majority[part].tolist(), q))
        expected += [8 + part.start + i for i in sorted(set.intersection(*sets))]
    assert [selection.removed.tolist() for selection in found] == ([expected] if expected else [])
    assert all(s.kind == "neurons" and s.mask is None and s.knobs == {"p": p, "q": q} for s in found)


@pytest.mark.parametrize("intersection", [False, True])
@pytest.mark.parametrize(("p", "q"), [(40.0, 35.0), (15.0, 15.0)])
def test_weights_are_taken_row_by_row(p: float, q: float, intersection: bool) -> None:
    (selection,) = proposed(
        PercentDifference(p=p, q=q), WandaDifference(granularity="weight", intersection=intersection)
    )
    assert selection.kind == "weights"
    assert len(selection.removed) == 0
    assert selection.mask is not None
    assert selection.knobs == {"p": p, "q": q, "weights": selection.mask.weights_removed}
    assert problem_of().mask_of(selection) is selection.mask
    scenarios = [("go",), ("say",)] if intersection else [("go", "say")]
    by_scenario = [[s_of(model_of(), texts_of(m, chosen)) for m in (False, True)] for chosen in scenarios]
    total = 0
    for name, module in linear_layers(model_of()).items():
        expected = np.zeros(tuple(weight_matrix(module).shape), dtype=bool)
        for row in range(len(expected)):
            sets = [
                plain_top(minority[name][row].tolist(), p) - plain_top(majority[name][row].tolist(), q)
                for minority, majority in by_scenario
            ]
            expected[row, list(set.intersection(*sets))] = True
        removed = selection.mask.of(name) if name in selection.mask.shapes else np.zeros_like(expected)
        np.testing.assert_array_equal(removed, expected)
        total += int(expected.sum())
    assert total == selection.mask.weights_removed > 0


def test_everything_and_nothing() -> None:
    assert proposed(PercentDifference(p=0, q=0), WandaDifference()) == []
    assert proposed(PercentDifference(p=100, q=100), WandaDifference(granularity="weight")) == []
    (selection,) = proposed(PercentDifference(p=100, q=0), WandaDifference())
    assert selection.removed.tolist() == list(range(8, 8 + 96))


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_after_two_over_the_limit_only_the_published_pair_is_tried(granularity: Any) -> None:
    scorer = WandaDifference(granularity=granularity)
    every = proposed(PercentDifference(), scorer)
    pairs = [(s.knobs["p"], s.knobs["q"]) for s in every]
    assert len(pairs) > 2
    assert pairs == [pair for pair in GRID if pair in pairs]
    tried = proposed(PercentDifference(), scorer, (False, False, True, True))
    assert [(s.knobs["p"], s.knobs["q"]) for s in tried] == list(dict.fromkeys([*pairs[:2], PUBLISHED[granularity]]))
    assert len(proposed(PercentDifference(), scorer, (False, True, False, True))) == len(every)


@pytest.mark.parametrize("options", [{"p": 40}, {"q": 40}])
def test_one_percentage_alone_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="set both"):
        PercentDifference(**options)


@pytest.mark.parametrize("options", [{"p": -1, "q": 3}, {"p": 3, "q": 100.5}, {"p": float("nan"), "q": 3}])
def test_percentages_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should be"):
        PercentDifference(**options)


@pytest.mark.parametrize(("granularity", "least"), [("neuron", 2.09), ("weight", 2.09)])
def test_a_top_without_a_unit_is_refused(granularity: Any, least: float) -> None:
    scorer = WandaDifference(granularity=granularity)
    with pytest.raises(SettingError, match=f"less than one {granularity}; set p to {least} or more"):
        PercentDifference(p=0.5, q=0).check(problem_of().model, scorer, "zero")
    PercentDifference(p=least, q=0).check(problem_of().model, scorer, "zero")


def test_weights_with_mean_ablation_are_refused_before_any_scoring() -> None:
    problem = problem_of(mean=True)
    with pytest.raises(SettingError, match="ablation zero"):
        PercentDifference().check(problem.model, WandaDifference(granularity="weight"), "mean")
    PercentDifference().check(problem.model, WandaDifference(granularity="weight"), "zero")
    PercentDifference().check(problem.model, WandaDifference(), "mean")
    assert next(PercentDifference().proposals(problem, WandaDifference())).kind == "neurons"


SCORES = st.lists(st.integers(0, 4), min_size=1, max_size=30)  # few values, many ties


@given(scores=SCORES, percent=st.floats(0, 100))
def test_top_is_a_sorted_prefix(scores: list[int], percent: float) -> None:
    found = top(torch.tensor(scores, dtype=torch.float32), percent)
    assert set(found.nonzero().flatten().tolist()) == plain_top([float(s) for s in scores], percent)


@given(data=st.data(), p=st.floats(0, 100), q=st.floats(0, 100))
def test_difference_has_its_counts(data: st.DataObject, p: float, q: float) -> None:
    minority = torch.tensor(data.draw(SCORES), dtype=torch.float32)
    n = len(minority)
    majority = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype=torch.float32)
    found = difference(iter([(minority, majority)]), p, q)
    again = difference(iter([(minority, majority), (minority, majority)]), p, q)
    assert torch.equal(found, again)  # determined by the scores; the same scenario twice takes nothing away
    in_p, in_q = int(n * p / 100), int(n * q / 100)
    assert max(0, in_p - in_q) <= int(found.sum()) <= min(in_p, n - in_q)
    assert not difference(iter([(minority, minority)]), p, p).any()
    equal, mirrored = difference(iter([(minority, majority)]), p, p), difference(iter([(majority, minority)]), p, p)
    assert int(equal.sum()) == int(mirrored.sum())  # p = q: as many in the one set alone as in the other
    assert not (equal & mirrored).any()
    three = difference(iter([(minority, majority), (majority, minority)]), p, q)
    assert not (three & ~found).any()


def test_scores_are_deterministic() -> None:
    one, other = (WandaDifference().score(fit_of()) for _ in range(2))
    assert isinstance(one, WandaScores)
    np.testing.assert_array_equal(one.neurons, other.neurons)
    np.testing.assert_array_equal(one.rank, other.rank)
