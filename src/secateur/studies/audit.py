"""``audit``: how large each scenario's disparity is, with intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from secateur.evaluation.evaluator import Evaluator
from secateur.measures.answers import DEFAULT_BATCH_SIZE
from secateur.measures.disparity import (
    SIGNIFICANT,
    Interval,
    Statistic,
    SuiteBias,
    Table,
    group_means,
    holm,
    interval_of_bias,
    largest_pairs,
    null,
    permutation_p_values,
    scenario_intervals,
    statistics,
    suite_bias,
    suite_p_value,
)
from secateur.measures.prompts import ChatMode, build_prompts, check_chat
from secateur.measures.sampling import TEMPERATURE, check_sampling, quantity_prompts, sample_amounts
from secateur.measures.selection import Selection, selections
from secateur.measures.splits import whole
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.studies.record import Recorder
from secateur.suites import Suite, suite_hash


@dataclass(frozen=True)
class ScenarioDisparity:
    """One scenario's figures.

    Attributes
    ----------
    means: mean y by group.
    pair: the two groups with the largest |SMD|, which gap and SMD compare (first minus second).
    gap, smd: with 95 % bootstrap intervals over markers.
    null_abs_smd: mean |SMD| with shuffled labels.
    p_value, p_holm: permutation p-value, alone and corrected for all scenarios of the suite.
    """

    id: str
    measure: str
    means: dict[str, float]
    pair: tuple[str, str]
    gap: Interval
    smd: Interval
    deviation: float
    null_abs_smd: float
    p_value: float
    p_holm: float

    @property
    def is_significant(self) -> bool:
        """Whether the groups differ beyond chance, after the correction."""
        return self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class SampledCheck:
    """Sampled answers beside the measured quantities.

    Attributes
    ----------
    runs, temperature: answers to each prompt, and of the sampling.
    parsed: share of the answers that hold an amount.
    agreement: mean over scenarios of Spearman's correlation of the sampled with the measured y; None where too few
        answers hold an amount.
    """

    runs: int
    temperature: float
    parsed: float
    agreement: float | None


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes
    ----------
    bias: the corrected suite bias B with its interval. p_value: permutation p-value of the suite's bias.
    summary: all suite figures, raw and null.
    scenarios: one entry per scenario.
    table: y of every scenario and marker; kept out of ``audit.json``.
    run: versions, seed, data hashes, cost.
    selections: selection rates of the suite's decisions; none where it has no decisions.
    sampled: quantities by sampled answers, where that was asked for.
    """

    model: str
    suite: Suite
    bias: Interval
    p_value: float
    summary: SuiteBias
    scenarios: list[ScenarioDisparity]
    table: Table
    run: dict[str, Any]
    selections: list[Selection] = field(default_factory=list)
    sampled: SampledCheck | None = None

    @property
    def is_biased(self) -> bool:
        """Whether the groups differ beyond chance over the whole suite."""
        return self.p_value < SIGNIFICANT

    @property
    def significant(self) -> list[str]:
        """The scenarios in which the groups differ beyond chance."""
        return [scenario.id for scenario in self.scenarios if scenario.is_significant]

    def as_dict(self) -> dict[str, Any]:
        """The content of ``audit.json``."""
        return {
            "model": self.model,
            "suite": self.suite.name,
            "bias": self.bias.as_dict(),
            "p_value": self.p_value,
            "summary": asdict(self.summary),
            "scenarios": [asdict(scenario) for scenario in self.scenarios],
            "selections": [selection.as_dict() for selection in self.selections],
            "sampled": None if self.sampled is None else asdict(self.sampled),
            "run": self.run,
        }


def audit(
    model: LanguageModel,
    suite: Suite,
    *,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    chat: ChatMode = "auto",
    sampled_runs: int = 0,
    temperature: float = TEMPERATURE,
    progress: Progress | None = None,
) -> AuditResult:
    """Measure the disparity of every scenario of a suite on a model, on all markers and paraphrases.

    Parameters
    ----------
    seed: of permutations and bootstrap.
    batch_size: prompts in one forward pass.
    chat: "auto", "chat" or "plain": whether prompts go through the model's chat template.
    sampled_runs: also sample so many answers to every quantity prompt, at ``temperature``, and compare.

    Raises
    ------
    SettingError: an unknown chat mode, or "chat" for a model without a template.
    """
    check_chat(chat)
    recorder = Recorder(model, progress or Progress())
    if sampled_runs:
        check_sampling(suite, sampled_runs, temperature)
    evaluator = Evaluator(model, build_prompts(model, suite, whole(suite), chat), batch_size=batch_size)
    with recorder.step(f"Audit {suite.name}", evaluator.work()) as advance:
        table = evaluator.evaluate(advance=advance).table
    sampled = _sample(evaluator, recorder, sampled_runs, temperature, seed) if sampled_runs else None
    settings = {"seed": seed, "batch_size": batch_size, "chat": chat, "suite_hash": suite_hash(suite)}
    return AuditResult(
        model=model.source,
        suite=suite,
        bias=interval_of_bias(table, seed),
        p_value=suite_p_value(table, seed),
        summary=suite_bias(table, seed),
        scenarios=describe_scenarios(suite, table, seed),
        table=table,
        run=recorder.describe(settings),
        selections=selections(evaluator.prompts, evaluator.y(), seed),
        sampled=sampled,
    )


def _sample(evaluator: Evaluator, recorder: Recorder, runs: int, temperature: float, seed: int) -> SampledCheck:
    """Sample the quantity prompts, and compare with the y that were measured on the same prompts."""
    asked = quantity_prompts(evaluator.prompts)
    with recorder.step(f"Sample {runs} answers to every quantity prompt", runs * len(asked)) as advance:
        found = sample_amounts(
            evaluator.model,
            asked,
            runs=runs,
            temperature=temperature,
            batch_size=evaluator.batch_size,
            seed=seed,
            advance=advance,
        )
    scenarios = set(asked.scenarios)
    y = evaluator.y()[[prompt.scenario in scenarios for prompt in evaluator.prompts.prompts]]
    agreement = found.agreement(y)
    return SampledCheck(runs, temperature, found.parsed, agreement if np.isfinite(agreement) else None)


def describe_scenarios(suite: Suite, table: Table, seed: int = 0) -> list[ScenarioDisparity]:
    """Every scenario's figures from a table of y, (scenarios, markers)."""
    observed = statistics(table)
    shuffled = np.abs(null(table, seed)["smd"]).mean(axis=0)
    p_values = permutation_p_values(table, seed)
    adjusted = holm(p_values)
    intervals = scenario_intervals(table, seed)
    pairs = largest_pairs(table)
    means = group_means(table)
    names = list(suite.groups)

    def interval(name: Statistic, i: int) -> Interval:
        low, high = intervals[name]
        return Interval(float(observed[name][i]), float(low[i]), float(high[i]))

    return [
        ScenarioDisparity(
            id=scenario.id,
            measure=scenario.measure.kind,
            means=dict(zip(names, means[i].tolist(), strict=True)),
            pair=(names[pairs[i][0]], names[pairs[i][1]]),
            gap=interval("gap", i),
            smd=interval("smd", i),
            deviation=float(observed["deviation"][i]),
            null_abs_smd=float(shuffled[i]),
            p_value=float(p_values[i]),
            p_holm=float(adjusted[i]),
        )
        for i, scenario in enumerate(suite.scenarios)
    ]
