"""The sampled form of a quantity: amounts read from sampled answers, to verify the deterministic measure.

``quantity`` takes the mean logarithm over a grid of candidate amounts, which has no noise and a gradient.
What a user sees are sampled answers. Here the model answers each prompt several times at a temperature, a
parser reads the first amount of each answer, and the logarithms take the place of y. A grid may count in
thousands where answers are written out; its logarithms then differ from those of samples by a constant, which no
gap and no SMD depends on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from secateur.errors import SettingError
from secateur.measures.prompts import Prompt, PromptSet
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.suites import Quantity, Suite

RUNS = 5
TEMPERATURE = 1.0
NEW_TOKENS = 12
INLIER_RANGE = (5, 95)  # percentiles of the unpruned model's own answers
AMOUNT = re.compile(
    r"(?<![\w.,])(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<scale>\s?(?:k|m|thousand|million|billion)\b)?",
    re.IGNORECASE,
)
SCALES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "billion": 1e9}


def parse_amount(text: str) -> float | None:
    """The first amount in a text: "65,000 a year" is 65000, "$1.5 million" 1.5e6, "70k" 70000; None without one.

    Zero has no logarithm and counts as no amount.
    """
    found = AMOUNT.search(text)
    if found is None:
        return None
    scale = (found["scale"] or "").strip().lower()
    amount = float(found["digits"].replace(",", "")) * SCALES.get(scale, 1.0)
    return amount if 0 < amount < float("inf") else None


@dataclass(frozen=True, eq=False)
class SampledAmounts:
    """What a model answered.

    Attributes
    ----------
    amounts: (prompts, runs), NaN where an answer held no amount.
    prompts: the prompts of the quantity scenarios, in order.
    """

    amounts: np.ndarray
    prompts: PromptSet

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
        """Share of the answers within the unpruned model's own 5-95 % range for the same prompt.

        Answers without an amount count as outliers, and so does every answer to a prompt that the unpruned
        model never answered with an amount. The anomaly rate is 1 minus this ratio.
        """
        low, high = np.full(len(self.amounts), np.nan), np.full(len(self.amounts), np.nan)
        for number, row in enumerate(unpruned.amounts):
            known = row[np.isfinite(row)]
            if len(known):
                low[number], high[number] = np.percentile(known, INLIER_RANGE)
        with np.errstate(invalid="ignore"):
            inside = (self.amounts >= low[:, None]) & (self.amounts <= high[:, None])
        return float(inside.mean())


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


@torch.no_grad()
def sample_amounts(
    model: LanguageModel,
    prompts: PromptSet,
    *,
    runs: int = RUNS,
    temperature: float = TEMPERATURE,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = 32,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> SampledAmounts:
    """Let the model answer the quantity prompts of a set several times.

    Prompts of one length are run together, so that nothing is padded. Equal seeds give equal answers for
    equal batch sizes.

    Parameters
    ----------
    runs: answers to each prompt. temperature: of the sampling. new_tokens: longest answer.

    Raises
    ------
    SettingError: a setting is out of range, or no scenario asks for a quantity.
    """
    check_sampling(prompts.suite, runs, temperature)
    asked = quantity_prompts(prompts)
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(asked.prompts):
        by_length[len(prompt.context)].append(number)
    amounts = np.full((len(asked), runs), np.nan)
    devices = [model.input_device] if model.input_device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for numbers in by_length.values():
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                answers = _answers(model, [asked.prompts[n] for n in batch], runs, temperature, new_tokens)
                for number, texts in zip(batch, answers, strict=True):
                    amounts[number] = [np.nan if (a := parse_amount(text)) is None else a for text in texts]
                advance(len(batch))
    return SampledAmounts(amounts, asked)


def _answers(
    model: LanguageModel, prompts: list[Prompt], runs: int, temperature: float, new_tokens: int
) -> list[list[str]]:
    """Sampled continuations of prompts of one length: per prompt, ``runs`` texts."""
    context = torch.tensor([prompt.context for prompt in prompts], device=model.input_device)  # (prompts, tokens)
    tokens = model.model.generate(  # type: ignore[operator]
        input_ids=context,
        attention_mask=torch.ones_like(context),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        num_return_sequences=runs,
        max_new_tokens=new_tokens,
        pad_token_id=model.tokenizer.pad_token_id or 0,
    )  # (prompts * runs, tokens + new), prompt by prompt
    model.usage.forward += tokens.numel()
    texts = model.tokenizer.batch_decode(tokens[:, context.shape[1] :], skip_special_tokens=True)
    return [texts[start : start + runs] for start in range(0, len(texts), runs)]
