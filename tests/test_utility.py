"""Utility on neutral text: windows, perplexity, KL divergence and mean activations against plain computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, tiny_model
from torch import Tensor

from secateur.errors import DataError, NumericalError
from secateur.evaluation import Evaluator, Measurement
from secateur.evaluation.divergence import Divergence
from secateur.measures.disparity import Interval, Table
from secateur.measures.prompts import PromptSet, build_prompts
from secateur.measures.splits import whole
from secateur.measures.utility import (
    BLOCK_WORDS,
    MIN_WORDS,
    NeutralText,
    activation_means,
    cut,
    hidden_states,
    kl_divergence,
    negative_log_likelihood,
    perplexity,
    perplexity_increase,
    read_passages,
    split_text,
    window_losses,
)
from secateur.models import LanguageModel
from secateur.suites import Suite
from secateur.units import Mask, Unit, masked

TEXT = "A lighthouse is a tower built to carry a bright lamp above the sea. " * 3


@cache
def model_of(name: str = "llama") -> LanguageModel:
    return tiny_model(name)


def tokens_of(text: NeutralText) -> Tensor:
    """The whole text again, from its overlapping windows."""
    first, *later = text.windows
    return torch.cat([first.tokens, *(window.tokens[window.start :] for window in later)])


def nll_of(model: LanguageModel, text: NeutralText) -> np.ndarray:
    return negative_log_likelihood(model, text, hidden_states(model, text))


@torch.no_grad()
def plain_losses(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Loss of every token but the first, from one forward pass of the transformers model."""
    logits = model.model(tokens[None], use_cache=False).logits[0].double()
    losses: Tensor = -logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return losses


@given(length=st.integers(2, 200), window=st.integers(2, 40), data=st.data())
def test_every_token_is_scored_once_with_enough_context(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    characters = "".join(chr(33 + i % 90) for i in range(length))
    text = cut(model_of(), characters, window, stride)
    ids = model_of().tokenizer(characters)["input_ids"]
    scored = []
    for number, part in enumerate(text.windows):
        begin = number * stride
        assert part.tokens.tolist() == ids[begin : begin + len(part.tokens)]
        assert len(part.tokens) <= window
        assert part.start >= (1 if number == 0 else window - stride)
        scored += list(range(begin + part.start, begin + len(part.tokens)))
    assert scored == list(range(1, length))
    assert text.scored.sum() == length - 1


@given(length=st.integers(2, 300), window=st.integers(2, 40), tokens=st.integers(2, 400))
def test_at_most_max_tokens_are_taken(length: int, window: int, tokens: int) -> None:
    text = cut(model_of(), "x" * length, window, window - 1, tokens)
    assert len(tokens_of(text)) == min(length, tokens)


def test_windows_of_a_batch_have_equal_lengths_and_all_come() -> None:
    text = cut(model_of(), TEXT, 60, 40)
    batches = text.batches()
    assert sorted(n for batch in batches for n in batch) == list(range(len(text.windows)))
    assert all(len({len(text.windows[n].tokens) for n in batch}) == 1 for batch in batches)
    assert max(len(batch) for batch in batches) > 1


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_of_one_window_equals_a_plain_forward(name: str) -> None:
    model = model_of(name)
    text = cut(model, TEXT, window=1000, stride=500)
    assert len(text.windows) == 1
    expected = plain_losses(model, tokens_of(text)).mean().exp()
    assert perplexity(nll_of(model, text), text) == pytest.approx(float(expected), rel=1e-4)


def test_perplexity_of_windows_equals_plain_forwards_with_their_context() -> None:
    model = model_of()
    text = cut(model, TEXT, window=50, stride=30)
    assert len(text.windows) > 3
    losses = [plain_losses(model, window.tokens)[window.start - 1 :] for window in text.windows]
    np.testing.assert_allclose(nll_of(model, text), [float(loss.sum()) for loss in losses], rtol=1e-4)
    assert perplexity(nll_of(model, text), text) == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)


def test_window_losses_equal_the_likelihood() -> None:
    model = model_of()
    text = cut(model, TEXT, window=50, stride=30)
    numbers = text.batches()[0]
    losses = window_losses(model, [text.windows[n] for n in numbers])
    np.testing.assert_allclose(losses, nll_of(model, text)[numbers], rtol=1e-5)


def test_parts_share_no_passage() -> None:
    passages = [f"Passage number {n} says {n * n}." for n in range(10, 30)]
    model = model_of()
    parts = split_text(model, passages, seed=3, window=64, stride=48, max_tokens=None)
    texts = {name: model.tokenizer.decode(tokens_of(part)) for name, part in parts.items()}
    for passage in passages:
        assert sum(passage in text for text in texts.values()) == 1
    counts = [sum(passage in text for passage in passages) for text in texts.values()]
    assert sorted(counts) == [6, 7, 7]
    again = split_text(model, passages, seed=3, window=64, stride=48, max_tokens=None)
    other = split_text(model, passages, seed=4, window=64, stride=48, max_tokens=None)
    assert torch.equal(tokens_of(again["fit"]), tokens_of(parts["fit"]))
    assert not torch.equal(tokens_of(other["fit"]), tokens_of(parts["fit"]))


def test_default_text_is_long_enough_for_three_parts() -> None:
    passages = read_passages()
    assert len(passages) >= 30
    assert len(set(passages)) == len(passages)
    assert min(sum(len(p.split()) for p in passages[part::3]) for part in range(3)) > 1000


def test_long_paragraphs_are_cut_and_short_ones_kept(tmp_path: Path) -> None:
    long = " ".join(f"w{n}" for n in range(1000))
    path = tmp_path / "text.txt"
    path.write_text(f"one\ntwo\n\n{long}\n\n\n\nthree\r\n", encoding="utf-8")
    passages = read_passages(path)
    assert passages[0] == "one two"
    assert passages[-1] == "three"
    assert " ".join(passages[1:-1]) == long
    assert max(len(passage.split()) for passage in passages) <= 2 * BLOCK_WORDS


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_text(""), "0 word(s)"),
    "blank": (lambda path: path.write_text(" \n\n \t\n"), "0 word(s)"),
    "one word": (lambda path: path.write_text("word"), "1 word(s)"),
    "short": (lambda path: path.write_text("word " * (MIN_WORDS - 1)), f"at least {MIN_WORDS}"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00\x80" * 900), "cannot be read"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
    "missing": (lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_text_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    make, reason = UNUSABLE[kind]
    path = tmp_path / "text.txt"
    make(path)
    with pytest.raises(DataError) as caught:
        read_passages(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("text", ["", "x"])
def test_text_without_a_token_to_predict_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"^[^\n]+\.$"):
        cut(model_of(), text)


def test_too_few_passages_for_three_parts_are_refused() -> None:
    with pytest.raises(DataError, match=r"^[^\n]+\.$"):
        split_text(model_of(), ["only one passage"])


def some_mask(model: LanguageModel) -> Mask:
    return Mask.removing(model, [Unit("head", 0, 1), Unit("neuron", 1, 5), Unit("neuron", 0, 7)])


def test_kl_divergence_is_zero_for_the_same_and_positive_for_a_mask() -> None:
    model = model_of()
    text = cut(model, TEXT, window=50, stride=30)
    before = hidden_states(model, text)
    with masked(model, some_mask(model)):
        after = hidden_states(model, text)
    assert kl_divergence(model, before, before) == 0
    assert kl_divergence(model, before, after) > 0.01
    assert kl_divergence(model, before, after) != pytest.approx(kl_divergence(model, after, before), rel=1e-3)


@torch.no_grad()
def test_kl_divergence_equals_a_plain_computation() -> None:
    model = model_of()
    tokens = torch.tensor(model.tokenizer(TEXT)["input_ids"])
    text = cut(model, TEXT, window=1000, stride=500)
    before = hidden_states(model, text)
    p = model.model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
    with masked(model, some_mask(model)):
        after = hidden_states(model, text)
        q = model.model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert kl_divergence(model, before, after) == pytest.approx(float(expected), rel=1e-4)


def test_perplexity_increase_lies_in_its_interval() -> None:
    model = model_of()
    text = cut(model, TEXT, window=30, stride=20)
    before = nll_of(model, text)
    with masked(model, some_mask(model)):
        after = nll_of(model, text)
    increase = perplexity_increase(before, after, text)
    ratio = perplexity(after, text) / perplexity(before, text)
    assert increase.value == pytest.approx(ratio - 1, rel=1e-6)
    assert increase.low < increase.value < increase.high
    assert perplexity_increase(before, before, text) == Interval(0, 0, 0)
    assert perplexity_increase(before, after, text, seed=1) == perplexity_increase(before, after, text, seed=1)


def test_perplexity_increase_is_paired() -> None:
    """A difference that is the same for every token has no uncertainty, however the windows differ."""
    text = cut(model_of(), TEXT, window=30, stride=20)
    before = np.random.default_rng(0).uniform(50, 150, size=len(text.windows))
    increase = perplexity_increase(before, before + 0.1 * text.scored, text)
    assert increase.low == pytest.approx(np.expm1(0.1))
    assert increase.high == pytest.approx(np.expm1(0.1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "phi3"])
def test_activation_means_equal_plain_means(name: str) -> None:
    model = model_of(name)
    text = cut(model, TEXT, window=50, stride=30)
    seen: dict[int, list[np.ndarray]] = {}
    modules = [*model.attention_outputs, *model.mlp_outputs]
    for number, module in enumerate(modules):
        seen[number] = []
        module.register_forward_pre_hook(lambda _, args, n=number: seen[n].extend(args[0][0].numpy().copy()))
    with torch.no_grad():
        for window in text.windows:
            model.model(window.tokens[None], use_cache=False)
    expected = [np.mean(rows, axis=0, dtype=np.float64) for rows in seen.values()]
    for module in modules:
        module._forward_pre_hooks.clear()
    means = activation_means(model, text)
    actual = [*(heads.reshape(-1) for heads in means.heads), *means.neurons]
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    assert means.heads[0].shape == (model.heads_per_layer[0], model.head_dim)
    assert not any(module._forward_pre_hooks for module in modules)


@cache
def small_prompts() -> PromptSet:
    scenario = {
        "id": "one",
        "measure": {"kind": "preference", "a": [" yes"], "b": [" no"]},
        "paraphrases": [{"prompt": "May {marker} go?"}, {"prompt": "Will {marker} go?"}],
    }
    groups = {"men": ["he", "him"], "women": ["she", "her"]}
    suite = Suite.model_validate({"name": "small", "attribute": "any", "groups": groups, "scenarios": [scenario]})
    return build_prompts(model_of(), suite, whole(suite))


def test_evaluator_measures_a_mask_once() -> None:
    model = model_of()
    evaluator = Evaluator(model, small_prompts(), cut(model, TEXT, 50, 30))
    mask = some_mask(model)
    first = evaluator.evaluate(mask, utility=True)
    spent = model.usage.copy()
    again = evaluator.evaluate(Mask.removing(model, mask.removed.tolist()), utility=True)
    assert model.usage == spent
    np.testing.assert_array_equal(first.table.y, again.table.y)
    np.testing.assert_array_equal(evaluator.evaluate().table.y, evaluator.evaluate(Mask.none(model)).table.y)
    assert np.abs(evaluator.evaluate().table.y - first.table.y).max() > 1e-3
    assert first.table.y.shape == (1, 4)
    assert first.table.groups.tolist() == [0, 0, 1, 1]


def test_evaluator_keeps_ablations_apart() -> None:
    model = model_of()
    text = cut(model, TEXT, 50, 30)
    evaluator = Evaluator(model, small_prompts(), text)
    units = some_mask(model).units
    zero, mean = (Mask.removing(model, units, means) for means in (None, activation_means(model, text)))
    assert not np.allclose(evaluator.evaluate(zero).table.y, evaluator.evaluate(mean).table.y)


def test_evaluator_reports_its_work() -> None:
    model = model_of()
    evaluator = Evaluator(model, small_prompts(), cut(model, TEXT, 50, 30))
    for _ in range(2):  # measured, then looked up
        for utility in (False, True):
            done: list[int] = []
            evaluator.evaluate(some_mask(model), done.append, utility=utility)
            assert sum(done) == evaluator.work(utility)


def test_evaluator_gives_the_utility_of_a_mask() -> None:
    model = model_of()
    text = cut(model, TEXT, 50, 30)
    evaluator = Evaluator(model, small_prompts(), text, divergence=True)
    mask = some_mask(model)
    before = nll_of(model, text)
    with masked(model, mask):
        after = nll_of(model, text)
    assert evaluator.perplexity() == pytest.approx(perplexity(before, text))
    assert evaluator.perplexity(mask) == pytest.approx(perplexity(after, text))
    assert evaluator.perplexity_increase(mask, 2) == perplexity_increase(before, after, text, 2)
    assert evaluator.kl_divergence(mask) > 0
    assert evaluator.kl_divergence(Mask.none(model)) == pytest.approx(0, abs=1e-7)


def test_a_measurement_counts_the_markers_and_tokens_that_it_is_of() -> None:
    table = Table(np.array([[0.1, np.nan, 2.0], [np.nan, 1.0, 3.0]]), np.array([0, 0, 1]))
    found = Measurement(table, nll=np.array([6.0, 2.0]), scored=np.array([3, 1]))
    assert found.counts.tolist() == [[1, 1], [1, 1]]
    assert Measurement(table.of_markers(np.array([True, False, True]))).counts.tolist() == [[1, 1], [0, 1]]
    assert found.log_perplexity == 2.0


def test_a_measurement_holds_bias_by_scenario_log_perplexity_and_kl() -> None:
    model = model_of()
    text = cut(model, TEXT, 50, 30)
    mask = some_mask(model)
    before = hidden_states(model, text)
    with masked(model, mask):
        after = hidden_states(model, text)
    expected = kl_divergence(model, before, after)
    evaluator = Evaluator(model, small_prompts(), text, divergence=True)
    found = evaluator.evaluate(mask, utility=True)
    men, women = (found.table.y[:, found.table.groups == group] for group in (0, 1))
    spread = np.sqrt((men.var(axis=1, ddof=1) + women.var(axis=1, ddof=1)) / 2)
    np.testing.assert_allclose(found.smd, (men.mean(axis=1) - women.mean(axis=1)) / spread)
    assert found.counts.tolist() == [[2, 2]]
    assert found.nll is not None
    assert found.log_perplexity == pytest.approx(found.nll.sum() / text.scored.sum())
    assert found.log_perplexity == pytest.approx(np.log(evaluator.perplexity(mask)))
    assert found.kl == pytest.approx(expected, rel=1e-4)
    assert evaluator.evaluate(utility=True).kl == 0
    assert evaluator.evaluate(mask).log_perplexity is None
    plain = Evaluator(model, small_prompts(), text).evaluate(mask, utility=True)
    assert plain.log_perplexity == pytest.approx(found.log_perplexity)
    assert plain.kl is None


@pytest.mark.parametrize("separator", [" ", "\n\n"])
def test_a_short_text_still_gives_three_parts(separator: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(["word"] * 150) + separator + " ".join(["other"] * 150))
    passages = read_passages(tmp_path / "text.txt")
    assert len(passages) >= 6
    assert sum(len(passage.split()) for passage in passages) == 300


@pytest.mark.parametrize(("windows", "length"), [(1, 16), (2, 16), (2, 9), (3, 5)])
def test_quick_divergence_is_that_of_the_first_windows(windows: int, length: int) -> None:
    model = model_of()
    text = cut(model, TEXT, 16, 12)
    mask = Mask.removing(model, [Unit("head", 0, 0), Unit("neuron", 1, 3)])
    part = text.first(windows, length)
    assert len(part.windows) == windows
    assert [len(window.tokens) for window in part.windows] == [length] * windows
    before = hidden_states(model, part)
    with masked(model, mask):
        after = hidden_states(model, part)
    quick = Divergence(model, text, windows, length)
    assert quick.of(mask) == pytest.approx(kl_divergence(model, before, after), rel=1e-4)
    assert quick.of(Mask.none(model)) == pytest.approx(0, abs=1e-6)


def test_quick_divergence_is_infinite_where_answers_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a search refuses the unit, and goes on."""
    model = model_of()
    quick = Divergence(model, cut(model, TEXT, 16, 12))

    def destroyed(_: Divergence) -> None:
        raise NumericalError("not finite")

    monkeypatch.setattr(Divergence, "_log_probabilities", destroyed)
    assert quick.of(Mask.removing(model, [0])) == math.inf
