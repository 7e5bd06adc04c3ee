"""The sampled form of a quantity: amounts read from sampled answers, to verify the deterministic measure.

``quantity`` takes the mean logarithm over a grid of candidate amounts, which has no noise and a gradient.
What a user sees are sampled answers. Here the model answers each prompt several times at a temperature, a
parser (:mod:`secateur.measures.amounts`) reads the first amount of each answer, and the logarithms take the place
of y. A grid may count in thousands where answers are written out; its logarithms then differ from those of samples
by a constant, which no gap and no SMD depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from secateur.errors import SettingError
from secateur.measures.amounts import parse_amount
from secateur.measures.answers import DEFAULT_BATCH_SIZE
from secateur.measures.generation import Request, write
from secateur.measures.prompts import PromptSet
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.suites import Quantity, Suite

RUNS = 5
TEMPERATURE = 1.0
NEW_TOKENS = 12
INLIER_RANGE = (5, 95)  # percentiles of the unpruned model's own answers


@dataclass(frozen=True, eq=False)
class SampledAmounts:
    """What a model answered.

    Attributes
    ----------
    amounts: (prompts, runs), NaN where an answer held no amount.
    prompts: the prompts of the quantity scenarios, in order.
    texts: the answers themselves, by prompt and run.
    """

    amounts: np.ndarray
    prompts: PromptSet
    texts: tuple[tuple[str, ...], ...] = ()

    @property
    def parsed(self) -> float:
        """Share of the answers that hold an amount."""
        return float(np.isfinite(self.amounts).mean())

    def y(self) -> np.ndarray:
        """Mean log amount of every prompt over its runs, (prompts,); NaN where no answer held one."""
        counted = np.isfinite(self.amounts)
        total = np.where(counted, np.log(np.where(counted, self.amounts, 1.0)), 0.0).sum(axis=1)
        return np.asarray(total / np.where(counted.any(axis=1), counted.sum(axis=1), np.nan))

    def agreement(self, y: np.ndarray) -> float:
        """Mean over scenarios of Spearman's correlation, over prompts, of the sampled with the measured y.

        Parameters
        ----------
        y: (prompts,), of the same prompts by the deterministic measure. NaN where nothing can be compared.
        """
        sampled, scenario = self.y(), np.array([prompt.scenario for prompt in self.prompts.prompts])
        correlations = []
        for number in self.prompts.scenarios:
            chosen = (scenario == number) & np.isfinite(sampled)
            if chosen.sum() > 2 and np.ptp(sampled[chosen]) > 0 and np.ptp(y[chosen]) > 0:
                correlations.append(float(spearmanr(sampled[chosen], y[chosen]).statistic))
        return float(np.mean(correlations)) if correlations else float("nan")

    def inlier_ratio(self, unpruned: SampledAmounts) -> float:
        """Share of the answers within the unpruned model's own 5-95 % range; the anomaly rate is 1 minus this."""
        return float(self.inside(unpruned).mean())

    def inside(self, unpruned: SampledAmounts) -> np.ndarray:
        """Which answers lie within the unpruned model's own 5-95 % range for the same prompt, (prompts, runs).

        Answers without an amount count as outliers, and so does every answer to a prompt that the unpruned
        model never answered with an amount. Few answers make a narrow range that does not hold 90 % of new ones;
        so judge the unpruned model too, by answers other than those that make the range.
        """
        low, high = np.full(len(self.amounts), np.nan), np.full(len(self.amounts), np.nan)
        for number, row in enumerate(unpruned.amounts):
            known = row[np.isfinite(row)]
            if len(known):
                low[number], high[number] = np.percentile(known, INLIER_RANGE)
        with np.errstate(invalid="ignore"):
            return np.asarray((self.amounts >= low[:, None]) & (self.amounts <= high[:, None]))


def quantity_prompts(prompts: PromptSet) -> PromptSet:
    """The prompts whose scenarios ask for a quantity."""
    scenarios = prompts.suite.scenarios
    return prompts.of_scenarios([s for s in prompts.scenarios if isinstance(scenarios[s].measure, Quantity)])


def check_sampling(suite: Suite, runs: int, temperature: float) -> None:
    """Refuse settings that make no sense, or a suite in which nothing is a quantity.

    Raises
    ------
    SettingError: a setting is out of range, or no scenario asks for a quantity.
    """
    if runs < 1 or not 0 < temperature < float("inf"):
        raise SettingError("Sampling needs at least 1 run and a temperature above 0.")
    if not any(isinstance(scenario.measure, Quantity) for scenario in suite.scenarios):
        raise SettingError(f"No scenario of suite '{suite.name}' asks for a quantity, so there is none to sample.")


def sample_amounts(
    model: LanguageModel,
    prompts: PromptSet,
    *,
    runs: int = RUNS,
    temperature: float = TEMPERATURE,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = 0,
    first_run: int = 0,
    advance: Advance = lambda _: None,
) -> SampledAmounts:
    """Let the model answer the quantity prompts of a set several times; equal seeds meet equal noise.

    Parameters
    ----------
    runs: answers to each prompt. temperature: of the sampling. new_tokens: longest answer.
    batch_size: answers in one forward pass. first_run: number of the first run; other numbers, other noise.
    advance: told the answers done.

    Raises
    ------
    SettingError: a setting is out of range, or no scenario asks for a quantity.
    """
    check_sampling(prompts.suite, runs, temperature)
    asked = quantity_prompts(prompts)
    requests = [
        Request(prompt.context, answer_seed(seed, number, run))
        for number, prompt in enumerate(asked.prompts)
        for run in range(first_run, first_run + runs)
    ]
    written = write(model, requests, new_tokens, temperature=temperature, batch_size=batch_size, advance=advance)
    texts = tuple(tuple(written[start : start + runs]) for start in range(0, len(written), runs))
    return SampledAmounts(_read(asked, texts), asked, texts)


def _read(prompts: PromptSet, texts: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """The amount of every answer in the unit of its scenario, (prompts, runs); NaN where it holds none."""
    language, scenarios = prompts.suite.language, prompts.suite.scenarios
    units = [getattr(scenarios[prompt.scenario].measure, "unit", "") for prompt in prompts.prompts]
    amounts = [[parse_amount(text, language, unit) for text in row] for unit, row in zip(units, texts, strict=True)]
    return np.array(amounts, dtype=float)


def answer_seed(seed: int, prompt: int, run: int) -> int:
    """The seed of one answer, from that of the study and the numbers of prompt and run."""
    return int(np.random.SeedSequence([seed, prompt, run]).generate_state(1)[0])
