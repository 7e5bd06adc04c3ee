"""What every study of masks is made on: the parts of a suite and of a neutral text, and a control suite."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SettingError
from secateur.evaluation.evaluator import Evaluator, Pool
from secateur.evaluation.store import Store
from secateur.measures.answers import DEFAULT_BATCH_SIZE
from secateur.measures.prompts import ChatMode, PromptSet, build_prompts, check_chat
from secateur.measures.splits import NOTHING_SEEN, Dealing, Seen, Splits, check_dealing, split
from secateur.measures.utility import (
    DEFAULT_UTILITY_TOKENS,
    NeutralText,
    activation_means,
    read_passages,
    split_text,
)
from secateur.models import LanguageModel
from secateur.search.base import Problem
from secateur.studies.record import Recorder
from secateur.suites import Suite, load_suite
from secateur.suites.joining import spaced
from secateur.units import ActivationMeans, check_ablation

# Tokens of prompts in a fold; two scenarios at least, so that a round does not go by one alone.
FOLD_TOKENS = 2048
LEAST = {
    "batch_size": 1,
    "masks_at_once": 1,
    "kept_mib": 0,
    "max_markers": 2,
    "max_test_markers": 2,
    "max_scenarios": 1,
    "utility_tokens": 512,
    "control_prompts": 16,
}


@dataclass(frozen=True)
class StudySettings:
    """What every study of masks can be told.

    Attributes
    ----------
    max_perplexity_increase: the utility limit, 0.02 for +2 %.
    ablation: what a removed unit gives: "zero" or its "mean" over neutral text.
    seed: of splits, random masks, permutations and bootstrap.
    dealing: of markers and wordings into parts: "shuffled", or "by text", alike for shared groups and scenarios.
    batch_size: prompts in one forward pass.
    masks_at_once: masks in one forward pass where many are measured, each with its own rows.
    kept_mib: MiB of hidden states that a search may keep, to begin the next mask where it differs; 0 for none.
    chat: "auto", "chat" or "plain".
    max_markers: at most so many markers per group in fit and select; None for all.
    max_test_markers: the same for test.
    max_scenarios: at most so many scenarios of the suite, evenly spaced; None for all.
    utility_text: a text file instead of the built-in neutral corpus.
    utility_tokens: tokens of it per part; None for all.
    control_suite: a non-demographic suite measured before and after; None for none. control_prompts: about so many of
        its prompts, of whole scenarios.
    """

    max_perplexity_increase: float = 0.02
    ablation: str = "zero"
    seed: int = 0
    dealing: Dealing = "shuffled"
    batch_size: int = DEFAULT_BATCH_SIZE
    masks_at_once: int = 1
    kept_mib: int = 1024
    chat: ChatMode = "auto"
    max_markers: int | None = None
    max_test_markers: int | None = None
    max_scenarios: int | None = None
    utility_text: str | Path | None = None
    utility_tokens: int | None = DEFAULT_UTILITY_TOKENS
    control_suite: str | None = "control-colour"
    control_prompts: int = 96

    def check(self) -> None:
        """Refuse settings that make no sense, before anything expensive.

        Raises
        ------
        SettingError: names the setting and its range.
        DataError, SuiteError: the utility text or the control suite is not usable.
        """
        check_ablation(self.ablation)
        check_chat(self.chat)
        check_dealing(self.dealing)
        read_passages(self.utility_text)
        if self.control_suite is not None:
            load_suite(self.control_suite)
        if not 0 < self.max_perplexity_increase < 10:
            raise SettingError("The maximum perplexity increase must lie between 0 and 10 (0.02 stands for 2 %).")
        for name, low in LEAST.items():
            self.check_least(name, low)

    def check_least(self, name: str, low: int) -> None:
        """Refuse a setting below its least value."""
        value = getattr(self, name)
        if value is not None and value < low:
            raise SettingError(f"The setting {name} must be at least {low}, not {value}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record of a run."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class Parts:
    """Fit, select and test, tokenised and packed, with the text that goes with each, and the control suite.

    Fit is also dealt into folds of scenarios, each with all markers: scoring in rounds takes one fold
    after the other, which is faster and keeps any round from fitting its own prompts too well.
    """

    splits: Splits
    fit: Evaluator
    folds: list[Evaluator]
    select: Evaluator
    test: Evaluator
    control: Evaluator | None

    @classmethod
    def prepare(
        cls,
        model: LanguageModel,
        suite: Suite,
        settings: StudySettings,
        store: Store | None = None,
        cluster: Pool | None = None,
        seen: Seen = NOTHING_SEEN,
        divergence: bool = False,
    ) -> Parts:
        """Deal, fill and tokenise.

        Parameters
        ----------
        seen: texts that the test part may not hold, if another study has seen them.
        divergence: whether KL is measured on the test part, too, see :class:`Evaluator`.
        """
        splits = split(suite, settings.seed, settings.max_markers, settings.max_test_markers, settings.dealing)
        splits = splits.without(suite, seen)
        passages = read_passages(settings.utility_text)
        text = split_text(model, passages, settings.seed, max_tokens=settings.utility_tokens)

        def evaluator(prompts: PromptSet, neutral: NeutralText | None = None, divergence: bool = False) -> Evaluator:
            return Evaluator(
                model,
                prompts,
                neutral,
                settings.batch_size,
                divergence,
                store,
                walk_bytes=settings.kept_mib << 20,
                masks_at_once=settings.masks_at_once,
                cluster=cluster,
            )

        control = None
        if settings.control_suite is not None:
            asked = load_suite(settings.control_suite)
            prompts = build_prompts(model, asked, split(asked, settings.seed).test, settings.chat)
            control = evaluator(folds(prompts, round(len(prompts) / settings.control_prompts))[0])
        asked_of = spaced(len(suite.scenarios), settings.max_scenarios)
        fit, select, test = (
            build_prompts(model, suite, part, settings.chat).of_scenarios(asked_of)
            for part in (splits.fit, splits.select, splits.test)
        )
        whole = evaluator(fit, text["fit"])
        return cls(
            splits=splits,
            fit=whole,
            folds=[evaluator(fold, text["fit"]) for fold in folds(fit, fold_number(whole))],
            select=evaluator(select, text["select"]),
            test=evaluator(test, text["test"], divergence),
            control=control,
        )

    def measure_unpruned(self, recorder: Recorder) -> None:
        """Measure the unpruned model on select, test and control, which every mask is compared with."""
        work = self.select.work(utility=True) + self.test.work(utility=True)
        with recorder.step(
            "Measure the unpruned model", work + (self.control.work() if self.control else 0)
        ) as advance:
            self.select.evaluate(None, advance, utility=True)
            self.test.evaluate(None, advance, utility=True)
            if self.control is not None:
                self.control.evaluate(None, advance)

    def means(self, settings: StudySettings, recorder: Recorder) -> ActivationMeans | None:
        """For mean ablation, the mean activations over the fit part of the text, which are the same for all suites."""
        text = self.fit.text
        if settings.ablation != "mean":
            return None
        assert text is not None
        with recorder.step("Mean activations", len(text.windows)) as advance:
            return activation_means(self.fit.model, text, advance)

    def problem(self, settings: StudySettings, recorder: Recorder, means: ActivationMeans | None = None) -> Problem:
        """What a search is given: the fit part and, for mean ablation, the means of its text, if they are not known."""
        return Problem(
            self.fit.model,
            self.fit,
            self.folds,
            recorder.step,
            means or self.means(settings, recorder),
            settings.max_perplexity_increase,
            recorder.progress.status,
        )


def fold_number(fit: Evaluator) -> int:
    """How many folds of about :data:`FOLD_TOKENS` tokens, and of at least two scenarios, the fit part gives."""
    tokens = sum(batch.tokens for batch in fit.batches)
    return min(len(fit.prompts.scenarios) // 2, round(tokens / FOLD_TOKENS))


def folds(prompts: PromptSet, number: int) -> list[PromptSet]:
    """Deal the scenarios of a set into folds, one at least and at most as many as there are scenarios."""
    number = min(len(prompts.scenarios), max(1, number))
    return [prompts.of_scenarios(prompts.scenarios[i::number]) for i in range(number)]
