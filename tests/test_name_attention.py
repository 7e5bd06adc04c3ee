"""Attention to markers against a plain loop over the attentions of plain transformers."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fasp import Scored, proposed
from test_scoring import SUITE, fit_of, model_of, some_mask
from tiny import HEADS, LAYERS, NAMES, all_logits, tiny_model, tiny_transformer

from secateur.errors import SettingError
from secateur.evaluation import Evaluator
from secateur.measures.prompts import build_prompts
from secateur.measures.splits import whole
from secateur.models import LanguageModel
from secateur.scoring.name_attention import NameAttention, attention_weights, marker_spans, shared_ends
from secateur.search.difference import SetDifference, set_difference
from secateur.suites import Suite
from secateur.units import UnitSpace, masked

WORDS = [word for words in SUITE.groups.values() for word in words]


def plain_attention(fit: Evaluator, variant: str) -> dict[tuple[int, int], list[np.ndarray]]:
    """By scenario and group, per prompt (heads,), from the texts and the model's own attentions."""
    name = fit.model.source.removeprefix("tiny-")
    found = defaultdict(list)
    plain = tiny_transformer(name)
    plain.config._attn_implementation = "eager"
    for prompt in fit.prompts.prompts:
        paraphrase = SUITE.scenarios[prompt.scenario].paraphrases[prompt.paraphrase]
        word = WORDS[prompt.marker]
        # One token is one byte, so places in the text are places in the context.
        begin = paraphrase.prompt.index("{marker}")
        wordings = [
            p for p in fit.prompts.prompts if (p.scenario, p.paraphrase) == (prompt.scenario, prompt.paraphrase)
        ]
        stop = begin + len(word)
        last = {WORDS[p.marker][-1] for p in wordings}
        assert len(last) > 1, "markers with a common end would shift the span"
        out = plain(input_ids=torch.tensor([prompt.context]), output_attentions=True, use_cache=False)
        heads = []
        for layer in out.attentions:
            for head in layer[0]:
                pairs = [float(head[q, k]) for q in range(stop, len(prompt.context)) for k in range(begin, stop)]
                heads.append(max(pairs) if variant == "max" else sum(pairs) / len(pairs))
        found[prompt.scenario, prompt.marker // 3].append(np.array(heads))
    return found


def check_against_plain(name: str, variant: Literal["mean", "max"], batch_size: int) -> None:
    fit = fit_of(name, batch_size)
    scores = NameAttention(variant=variant).score(fit)
    with torch.no_grad():
        found = {key: np.mean(values, axis=0) for key, values in plain_attention(fit, variant).items()}
    majority = np.array([found[s, 0] for s in range(2)])
    minority = np.array([(found[s, 1] + found[s, 2]) / 2 for s in range(2)])
    n = LAYERS * HEADS
    np.testing.assert_allclose(scores.values["majority"][:n], majority.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores.values["minority"][:n], minority.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(scores.values["consistency"][:n], (minority > majority).mean(0))
    np.testing.assert_array_equal(scores.rank, scores.values["minority"])
    assert np.isnan(scores.rank[n:]).all()
    assert len(scores.rank) == len(UnitSpace.of(fit.model))
    assert np.ptp(majority - minority) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_a_loop_over_plain_attentions(name: str) -> None:
    check_against_plain(name, "mean", 64)


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "falcon-alibi"])
@pytest.mark.parametrize("variant", ["mean", "max"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_neither_batches_nor_padding_count(name: str, variant: Literal["mean", "max"], batch_size: int) -> None:
    check_against_plain(name, variant, batch_size)


@pytest.mark.parametrize("name", NAMES)
def test_fast_attention_is_back_after_scoring_and_after_an_error(name: str) -> None:
    model = tiny_model(name)
    before, logits = model.model.config._attn_implementation, all_logits(model)
    with pytest.raises(RuntimeError), attention_weights(model):
        raise RuntimeError
    NameAttention().check(model, SUITE)
    assert model.model.config._attn_implementation == before
    torch.testing.assert_close(all_logits(model), logits, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.model.modules())


def test_scores_of_a_pruned_model() -> None:
    fit = fit_of()
    mask = some_mask(fit.model)  # removes a head of the first layer
    found = NameAttention().score(fit, mask).values["minority"][: LAYERS * HEADS]
    expected = NameAttention().score(fit).values["minority"][: LAYERS * HEADS]
    np.testing.assert_allclose(found[:HEADS], expected[:HEADS], rtol=1e-5)
    assert np.abs(found - expected)[HEADS:].max() > 1e-4
    with masked(fit.model, mask):
        np.testing.assert_allclose(
            found, NameAttention().score(fit).values["minority"][: LAYERS * HEADS], rtol=1e-5, atol=1e-7
        )


def test_work_is_what_is_reported() -> None:
    fit = fit_of()
    done: list[int] = []
    NameAttention().score(fit, advance=done.append)
    assert sum(done) == NameAttention().work(fit) == len(fit.prompts)


def changed(**scenario: Any) -> Suite:
    document = deepcopy(SUITE.model_dump())
    document["scenarios"] = [{**document["scenarios"][0], **scenario}]
    return Suite.model_validate(document)


def evaluator(model: LanguageModel, suite: Suite) -> Evaluator:
    return Evaluator(model, build_prompts(model, suite, whole(suite)))


def test_markers_in_the_answers_only_are_refused() -> None:
    pair = {"kind": "likelihood-pair", "more": " {marker} is.", "less": " {marker} was."}
    suite = changed(measure=pair, paraphrases=[{"reply": "Now"}])
    with pytest.raises(SettingError, match=r"answers only.*use another method"):
        NameAttention().check(model_of(), suite)
    with pytest.raises(SettingError, match="tokens after its marker"):
        NameAttention().score(evaluator(model_of(), suite))


def test_prompts_that_end_in_the_marker_are_left_out() -> None:
    ends, goes_on = {"reply": "So {marker}"}, {"reply": "So {marker} may"}
    model = model_of()
    done: list[int] = []
    both = evaluator(model, changed(paraphrases=[ends, goes_on]))
    found = NameAttention().score(both, advance=done.append)
    assert sum(done) == len(both.prompts)
    expected = NameAttention().score(evaluator(model, changed(paraphrases=[goes_on])))
    np.testing.assert_allclose(found.rank, expected.rank, rtol=1e-5)
    with pytest.raises(SettingError, match="tokens after its marker"):
        NameAttention().score(evaluator(model, changed(paraphrases=[ends])))


def test_models_without_attention_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    for block in model.blocks:
        attention: Any = block.self_attn
        own = attention.forward
        monkeypatch.setattr(attention, "forward", lambda *args, own=own, **kwargs: (own(*args, **kwargs)[0], None))
    with pytest.raises(SettingError, match="gives no attention weights; use another method"):
        NameAttention().check(model, SUITE)


def test_spans_hold_the_markers_with_any_tokenizer() -> None:
    fit = fit_of()
    for (scenario, paraphrase, marker), (begin, stop) in marker_spans(fit.prompts.prompts).items():
        prompt = next(
            p for p in fit.prompts.prompts if (p.scenario, p.paraphrase, p.marker) == (scenario, paraphrase, marker)
        )
        assert fit.model.tokenizer.decode(list(prompt.context[begin:stop])) == WORDS[marker]


TOKENS = st.lists(st.integers(0, 2), max_size=4).map(tuple)


@given(TOKENS, TOKENS, st.lists(TOKENS, min_size=2, max_size=5))
def test_shared_ends_are_shared_and_leave_each_sequence_a_token(
    start: tuple[int, ...], end: tuple[int, ...], markers: list[tuple[int, ...]]
) -> None:
    sequences = [start + marker + end for marker in markers]
    prefix, suffix = shared_ends(sequences)
    assert len({sequence[:prefix] for sequence in sequences}) == 1
    assert len({sequence[len(sequence) - suffix :] for sequence in sequences}) == 1
    if len(set(sequences)) > 1 and min(map(len, sequences)):
        assert all(prefix + suffix < len(sequence) for sequence in sequences)
        assert prefix + suffix >= min(len(start) + len(end), min(map(len, sequences)) - 1)
    # Tokens that no other sequence has are found exactly.
    own = [(*start, 10 + i, *marker, 20 + i, *end) for i, marker in enumerate(markers)]
    assert shared_ends(own) == (len(start), len(end))


SCORES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(SCORES, st.integers(0, 50), st.integers(0, 50))
def test_set_difference_is_that_of_the_two_tops(scores: list[tuple[int, int]], top: int, exclude: int) -> None:
    minority, majority = (np.array([*column, np.nan], dtype=float) for column in zip(*scores, strict=True))

    def first(values: np.ndarray, count: int) -> list[int]:
        return sorted(range(len(scores)), key=lambda unit: (-values[unit], unit))[:count]

    expected = [unit for unit in first(minority, top) if unit not in first(majority, exclude)]
    assert set_difference(minority, majority, top, exclude).tolist() == expected


class Sized(Scored):
    """A problem with known scores, which says how many heads there are."""

    def __init__(self, minority: np.ndarray, majority: np.ndarray) -> None:
        super().__init__({"minority": minority, "majority": majority})
        self.n_heads = len(minority)

    @property
    def space(self) -> Sized:
        return self


def test_tops_grow_until_the_limit_is_broken() -> None:
    units = np.arange(200.0)
    apart = Sized(-units, units)  # no head stands out under both
    assert [len(s.removed) for s in proposed(SetDifference(), apart, lambda n: True)] == [2, 5, 10, 20, 40]
    few = proposed(SetDifference(), apart, lambda n: n < 10)
    assert [len(s.removed) for s in few] == [2, 5, 10, 40]  # the published pair is tried in any case
    assert few[-1].knobs == {"top": 40, "exclude": 5}
    alike = Sized(units, units)
    knobs = [(s.knobs["top"], s.knobs["exclude"]) for s in proposed(SetDifference(), alike, lambda n: True)]
    assert knobs == [(40, 20), (10, 5), (20, 5), (40, 5)]
    asked = proposed(SetDifference(top=40, exclude=5), alike, lambda n: True)
    assert [s.removed.tolist() for s in asked] == [list(range(194, 159, -1))]


def test_small_models_get_counts_up_to_half_of_their_heads() -> None:
    units = np.arange(8.0)
    assert [len(s.removed) for s in proposed(SetDifference(), Sized(-units, units), lambda n: True)] == [2, 4]


@pytest.mark.parametrize("options", [{"top": 9}, {"exclude": 9}])
def test_more_heads_than_there_are_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=r"the model has 8 heads, so '.*' cannot be 9; set it to 4 or less"):
        SetDifference(**options).check(model_of(), NameAttention(), "zero")
