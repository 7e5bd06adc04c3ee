"""From a suite to token sequences: filled, rendered, tokenised prompts with their candidate answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from secateur.errors import SettingError, SuiteError
from secateur.measures.splits import Part
from secateur.models import LanguageModel
from secateur.suites import LikelihoodPair, Preference, Suite, fill, fill_text

ChatMode = Literal["auto", "chat", "plain"]
# Answer tokenisation depends on the text just before the answer; this many characters of it, and,
# where one unbroken word is longer, on where its last tokens begin.
BOUNDARY = 24
BOUNDARY_TOKENS = 4
DRAW_MARKERS = 4
# Chat templates that print today's date or think aloud would make results depend on the day or
# start the reply elsewhere; templates that know nothing of these arguments ignore them.
TEMPLATE_ARGUMENTS: dict[str, Any] = {"date_string": "1 January 2026", "enable_thinking": False}


@dataclass(frozen=True)
class Prompt:
    """One filled prompt.

    Attributes
    ----------
    scenario, paraphrase, marker: positions in the suite; markers count through all groups.
    context: token ids up to the answer.
    answers: token ids of every candidate answer, in the order of :func:`candidate_texts`.
    """

    scenario: int
    paraphrase: int
    marker: int
    context: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class PromptSet:
    """The prompts of one part of a suite, ordered by scenario, paraphrase and marker.

    Attributes
    ----------
    suite: the suite they come from.
    prompts: the prompts.
    markers: flat marker positions in this set, ascending.
    groups: int array (markers,), the group of each of them.
    """

    suite: Suite
    prompts: tuple[Prompt, ...]
    markers: tuple[int, ...]
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def scenarios(self) -> list[int]:
        return sorted({prompt.scenario for prompt in self.prompts})

    def where(self, chosen: np.ndarray) -> PromptSet:
        """The prompts at which ``chosen``, bool (prompts,), is true."""
        prompts = tuple(prompt for prompt, kept in zip(self.prompts, chosen, strict=True) if kept)
        return PromptSet(self.suite, prompts, self.markers, self.groups)

    def of_scenarios(self, scenarios: Sequence[int]) -> PromptSet:
        """The prompts of some scenarios only."""
        return self.where(np.array([prompt.scenario in scenarios for prompt in self.prompts], dtype=bool))

    def table(self, y: np.ndarray) -> np.ndarray:
        """Arrange y by prompt, (prompts,), as (scenarios, markers), averaged over paraphrases; NaN where none asks."""
        scenario = {s: i for i, s in enumerate(self.scenarios)}
        marker = {m: i for i, m in enumerate(self.markers)}
        rows = [scenario[prompt.scenario] for prompt in self.prompts]
        columns = [marker[prompt.marker] for prompt in self.prompts]
        total = np.zeros((len(scenario), len(marker)))
        count = np.zeros_like(total)
        np.add.at(total, (rows, columns), y)
        np.add.at(count, (rows, columns), 1)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """The transpose of :meth:`table`: weights (scenarios, markers) to weights by prompt."""
        scenario = {s: i for i, s in enumerate(self.scenarios)}
        marker = {m: i for i, m in enumerate(self.markers)}
        rows = np.array([scenario[prompt.scenario] for prompt in self.prompts])
        columns = np.array([marker[prompt.marker] for prompt in self.prompts])
        count = np.zeros((len(scenario), len(marker)))
        np.add.at(count, (rows, columns), 1)
        return np.asarray(weights[rows, columns] / count[rows, columns])


def check_chat(mode: str) -> ChatMode:
    """Validate the name of a chat mode."""
    if mode not in get_args(ChatMode):
        raise SettingError(f"Unknown chat mode '{mode}'; choose auto, chat or plain.")
    return mode  # type: ignore[return-value]


def all_markers(suite: Suite) -> list[tuple[int, str]]:
    """Every marker with the position of its group, in the suite's order."""
    return [(g, marker) for g, markers in enumerate(suite.groups.values()) for marker in markers]


def render(model: LanguageModel, prompt: str, reply: str, chat: ChatMode = "auto") -> str:
    """The text given to the model: through the chat template, or plain.

    Parameters
    ----------
    chat: "auto" uses the template where the tokenizer has one; "chat" insists on it; "plain"
        joins prompt and reply by a line break.
    """
    if chat == "plain" or (chat == "auto" and not model.is_chat):
        return "\n".join(part for part in (prompt, reply) if part) if reply else prompt + ("\n" if prompt else "")
    if not model.is_chat:
        raise SettingError(f"The model '{model.source}' has no chat template; use --chat plain or auto.")
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        **TEMPLATE_ARGUMENTS,
    )
    return f"{text}{reply}"


def candidate_texts(measure: Any, marker: str) -> list[str]:
    """The texts of all candidate answers of a measure."""
    if isinstance(measure, Preference):
        return [*measure.a, *measure.b]
    if isinstance(measure, LikelihoodPair):
        return [fill_text(measure.more, marker), fill_text(measure.less, marker)]
    return list(measure.candidates)


@dataclass(frozen=True)
class PromptDraw:
    """Flat positions of markers, and numbers of scenarios, both ascending."""

    markers: tuple[int, ...]
    scenarios: tuple[int, ...]

    def of(self, prompts: PromptSet) -> PromptSet:
        """The drawn ones of a set of prompts."""
        drawn = prompts.of_scenarios(self.scenarios)
        kept = tuple(prompt for prompt in drawn.prompts if prompt.marker in self.markers)
        inside = np.isin(prompts.markers, self.markers)
        return PromptSet(prompts.suite, kept, self.markers, prompts.groups[inside])

    @classmethod
    def stratified(
        cls, prompts: PromptSet, markers: int | None, scenarios: int | None, seed: int | Sequence[int]
    ) -> PromptDraw:
        """Draw equally many markers of each group, and scenarios.

        Parameters
        ----------
        markers: of each group, all if it has fewer. None stands for 4, but for no more than half of a group (at
            least 2), so that draws differ.
        scenarios: all if there are fewer, or None.
        """
        rng = np.random.default_rng(seed)
        chosen: list[int] = []
        for group in np.unique(prompts.groups):
            members = np.array(prompts.markers)[prompts.groups == group]
            size = min(DRAW_MARKERS, max(2, (len(members) + 1) // 2)) if markers is None else markers
            chosen += rng.permutation(members)[:size].tolist()
        asked = rng.permutation(prompts.scenarios)[:scenarios].tolist()
        return cls(tuple(sorted(chosen)), tuple(sorted(asked)))


def build_prompts(model: LanguageModel, suite: Suite, part: Part, chat: ChatMode = "auto") -> PromptSet:
    """Fill, render and tokenise the prompts of one part of a suite."""
    markers = all_markers(suite)
    tokenise = _Tokeniser(model, chat)
    prompts = [
        tokenise.prompt(suite, scenario, paraphrase, marker, markers[marker][1])
        for scenario, paraphrases in enumerate(part.paraphrases)
        for paraphrase in paraphrases
        for marker in part.markers
    ]
    groups = np.array([markers[marker][0] for marker in part.markers])
    return PromptSet(suite, tuple(prompts), tuple(part.markers), groups)


class _Tokeniser:
    """Tokenises contexts and answers; an answer after the same last characters is looked up."""

    def __init__(self, model: LanguageModel, chat: ChatMode) -> None:
        self.model = model
        self.chat: ChatMode = chat
        self.plain = chat == "plain" or (chat == "auto" and not model.is_chat)
        self.known: dict[tuple[str, tuple[int, ...], tuple[str, ...]], tuple[int, list[list[int]]]] = {}

    def encode(self, text: str) -> list[int]:
        # A chat template writes its own special tokens.
        return list(self.model.tokenizer(text, add_special_tokens=self.plain)["input_ids"])

    def prompt(self, suite: Suite, scenario: int, paraphrase: int, marker: int, word: str) -> Prompt:
        measure = suite.scenarios[scenario].measure
        message, reply = fill(suite.scenarios[scenario].paraphrases[paraphrase], word)
        no_text = not message and not reply
        text = "" if no_text else render(self.model, message, reply, self.chat)
        candidates = candidate_texts(measure, word)
        context = self.encode(text)
        key = (text[-BOUNDARY:], tuple(context[-BOUNDARY_TOKENS:]), tuple(candidates))
        if key not in self.known:
            self.known[key] = self._split(text, context, candidates)
        dropped, answers = self.known[key]
        context = context[: len(context) - dropped]
        if not context:
            context = [self._start_token(suite)]
        if any(not answer for answer in answers):
            raise SuiteError(f"Suite '{suite.name}': an answer of scenario {scenario} is empty for this tokenizer.")
        return Prompt(scenario, paraphrase, marker, tuple(context), tuple(tuple(a) for a in answers))

    def _split(self, text: str, context: list[int], candidates: Sequence[str]) -> tuple[int, list[list[int]]]:
        """How many context tokens merge with the answers, and the answers' own tokens.

        Text and answer are tokenised together, as the model would have read them; where the last
        tokens of the context merge into the answer, they are counted as part of every answer.
        """
        whole = [self.encode(text + candidate) for candidate in candidates]
        shared = min(_common_prefix(context, ids) for ids in whole)
        return len(context) - shared, [ids[shared:] for ids in whole]

    def _start_token(self, suite: Suite) -> int:
        tokenizer = self.model.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise SuiteError(f"Suite '{suite.name}' has an empty prompt, and this tokenizer has no start token.")
        return int(start)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
