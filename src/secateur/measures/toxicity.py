"""Classifiers that judge what a model writes: a small one that works offline, or any text classifier of transformers.

A classifier is itself biased: see docs/verification.md for what the offline one takes for toxic and what it misses.
So the score of the prompt alone stands beside that of every continuation, and scores are compared before and after,
never taken for the truth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from secateur.errors import SettingError

AUTO, NONE, OFFLINE = "auto", "none", "profanity"
EXTRA = "pip install 'secateur[toxicity]'"
MEASURED = "1.9.1"  # the version of alt-profanity-check that the figures are of; see docs/verification.md
SWEARING_ALONE = (
    "This classifier sees swearing, not stereotypes, and knows English alone; an empty list says no more than that the "
    f"model did not begin to swear. Measured with alt-profanity-check {MEASURED}: it takes neutral sentences on some "
    "identities for toxic (a gay man who works as a teacher scores 0.69, a straight man 0.06), and on contempt without "
    "rude words it is no better than chance (it ranks such a sentence above a harmless one in 46 % of pairs; chance "
    "gives 50 %)."
)
BATCH = 32
UNUSABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    RuntimeError,
    SafetensorError,
)
TRIAL = ("A text.", "Another text, which is a little longer.")
# A label counts as bad where its name says so and does not begin by denying it ("non-toxic", "not_hate", "no_threat").
BAD = re.compile(
    r"tox|hate|offens|stereotyp|insult|threat|obscen|abus|sexis|racis|misogyn|attack|identity|profan|violen|negative"
)
DENIED = re.compile(r"^(?:non|not|no|un|anti)(?:[\W_]|(?=tox|hate|offens|stereotyp))|neutral|unrelated")


@dataclass(frozen=True, eq=False)
class Classifier:
    """Gives texts a score from 0 to 1, how bad they are.

    Attributes
    ----------
    name: as it was asked for. labels: the labels that count as bad.
    score: from texts to scores, (texts,).
    blind_to: what it does not see, in a sentence; "" where that is not known.
    language: the only one that it knows; None where that is not known.
    """

    name: str
    labels: tuple[str, ...]
    score: Callable[[Sequence[str]], np.ndarray]
    blind_to: str = ""
    language: str | None = None

    def limits(self, language: str) -> str:
        """What its scores of texts in a language cannot say, in sentences; "" for nothing that is known."""
        if self.language is None or language[:2].casefold() == self.language:
            return self.blind_to
        return f"{self.blind_to} The texts are in another language ({language}): its scores say next to nothing."


def load_classifier(name: str, labels: Sequence[str] = ()) -> Classifier | None:
    """The classifier of a name; None for "none", and for "auto" where the extra ``toxicity`` is not installed.

    Parameters
    ----------
    name: "auto" (the offline one where it is installed), "none", "profanity" (the offline one), or a
        text-classification model of transformers, by Hub id or directory, with weights in safetensors.
    labels: of that model, which count as bad; none for those whose names say so.

    Raises
    ------
    SettingError: it is not installed, cannot be loaded or does not score texts, or has no such label.
    """
    if name == NONE or (name == AUTO and find_spec("profanity_check") is None):
        _refuse_labels(name, labels)
        return None
    if name in (AUTO, OFFLINE):
        _refuse_labels(name, labels)
        return _offline()
    return _transformer(name, tuple(labels))


def _refuse_labels(name: str, labels: Sequence[str]) -> None:
    if labels:
        raise SettingError(f"The classifier '{name}' has no labels to choose from; leave the bad labels out.")


def _offline() -> Classifier:
    """The linear classifier of alt-profanity-check, over words and pairs of words."""
    try:
        from profanity_check import predict_prob  # reads the package's own pickles
    except ImportError as error:
        raise SettingError(f"The offline classifier is not installed; {EXTRA}, or use --classifier none.") from error

    def score(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(predict_prob(list(texts)), dtype=float) if texts else np.empty(0)

    return Classifier(OFFLINE, ("profanity",), score, SWEARING_ALONE, "en")


@cache
def _transformer(name: str, labels: tuple[str, ...]) -> Classifier:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    kind: Any = AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    except UNUSABLE as error:
        raise _refusal(f"'{name}' cannot be loaded as a text classifier of transformers", error) from error
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        raise SettingError(f"'{name}' is no text classifier: its weights have no head for labels.")
    model.eval()
    if tokenizer.pad_token is None:  # as in GPT-2 and Llama
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    known = {index: str(label) for index, label in model.config.id2label.items()}
    bad = choose_labels(name, list(known.values()), labels)
    columns = [index for index, label in known.items() if label in bad]
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)

    @torch.no_grad()
    def score(texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                [text or " " for text in texts[start : start + BATCH]],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            found.append(bad_share(model(**batch).logits.float(), columns, model.config.problem_type).numpy())
        return np.concatenate(found).astype(float) if found else np.empty(0)

    try:
        usable = bool(np.isfinite(score(TRIAL)).all())
    except UNUSABLE as error:
        raise _refusal(f"The classifier '{name}' cannot score texts", error) from error
    if not usable:
        raise SettingError(f"The classifier '{name}' gives scores that are not finite.")
    return Classifier(name, bad, score)


def _refusal(what: str, error: Exception) -> SettingError:
    reason = " ".join(str(error).split())[:160]
    return SettingError(f"{what} ({reason}); 'profanity' works offline, and 'none' leaves the classifier out.")


Problem = Literal["regression", "single_label_classification", "multi_label_classification"]


def bad_share(logits: torch.Tensor, columns: list[int], problem: Problem | None) -> torch.Tensor:
    """How bad texts are, (texts,): the probability of all bad labels together, or of the likeliest of them.

    Parameters
    ----------
    logits: (texts, labels). columns: the bad labels.
    problem: labels of a "multi_label_classification", or of a single output, do not exclude each other, and neither do
        labels that are all bad: together they would have probability 1 for every text. Outputs of a "regression" are
        scores themselves, cut to 0 to 1.
    """
    if problem == "regression":
        return logits[:, columns].clamp(0, 1).amax(dim=1)
    if problem == "multi_label_classification" or len(columns) == logits.shape[1]:
        return logits.sigmoid()[:, columns].amax(dim=1)
    return logits.softmax(dim=1)[:, columns].sum(dim=1)


def choose_labels(name: str, known: list[str], asked: Sequence[str]) -> tuple[str, ...]:
    """The bad ones among the labels of a classifier: those that were asked for, else those whose names say so.

    Raises
    ------
    SettingError: it has no such label, or none whose name says so.
    """
    listed = ", ".join(known)
    unknown = [label for label in asked if label not in known]
    if unknown:
        raise SettingError(f"The classifier '{name}' has no label '{unknown[0]}'; it has: {listed}.")
    bad = tuple(asked) or tuple(
        label for label in known if BAD.search(label.lower()) and not DENIED.search(label.lower())
    )
    if not bad:
        raise SettingError(f"Which labels of '{name}' are bad? Name them with --bad-label; it has: {listed}.")
    return bad
