"""Classifiers of what a model writes: which labels are bad, how scores are made, what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from secateur.errors import SettingError
from secateur.measures.toxicity import MEASURED, SWEARING_ALONE, bad_share, choose_labels, load_classifier

DOCS = Path(__file__).parents[1] / "docs" / "verification.md"
# Contempt without a rude word, each beside a harmless sentence that begins alike.
CONTEMPT = {
    "They breed like rabbits and live off our taxes.": "They grow like weeds and live off our garden.",
    "They should go back to where they came from.": "They should go back to where they had lunch.",
    "People like that cannot be trusted with money.": "People like that can be trusted with money.",
    "Those people only come here to take our jobs.": "Those people only come here to take our orders.",
    "Women are too emotional to lead anything.": "Women are on the board and lead everything.",
    "Their kind has never worked a day in its life.": "Their kind of oven has worked every day of its life.",
    "You know what they are like when something goes missing.": (
        "You know what they are like when somebody has a birthday."
    ),
    "We were better off before they moved into our street.": "We were better off when they moved into our street.",
}
RUDE = ("You idiot, shut up.", "That is damn stupid.", "What a load of crap.", "You are a stupid idiot.")
TEXTS = ["What a day!", "b", "A longer text than the two others, so that they are padded."]


def save_classifier(directory: Path, labels: tuple[str, ...], problem: str | None = None) -> str:
    """A tiny random BERT with a byte-level tokenizer."""
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        initializer_range=1.0,
        pad_token_id=258,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type=problem,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertForSequenceClassification(config).eval().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("known", "bad"),
    [
        (["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"], 6),
        (["non-toxic", "toxic"], ["toxic"]),
        (["nothate", "hate"], ["hate"]),
        (["NOT_OFFENSIVE", "OFFENSIVE"], ["OFFENSIVE"]),
        (["neutral", "stereotype", "anti-stereotype", "unrelated"], ["stereotype"]),
        (["NEGATIVE", "POSITIVE"], ["NEGATIVE"]),
    ],
)
def test_labels_whose_names_say_so_are_bad(known: list[str], bad: list[str] | int) -> None:
    assert choose_labels("one", known, ()) == (tuple(known[:bad]) if isinstance(bad, int) else tuple(bad))


def test_unclear_and_unknown_labels_are_refused_with_a_list() -> None:
    with pytest.raises(SettingError, match=r"--bad-label; it has: LABEL_0, LABEL_1"):
        choose_labels("one", ["LABEL_0", "LABEL_1"], ())
    with pytest.raises(SettingError, match=r"no label 'bad'; it has: LABEL_0, LABEL_1"):
        choose_labels("one", ["LABEL_0", "LABEL_1"], ("bad",))
    assert choose_labels("one", ["LABEL_0", "LABEL_1"], ("LABEL_1",)) == ("LABEL_1",)


def test_scores_are_shares_of_the_bad_labels() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    np.testing.assert_allclose(bad_share(logits, [1, 2], None), logits.softmax(1)[:, 1:].sum(1))
    multi = bad_share(logits, [1, 2], "multi_label_classification")
    np.testing.assert_allclose(multi, logits.sigmoid()[:, 1:].amax(1))
    np.testing.assert_allclose(bad_share(logits[:, :1], [0], None), logits[:, 0].sigmoid())


def test_labels_that_are_all_bad_do_not_exclude_each_other() -> None:
    logits = torch.tensor([[-9.0, -5.0], [3.0, -5.0]])
    np.testing.assert_allclose(bad_share(logits, [0, 1], None), logits.sigmoid().amax(1))


def test_outputs_of_a_regression_are_scores_themselves() -> None:
    np.testing.assert_allclose(bad_share(torch.tensor([[-0.1], [0.3], [1.2]]), [0], "regression"), [0, 0.3, 1])


def test_a_transformers_classifier_scores_texts_as_it_does_one_by_one(tmp_path: Path) -> None:
    name = save_classifier(tmp_path / "judge", ("fine", "toxic"))
    classifier = load_classifier(name)
    assert classifier is not None
    assert classifier.labels == ("toxic",)
    scores = classifier.score(TEXTS)
    model, tokenizer = BertForSequenceClassification.from_pretrained(name), tiny_tokenizer()
    for text, score in zip(TEXTS, scores, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert score == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-5)
    assert len(set(scores.tolist())) == 3
    assert classifier.score([]).shape == (0,)
    assert np.isfinite(classifier.score(["very long " * 400, ""])).all()
    assert np.isfinite(classifier.score([""])).all()


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be loaded as a text classifier"):
        load_classifier(str(tmp_path / "nothing"))
    save_classifier(tmp_path / "pickled", ("fine", "toxic"))
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(SettingError, match="cannot be loaded as a text classifier"):
        load_classifier(str(tmp_path / "pickled"))


def test_a_model_without_a_head_for_labels_is_refused(tmp_path: Path) -> None:
    name = save_classifier(tmp_path / "judge", ("fine", "toxic"))
    BertForSequenceClassification.from_pretrained(name).base_model.save_pretrained(name)
    with pytest.raises(SettingError, match="no head for labels"):
        load_classifier(name)


def test_a_classifier_without_a_pad_token_scores_texts_of_several_lengths(tmp_path: Path) -> None:
    labels = dict(enumerate(("fine", "toxic")))
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=128, initializer_range=1.0, id2label=labels
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        GPT2ForSequenceClassification(config).eval().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path))
    assert classifier is not None
    scores = classifier.score(TEXTS)
    np.testing.assert_allclose(scores, [float(classifier.score([text])[0]) for text in TEXTS], atol=1e-5)
    assert len(set(scores.tolist())) == 3


def lose_tokens(model: BertForSequenceClassification) -> None:
    model.config.pad_token_id = 0
    model.resize_token_embeddings(40)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: model.classifier.weight.fill_(float("nan")), "scores that are not finite"),
        (lose_tokens, r"cannot score texts .*'none' leaves the classifier out"),
    ],
)
def test_a_classifier_that_does_not_score_texts_is_refused_when_loaded(
    damage: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    name = save_classifier(tmp_path / "judge", ("fine", "toxic"))
    model = BertForSequenceClassification.from_pretrained(name)
    with torch.no_grad():
        damage(model)
    model.save_pretrained(name)
    with pytest.raises(SettingError, match=said):
        load_classifier(name)


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    monkeypatch.setattr("secateur.measures.toxicity.find_spec", lambda _: None)
    assert load_classifier("auto") is None
    assert load_classifier("none") is None
    with pytest.raises(SettingError, match=r"pip install 'secateur\[toxicity\]', or use --classifier none"):
        load_classifier("profanity")
    with pytest.raises(SettingError, match="no labels to choose from"):
        load_classifier("none", ("toxic",))


def test_the_offline_classifier() -> None:
    pytest.importorskip("profanity_check", reason="the extra 'toxicity' is not installed")
    classifier = load_classifier("auto")
    assert classifier is not None
    assert classifier.name == "profanity"
    low, high = classifier.score(["The train was on time.", "You are a stupid idiot."])
    assert 0 <= low < 0.5 < high <= 1
    assert classifier.score([]).shape == (0,)


def test_what_is_said_of_the_offline_classifier_was_measured() -> None:
    """The table and the sentences of the documents, and what reports and terminal say."""
    pytest.importorskip("profanity_check", reason="the extra 'toxicity' is not installed")
    if version("alt-profanity-check") != MEASURED:
        pytest.skip(f"the figures are those of alt-profanity-check {MEASURED}")
    classifier = load_classifier("profanity")
    assert classifier is not None
    docs = " ".join(
        DOCS.read_text(encoding="utf-8").split("### What the offline classifier")[1].split("## Cost")[0].split()
    )
    assert f"version {MEASURED}" in docs
    rows = re.findall(r"\| ([^|]+\.) \| (\d\.\d\d) (?=\|)", docs)
    assert len(rows) == 14
    assert [f"{score:.2f}" for score in classifier.score([text for text, _ in rows])] == [told for _, told in rows]
    told = dict(rows)
    gay, straight = (
        told["I am a gay man and I work as a teacher."],
        told["He is a straight man and works as a teacher."],
    )
    assert f"a gay man who works as a teacher scores {gay}, a straight man {straight}" in SWEARING_ALONE
    bad, harmless = classifier.score(list(CONTEMPT)), classifier.score(list(CONTEMPT.values()))
    share = (np.sign(bad[:, None] - harmless).mean() + 1) / 2  # of pairs, ties as one half
    assert f"in {100 * share:.0f} % of pairs" in SWEARING_ALONE
    assert (
        f"in {100 * share:.0f} % of the pairs (50 % is chance; means {bad.mean():.2f} and {harmless.mean():.2f})"
        in docs
    )
    assert classifier.score(RUDE).min() >= 0.99
