"""From a suite to token ids: chat templates, answers at the boundary, and averaging over paraphrases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from secateur.errors import SettingError, SuiteError
from secateur.measures.prompts import Prompt, PromptSet, build_prompts, candidate_texts, render
from secateur.measures.splits import Part, whole
from secateur.models import LanguageModel
from secateur.suites import Suite

GROUPS = {"men": ["he", "him"], "women": ["she", "her"]}
BASE = tiny_model()
CHAT = tiny_model(chat=True)
LETTERS = "abc "


def suite_of(*scenarios: dict[str, object]) -> Suite:
    named = [{"id": f"s{number}", **scenario} for number, scenario in enumerate(scenarios)]
    return Suite.model_validate({"name": "small", "attribute": "gender", "groups": GROUPS, "scenarios": named})


def preference(a: list[str], b: list[str], prompt: str, reply: str = "") -> dict[str, object]:
    return {"measure": {"kind": "preference", "a": a, "b": b}, "paraphrases": [{"prompt": prompt, "reply": reply}]}


def merging_model(merges: list[tuple[str, str]]) -> LanguageModel:
    """A tiny llama whose tokenizer works on whole texts, so that merges cross every boundary."""
    pieces = ["<s>", *LETTERS]
    pieces += [one + other for one, other in merges if one + other not in pieces]
    tokenizer = Tokenizer(BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>")
    return LanguageModel(model=BASE.model, tokenizer=wrapped, source="merging")


MERGING = merging_model([("a", "b"), ("ab", "c"), (" ", "a"), ("c", "c"), ("b", " a")])


def text_of(model: LanguageModel, ids: tuple[int, ...]) -> str:
    return str(model.tokenizer.decode(list(ids)))


def only(model: LanguageModel, suite: Suite, chat: str = "auto") -> Prompt:
    prompt: Prompt = build_prompts(model, suite, whole(suite), chat).prompts[0]  # type: ignore[arg-type]
    return prompt


def test_base_model_reads_plain_text() -> None:
    assert render(BASE, "Hello", "") == "Hello\n"
    assert render(BASE, "Hello", "Yes, I") == "Hello\nYes, I"
    assert render(BASE, "", "Yes, I") == "Yes, I"
    prompt = only(BASE, suite_of(preference([" x"], [" y"], "Ask {marker}", "I say")))
    assert text_of(BASE, prompt.context) == "Ask he\nI say"


def test_chat_model_reads_its_template() -> None:
    suite = suite_of(preference([" x"], [" y"], "Ask {marker}", "I say"))
    expected = "<s>user\nAsk he</s>\n<s>assistant\nI say"
    assert render(CHAT, "Ask he", "I say") == expected
    for chat in ("auto", "chat"):
        assert text_of(CHAT, only(CHAT, suite, chat).context) == expected
    assert text_of(CHAT, only(CHAT, suite, "plain").context) == "Ask he\nI say"


def test_chat_markup_becomes_special_tokens_once() -> None:
    context = only(CHAT, suite_of(preference([" x"], [" y"], "Ask {marker}"))).context
    assert context[0] == BOS
    assert context[1] != BOS
    assert context.count(BOS) == 2  # the user's turn and the assistant's


def beginning_with_a_start_token(chat: bool) -> LanguageModel:
    """Like Llama and Gemma: the tokenizer puts a start token before every text, unless told not to."""
    tokenizer = tiny_tokenizer(chat)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return LanguageModel(model=BASE.model, tokenizer=tokenizer, source="starting")


@pytest.mark.parametrize("chat", [False, True])
def test_start_token_comes_once(chat: bool) -> None:
    model = beginning_with_a_start_token(chat)
    asked = only(model, suite_of(preference([" x"], [" y"], "Ask {marker}")))
    assert asked.context[0] == BOS
    assert asked.context[1] != BOS
    assert all(BOS not in answer for answer in asked.answers)
    empty = only(model, pair_suite())
    assert empty.context == (BOS,)
    assert [text_of(model, answer) for answer in empty.answers] == ["he lies.", "he works."]


def test_insisting_on_chat_without_a_template_is_a_setting_error() -> None:
    with pytest.raises(SettingError, match=r"^The model 'tiny-llama' has no chat template[^\n]*$"):
        only(BASE, suite_of(preference([" x"], [" y"], "Ask {marker}")), "chat")


def test_markers_and_paraphrases_come_in_order() -> None:
    suite = suite_of(preference([" x"], [" y"], "First {marker}"), preference([" x"], [" y"], "Second {marker}"))
    prompts = build_prompts(BASE, suite, Part(((0,), (0,)), (0, 2, 3)))
    assert [(p.scenario, p.paraphrase, p.marker) for p in prompts.prompts] == [
        (scenario, 0, marker) for scenario in (0, 1) for marker in (0, 2, 3)
    ]
    assert text_of(BASE, prompts.prompts[4].context) == "Second she\n"
    assert prompts.groups.tolist() == [0, 1, 1]
    assert prompts.scenarios == [0, 1]


def test_candidates_of_every_measure() -> None:
    pair = {"kind": "likelihood-pair", "more": " {marker} lies.", "less": " {{all}} lie."}
    quantity = {"kind": "quantity", "values": [1, 2.5, 1000], "format": "{:,}%"}
    wordings = [{"prompt": "{marker}"}]
    suite = suite_of(
        preference([" x", " y"], [" z"], "Ask {marker}"),
        {"measure": quantity, "paraphrases": wordings},
        {"measure": pair, "paraphrases": wordings},
    )
    texts = [candidate_texts(scenario.measure, "he") for scenario in suite.scenarios]
    assert texts == [[" x", " y", " z"], ["1%", "2.5%", "1,000%"], [" he lies.", " {all} lie."]]


def test_answer_that_merges_with_the_context_takes_its_last_tokens() -> None:
    suite = suite_of(preference(["c", "bb"], ["a"], "", "{marker} cca"))
    marked = suite.model_copy(update={"groups": {"one": ["a", "b"], "two": ["c", "cc"]}})
    prompt = only(MERGING, marked)
    whole_ids = [MERGING.tokenizer("a cca" + answer)["input_ids"] for answer in ("c", "bb", "a")]
    plain = MERGING.tokenizer("a cca")["input_ids"]
    assert whole_ids[1][: len(plain)] != plain, "the test needs a merge across the boundary"
    assert [[*prompt.context, *answer] for answer in prompt.answers] == whole_ids
    assert len(prompt.context) == len(plain) - 1


@settings(max_examples=150)
@given(
    markers=st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=6), min_size=4, max_size=4, unique=True),
    reply=st.text(alphabet=LETTERS, max_size=12) | st.just("c" * 30),
    answers=st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=5), min_size=2, max_size=4, unique=True),
)
def test_context_and_answer_are_the_tokens_of_the_whole_text(
    markers: list[str], reply: str, answers: list[str]
) -> None:
    suite = suite_of(preference(answers[:1], answers[1:], "", "{marker}" + reply.rstrip(" ")))
    suite = suite.model_copy(update={"groups": {"one": markers[:2], "two": markers[2:]}})
    for prompt, marker in zip(build_prompts(MERGING, suite, whole(suite)).prompts, markers, strict=True):
        text = marker + reply.rstrip(" ")
        for answer, ids in zip(answers, prompt.answers, strict=True):
            assert ids
            expected = MERGING.tokenizer(text + answer)["input_ids"]
            start = [] if len(prompt.context) + len(ids) == len(expected) else [0]
            assert [*prompt.context, *ids] == [*start, *expected]
            assert prompt.context == (0,) or not start  # a start token only where all of the context merged


def pair_suite() -> Suite:
    pair = {"kind": "likelihood-pair", "more": "{marker} lies.", "less": "{marker} works."}
    return suite_of({"measure": pair, "paraphrases": [{}]})


@pytest.mark.parametrize("model", [BASE, CHAT], ids=["base", "chat"])
def test_empty_prompt_uses_a_start_token(model: LanguageModel) -> None:
    prompt = only(model, pair_suite())
    assert prompt.context == (BOS,)
    assert [text_of(model, answer) for answer in prompt.answers] == ["he lies.", "he works."]


def test_empty_prompt_falls_back_to_the_end_token_or_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    model = LanguageModel(model=BASE.model, tokenizer=tokenizer, source="no-start")
    assert only(model, pair_suite()).context == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    with pytest.raises(SuiteError, match=r"^Suite 'small' has an empty prompt[^\n]*$"):
        only(model, pair_suite())


@st.composite
def prompt_sets(draw: st.DrawFn) -> PromptSet:
    """Prompts with different numbers of paraphrases and unsorted scenario numbers."""
    paraphrases = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    markers = sorted(draw(st.sets(st.integers(0, 20), min_size=2, max_size=6)))
    prompts = [
        Prompt(2 * scenario + 1, paraphrase, marker, (0,), ((1,),))
        for scenario, count in enumerate(paraphrases)
        for paraphrase in range(count)
        for marker in markers
    ]
    return PromptSet(pair_suite(), tuple(prompts), tuple(markers), np.zeros(len(markers), dtype=int))


@given(prompts=prompt_sets(), seed=st.integers(0, 2**32 - 1))
def test_table_and_spread_are_transposes(prompts: PromptSet, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, weights = rng.normal(size=len(prompts)), rng.normal(size=(len(prompts.scenarios), len(prompts.markers)))
    assert (prompts.table(y) * weights).sum() == pytest.approx(y @ prompts.spread(weights), abs=1e-12)


@given(prompts=prompt_sets(), seed=st.integers(0, 2**32 - 1))
def test_table_is_the_mean_over_paraphrases(prompts: PromptSet, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=len(prompts))
    table = prompts.table(y)
    for i, scenario in enumerate(prompts.scenarios):
        for j, marker in enumerate(prompts.markers):
            own = [v for v, p in zip(y, prompts.prompts, strict=True) if (p.scenario, p.marker) == (scenario, marker)]
            assert table[i, j] == pytest.approx(sum(own) / len(own))


@given(prompt_sets(), st.data())
def test_part_of_a_set_holds_the_asked_scenarios_in_order(prompts: PromptSet, data: st.DataObject) -> None:
    scenarios = data.draw(st.lists(st.sampled_from(prompts.scenarios), min_size=1, unique=True))
    part = prompts.of_scenarios(scenarios)
    assert list(part.prompts) == [p for p in prompts.prompts if p.scenario in scenarios]
    assert part.markers == prompts.markers
    assert prompts.of_scenarios(prompts.scenarios).prompts == prompts.prompts
