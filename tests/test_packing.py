"""Packed prompts give what separate prompts give, for every family, batch size and measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NAMES, tiny_model

from secateur.errors import NumericalError, SettingError
from secateur.measures.answers import ROW_TOKENS, Batch, batch_y, measure_y, pack
from secateur.measures.packing import TokenTree, lay_out_rows, lay_out_trees, use_tree
from secateur.measures.prompts import Prompt, PromptSet, build_prompts
from secateur.measures.splits import whole
from secateur.models import LanguageModel
from secateur.models.families import attention_window
from secateur.suites import LikelihoodPair, Preference, Quantity, Suite
from secateur.units import Gates, gated

TOLERANCE = 1e-4
PREFERENCE = {
    "id": "preference",
    "measure": {"kind": "preference", "a": [" yes", " yep", " y"], "b": [" no", " nope"]},
    "paraphrases": [{"prompt": "May {marker} go?", "reply": "I say"}, {"prompt": "", "reply": "{marker} may go:"}],
}
QUANTITY = {
    "id": "quantity",
    "measure": {"kind": "quantity", "values": [1, 2.5, 10, 100], "format": "{} k"},
    "paraphrases": [{"prompt": "Pay {marker}", "reply": "$"}],
}
PAIR = {
    "id": "pair",
    "measure": {"kind": "likelihood-pair", "more": " {marker} lies.", "less": " No, {marker} is ok."},
    "paraphrases": [{"prompt": "", "reply": "We think"}],
}
SUITE = Suite.model_validate(
    {
        "name": "small",
        "attribute": "gender",
        "groups": {"men": ["he", "his son"], "women": ["her", "hers"]},
        "scenarios": [PREFERENCE, QUANTITY, PAIR],
    }
)


@cache
def model_of(name: str) -> LanguageModel:
    return tiny_model(name)


@cache
def prompts_of(name: str) -> PromptSet:
    return build_prompts(model_of(name), SUITE, whole(SUITE))


def longest(prompts: PromptSet) -> int:
    return max(len(p.context) + len(answer) for p in prompts.prompts for answer in p.answers)


def y_of(model: LanguageModel, prompts: PromptSet, batch_size: int = 64) -> torch.Tensor:
    return measure_y(model, prompts, pack(model, prompts, batch_size))


@torch.no_grad()
def naive_log_probability(model: LanguageModel, context: Sequence[int], answer: Sequence[int]) -> float:
    """One plain forward pass of the transformers model for one prompt and one answer."""
    logits = model.model(torch.tensor([[*context, *answer]]), use_cache=False).logits[0].double()
    steps = logits.log_softmax(-1)[len(context) - 1 : -1]
    return sum(float(step[token]) for step, token in zip(steps, answer, strict=True))


def naive_y(model: LanguageModel, prompt: Prompt) -> float:
    logs = [naive_log_probability(model, prompt.context, answer) for answer in prompt.answers]
    measure = SUITE.scenarios[prompt.scenario].measure
    chances = [math.exp(log) for log in logs]
    if isinstance(measure, Preference):
        return math.log(sum(chances[: len(measure.a)])) - math.log(sum(chances[len(measure.a) :]))
    if isinstance(measure, LikelihoodPair):
        return logs[0] - logs[1]
    assert isinstance(measure, Quantity)
    values = zip(chances, measure.values, strict=True)
    return sum(chance * math.log(value) for chance, value in values) / sum(chances)


@pytest.mark.parametrize("name", NAMES)
def test_packed_y_equals_separate_forwards(name: str) -> None:
    model, prompts = model_of(name), prompts_of(name)
    expected = [naive_y(model, prompt) for prompt in prompts.prompts]
    assert np.std(expected) > 0.01, "a test on constants shows nothing"
    np.testing.assert_allclose(y_of(model, prompts), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_y_does_not_depend_on_the_batch_size(name: str, batch_size: int) -> None:
    model, prompts = model_of(name), prompts_of(name)
    assert len(prompts) > 7
    np.testing.assert_allclose(y_of(model, prompts, batch_size), y_of(model, prompts), rtol=0, atol=TOLERANCE)


def test_answers_of_the_test_suite_are_many_tokens_long() -> None:
    lengths = [len(answer) for prompt in prompts_of("llama").prompts for answer in prompt.answers]
    assert min(lengths) >= 2
    assert max(lengths) >= 8


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("llama", True),
        ("mistral", True),
        ("mistral-windowed", False),
        ("gemma2", True),
        ("gemma2-windowed", False),
        ("gemma3_text-windowed", False),
        ("gpt2", True),
        ("gpt_neo", False),
        ("falcon", True),
        ("falcon-alibi", False),
    ],
)
def test_rows_where_a_tree_would_be_inexact(name: str, tree: bool) -> None:
    model, prompts = model_of(name), prompts_of(name)
    assert use_tree(model, longest(prompts)) is tree
    assert (len(pack(model, prompts)[0].layout.input_ids) == 1) is tree


def test_tree_is_used_up_to_the_window_and_no_further() -> None:
    model = model_of("mistral")
    window = attention_window(model.model.config)
    assert window is not None
    assert use_tree(model, window)
    assert not use_tree(model, window + 1)


@pytest.mark.parametrize("extra", [0, 1])
def test_y_is_exact_at_the_edge_of_the_window(extra: int) -> None:
    model = tiny_model("mistral")
    prompts = prompts_of("mistral")
    model.model.config.sliding_window = longest(prompts) - extra
    model = tiny_copy(model)
    assert use_tree(model, longest(prompts)) is (extra == 0)
    expected = [naive_y(model, prompt) for prompt in prompts.prompts]
    np.testing.assert_allclose(y_of(model, prompts), expected, rtol=0, atol=TOLERANCE)


def tiny_copy(model: LanguageModel) -> LanguageModel:
    """The same weights under the changed configuration."""
    fresh = type(model.model)(model.model.config)
    fresh.load_state_dict(model.model.state_dict())
    return LanguageModel(model=fresh, tokenizer=model.tokenizer, source=model.source)


def test_a_tree_is_smaller_than_its_prompts() -> None:
    model, prompts = model_of("llama"), prompts_of("llama")
    separate = sum(len(p.context) + len(answer) - 1 for p in prompts.prompts for answer in p.answers)
    assert sum(batch.tokens for batch in pack(model, prompts)) < 0.5 * separate


def test_batches_keep_order_and_size() -> None:
    model, prompts = model_of("llama"), prompts_of("llama")
    for batch_size in (1, 5, 64):
        batches = pack(model, prompts, batch_size)
        assert [p for batch in batches for p in batch.prompts] == list(prompts.prompts)
        assert max(len(batch.prompts) for batch in batches) <= batch_size
    with pytest.raises(SettingError, match="at least 1, not 0"):
        pack(model, prompts, 0)


def test_long_trees_are_cut() -> None:
    contexts = [tuple(range(start, start + 200)) for start in range(10)]
    prompts = tuple(Prompt(0, 0, n, context, ((1, 2), (3,))) for n, context in enumerate(contexts))
    batches = pack(model_of("llama"), PromptSet(SUITE, prompts, tuple(range(10)), np.zeros(10, dtype=int)))
    assert len(batches) > 1
    assert max(batch.layout.input_ids.shape[1] for batch in batches) <= ROW_TOKENS
    assert [len(batch.layout.input_ids) for batch in batches] == [2, 2, 1]
    assert [p for batch in batches for p in batch.prompts] == list(prompts)


def questions(count: int, shared: int, own: int, seed: int) -> PromptSet:
    """Questions that begin alike in the first tokens and in every part of up to a dozen; one measure for all."""
    rng = np.random.default_rng(seed)
    opening = tuple(rng.integers(0, 256, size=shared).tolist())
    prompts: list[Prompt] = []
    while len(prompts) < count:
        asked = (*opening, *rng.integers(0, 256, size=rng.integers(1, shared + 2)).tolist())
        for _ in range(min(int(rng.integers(1, 13)), count - len(prompts))):
            context = (*asked, *rng.integers(0, 256, size=rng.integers(1, own + 1)).tolist())
            prompts.append(Prompt(2, 0, len(prompts), context, ((1, 2), (3,))))
    return PromptSet(SUITE, tuple(prompts), tuple(range(count)), np.zeros(count, dtype=int))


@settings(max_examples=25)
@given(
    count=st.integers(1, 150),
    shared=st.integers(1, 60),
    own=st.integers(1, 200),
    seed=st.integers(0, 1000),
    batch_size=st.sampled_from([1, 64, 128, 300]),
)
def test_little_is_padding(count: int, shared: int, own: int, seed: int, batch_size: int) -> None:
    prompts = questions(count, shared, own, seed)
    for batch in pack(model_of("llama"), prompts, batch_size):
        assert len(batch.layout.row) >= 0.9 * batch.tokens


@pytest.mark.parametrize(("count", "own"), [(52, 10), (78, 7), (30, 30), (150, 3)])
def test_a_row_more_costs_its_own_tokens_alone(count: int, own: int) -> None:
    model, prompts = model_of("llama"), questions(count, 30, own, seed=0)
    tree = TokenTree()
    for prompt in prompts.prompts:
        tree.add((*prompt.context, prompt.answers[0][0]))
    rows = sum(len(batch.layout.input_ids) for batch in pack(model, prompts))
    assert rows > 1
    # What a row begins with may be there in another row, too.
    assert sum(batch.tokens for batch in pack(model, prompts)) <= len(tree) + 2 * (rows - 1) * (30 + 31)


@settings(max_examples=10)
@given(count=st.integers(20, 60), shared=st.integers(1, 40), own=st.integers(1, 40), seed=st.integers(0, 1000))
def test_any_prompts_in_common_rows_give_what_they_give_alone(count: int, shared: int, own: int, seed: int) -> None:
    model, prompts = model_of("llama"), questions(count, shared, own, seed)
    expected = [naive_y(model, prompt) for prompt in prompts.prompts]
    np.testing.assert_allclose(y_of(model, prompts, 128), expected, rtol=0, atol=1e-5)


def test_values_that_are_not_finite_are_a_numerical_error() -> None:
    model = tiny_model()
    model.model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"^[^\n]*'tiny-llama'[^\n]*$"):
        y_of(model, prompts_of("llama"))


def test_advance_counts_prompts() -> None:
    model, prompts = model_of("llama"), prompts_of("llama")
    seen: list[int] = []
    measure_y(model, prompts, pack(model, prompts, 7), seen.append)
    assert sum(seen) == len(prompts)


SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


def path_of(tree: TokenTree, node: int) -> list[int]:
    return [*path_of(tree, tree.parents[node]), tree.tokens[node]] if node >= 0 else []


@given(SEQUENCES)
def test_tree_reproduces_its_sequences(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    ends = [tree.add(sequence) for sequence in sequences]
    assert [path_of(tree, end) for end in ends] == sequences
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert all(depth + 1 == len(path_of(tree, node)) for node, depth in enumerate(tree.depths))
    children = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(children)) == len(children)
    prefixes = {tuple(sequence[:stop]) for sequence in sequences for stop in range(1, len(sequence) + 1)}
    assert len(tree) == len(prefixes)


@given(SEQUENCES)
def test_tree_row_shows_every_token_its_ancestors_only(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    for sequence in sequences:
        tree.add(sequence)
    layout = lay_out_trees(tree, 0, torch.float32)
    visible = layout.attention_mask[0, 0] == 0
    for node in range(len(tree)):
        seen = visible[node].nonzero().flatten()
        assert layout.input_ids[0, seen].tolist() == path_of(tree, node)
        assert layout.position_ids[0, seen].tolist() == list(range(len(seen)))


@given(SEQUENCES, SEQUENCES)
def test_each_tree_has_a_row_of_its_own(first: list[list[int]], second: list[list[int]]) -> None:
    tree, alone = TokenTree(), (TokenTree(), TokenTree())
    for row, sequences in enumerate((first, second)):
        for sequence in sequences:
            tree.add(sequence, -1 - row)
            alone[row].add(sequence)
    layout = lay_out_trees(tree, 9, torch.float32)
    for row, one in enumerate(alone):
        expected = lay_out_trees(one, 9, torch.float32)
        size = len(one)
        assert layout.input_ids[row, :size].tolist() == expected.input_ids[0].tolist()
        assert layout.position_ids[row, :size].tolist() == expected.position_ids[0].tolist()
        assert torch.equal(layout.attention_mask[row, :, :size, :size], expected.attention_mask[0])
        assert bool((layout.attention_mask[row, 0, :size, size:] < 0).all())
        assert bool((layout.input_ids[row, size:] == 9).all())
        assert bool((layout.nodes[row, size:] == -1).all())
    places = list(zip(layout.row.tolist(), layout.column.tolist(), strict=True))
    assert [int(layout.nodes[place]) for place in places] == list(range(len(tree)))


@given(SEQUENCES)
def test_rows_hold_every_path_once(sequences: list[list[int]]) -> None:
    tree = TokenTree()
    for sequence in sequences:
        tree.add(sequence)
    layout = lay_out_rows(tree, 9)
    for node in range(len(tree)):
        row, column = int(layout.row[node]), int(layout.column[node])
        assert layout.input_ids[row, : column + 1].tolist() == path_of(tree, node)
    maximal = {tuple(s) for s in sequences if not any(s == o[: len(s)] and len(o) > len(s) for o in sequences)}
    lengths = layout.attention_mask.sum(1).tolist()
    rows = [tuple(row[:length]) for row, length in zip(layout.input_ids.tolist(), lengths, strict=True)]
    assert sorted(rows) == sorted(maximal)
    assert bool((layout.input_ids[layout.attention_mask == 0] == 9).all())


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)
PROMPTS = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=2, max_size=2)), min_size=1, max_size=5)


def batch_of(name: str, pieces: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]) -> Batch:
    prompts = tuple(Prompt(2, 0, n, context, tuple(answers)) for n, (context, answers) in enumerate(pieces))
    markers = tuple(range(len(prompts)))
    return pack(model_of(name), PromptSet(SUITE, prompts, markers, np.zeros(len(prompts), dtype=int)))[0]


@given(PROMPTS)
def test_owner_is_the_only_prompt_that_passes(pieces: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]) -> None:
    batch = batch_of("llama", pieces)
    visible = batch.layout.attention_mask[0, 0] == 0
    for position, owner in enumerate(batch.owner[0].tolist()):
        path = tuple(batch.layout.input_ids[0, visible[position]].tolist())
        passing = [
            number
            for number, prompt in enumerate(batch.prompts)
            if any((*prompt.context, *answer[:-1])[: len(path)] == path for answer in prompt.answers)
        ]
        assert owner == (passing[0] if len(passing) == 1 else -1)


def influence(model: LanguageModel, batch: Batch) -> torch.Tensor:
    """Which prompts' y depend on the units at each position, bool (prompts, rows, columns)."""
    gates = Gates.ones(model, tuple(batch.layout.input_ids.shape))
    with gated(model, gates):
        y = batch_y(model, SUITE, batch)
    per_prompt = []
    for value in y:
        gradients = torch.autograd.grad(value, gates.leaves(), retain_graph=True, materialize_grads=True)
        per_prompt.append(sum(gradient.abs().sum(-1) for gradient in gradients))
    return torch.stack(per_prompt) > 0  # type: ignore[arg-type]


def assert_owned_positions_influence_their_owner_alone(model: LanguageModel, batch: Batch) -> None:
    influences = influence(model, batch)
    for number, prompt_influences in enumerate(influences):
        strangers = prompt_influences & (batch.owner != number) & (batch.owner >= 0)
        assert not bool(strangers.any()), f"prompt {number} depends on positions of another prompt"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "mistral-windowed", "falcon-alibi"])
def test_owned_positions_influence_their_owner_alone(name: str) -> None:
    model, prompts = model_of(name), prompts_of(name)
    for batch in pack(model, prompts, 10**6):
        assert_owned_positions_influence_their_owner_alone(model, batch)
        if len(batch.layout.input_ids) == 1:  # padded rows compute shared beginnings more than once
            alone = influence(model, batch).sum(0) == 1
            assert bool((batch.owner[alone] >= 0).all()), "a position of one prompt alone counts as shared"
        assert len(set(batch.owner.flatten().tolist()) - {-1}) == len(batch.prompts)
    for batch in pack(model, prompts, 6):
        assert_owned_positions_influence_their_owner_alone(model, batch)


@settings(max_examples=30)
@given(PROMPTS)
def test_owners_of_rows_hold_for_any_prompts(pieces: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]) -> None:
    assert_owned_positions_influence_their_owner_alone(model_of("gpt_neo"), batch_of("gpt_neo", pieces))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gpt2"])
def test_gradients_of_y_equal_finite_differences(name: str) -> None:
    model, prompts = model_of(name), prompts_of(name)
    batch = pack(model, prompts)[0]
    weights = torch.randn(len(batch.prompts), generator=torch.Generator().manual_seed(0))
    gates = Gates.ones(model)

    def value() -> torch.Tensor:
        with gated(model, gates):
            return weights @ batch_y(model, SUITE, batch)

    gradients = torch.autograd.grad(value(), gates.leaves())
    step = 0.01
    for leaf, gradient in zip(gates.leaves(), gradients, strict=True):
        for unit in (0, len(leaf) - 1):
            with torch.no_grad():
                leaf[unit] = 1 + step
                above = value()
                leaf[unit] = 1 - step
                below = value()
                leaf[unit] = 1
            assert float((above - below) / (2 * step)) == pytest.approx(float(gradient[unit]), rel=0.01, abs=0.01)
