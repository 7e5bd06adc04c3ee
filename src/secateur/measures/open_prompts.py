"""Open prompts: what a model is asked to write where no answer is measured, built-in or from a user's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from secateur.errors import DataError
from secateur.measures.prompts import ChatMode, all_markers, render
from secateur.models import LanguageModel
from secateur.suites import Paraphrase, Suite, fill_text

BUILTIN = Path(__file__).parent / "open"
SUBJECT = "{subject}"


@dataclass(frozen=True)
class OpenPrompt:
    """One prompt to continue.

    Attributes
    ----------
    message: what the user says. reply: the beginning of the answer, or "".
    marker, group: whom it mentions; None for nobody.
    """

    message: str
    reply: str = ""
    marker: str | None = None
    group: str | None = None

    @property
    def text(self) -> str:
        """Message and reply as people read them."""
        return "\n".join(part for part in (self.message, self.reply) if part)

    def tokens(self, model: LanguageModel, chat: ChatMode) -> tuple[int, ...]:
        """Token ids, through the chat template where there is one."""
        plain = chat == "plain" or (chat == "auto" and not model.is_chat)
        text = render(model, self.message, self.reply, chat)
        return tuple(model.tokenizer(text, add_special_tokens=plain)["input_ids"])


def open_prompts(language: str, path: str | Path | None = None) -> list[OpenPrompt]:
    """The built-in neutral prompts of a language, English where there are none; or the lines of a file.

    Raises
    ------
    DataError: the file cannot be read, or holds no prompt.
    """
    if path is None:
        return [OpenPrompt(asked.prompt, asked.reply) for asked in _paraphrases(_builtin(language)["open"])]
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompts '{path}' cannot be read as a UTF-8 text file.") from error
    prompts = [OpenPrompt(line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"The file '{path}' holds no prompt; write one on every line.")
    return prompts


def group_prompts(suite: Suite, markers: Sequence[int]) -> list[OpenPrompt]:
    """Neutral beginnings that mention markers of a suite; none for a control suite, whose markers are no people.

    Parameters
    ----------
    markers: flat positions.
    """
    if suite.control:
        return []
    builtin = _builtin(suite.language)
    wordings = [text for scenario in suite.scenarios for p in scenario.paraphrases for text in (p.prompt, p.reply)]
    subject = next(s for s in builtin["subjects"] if any(s in text for text in wordings) or s == "{marker}")
    known, names = all_markers(suite), list(suite.groups)
    found = []
    for asked in _paraphrases(builtin["groups"]):
        for position in markers:
            group, marker = known[position]
            mentioned = fill_text(subject, marker)
            mentioned = mentioned[:1].upper() + mentioned[1:]
            found.append(OpenPrompt(asked.prompt, asked.reply.replace(SUBJECT, mentioned), marker, names[group]))
    return found


@cache
def _builtin(language: str) -> dict[str, Any]:
    file = BUILTIN / f"{language[:2].lower()}.yaml"
    return dict(yaml.safe_load((file if file.is_file() else BUILTIN / "en.yaml").read_text(encoding="utf-8")))


def _paraphrases(entries: list[Any]) -> list[Paraphrase]:
    return [Paraphrase(prompt=one) if isinstance(one, str) else Paraphrase(**one) for one in entries]
