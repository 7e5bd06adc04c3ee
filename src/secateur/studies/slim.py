"""``slim``: a smaller, faster model, every layer of the same width, measured before and after on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from secateur.errors import MaskError, SettingError
from secateur.evaluation.evaluator import Measurement
from secateur.measures.disparity import Comparison, Interval, Table
from secateur.measures.disparity import compare as compare_tables
from secateur.measures.speed import SpeedComparison, compare_speed, memory_bytes
from secateur.measures.splits import NOTHING_SEEN, Seen
from secateur.measures.utility import hidden_states, negative_log_likelihood, perplexity, perplexity_increase
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Recorder
from secateur.suites import Suite, suite_hash
from secateur.surgery import write_uniform
from secateur.surgery.slimming import Importance, Size, Slimming, replaced, slimmings, target_size, work
from secateur.units import Mask, UnitSpace
from secateur.weights import AnyMask

RIDGES = (0.1, 0.3)
Load = Callable[[Path], LanguageModel]


@dataclass(frozen=True)
class SlimSettings(StudySettings):
    """Everything that slimming can be told, besides what every study can.

    Attributes
    ----------
    width: share of the neurons of every layer to keep. multiple: their number is one of it.
    kv_heads: KV heads of every layer to keep, with their query heads; None for all.
    importance: by which neurons go, see :func:`secateur.surgery.slimming.slimmings`; "best" for the one that
        is best on select.
    calibrate: let the kept weights stand in for those that go (least squares on the fit text).
    decode_tokens, decode_runs: what is timed.
    """

    width: float = 0.8
    multiple: int = 8
    kv_heads: int | None = None
    importance: Importance | Literal["best"] = "best"
    calibrate: bool = True
    decode_tokens: int = 64
    decode_runs: int = 9

    def check(self) -> None:
        super().check()
        if self.ablation != "zero":
            raise SettingError("Units of a slimmer model leave without a trace; use zero ablation.")
        if self.importance not in (*get_args(Importance), "best"):
            known = ", ".join((*get_args(Importance), "best"))
            raise SettingError(f"Unknown importance '{self.importance}'; choose one of: {known}.")
        for name, low in (("decode_tokens", 1), ("decode_runs", 3)):
            self.check_least(name, low)

    @property
    def importances(self) -> tuple[Importance, ...]:
        """The importances to try."""
        return get_args(Importance) if self.importance == "best" else (self.importance,)


@dataclass(frozen=True)
class SlimCandidate:
    """One way that was tried, and the increase of perplexity under it on select."""

    importance: Importance
    ridge: float | None
    perplexity_increase: float
    chosen: bool = False


@dataclass(frozen=True)
class SlimResult:
    """What became of a model.

    Attributes
    ----------
    size: of every layer. mask: all units that went. space: of the model before.
    comparison, control: bias on test. perplexity_*: on the test part of the text.
    parameters, file_bytes, memory_bytes: before and after; memory is weights and the cache of 1,024 tokens.
    speed: tokens per second.
    """

    model: str
    suite: Suite
    size: Size
    mask: Mask
    space: UnitSpace
    candidates: list[SlimCandidate]
    comparison: Comparison
    control_suite: str | None
    control: Comparison | None
    perplexity_before: float
    perplexity_after: float
    perplexity_increase: Interval
    parameters: tuple[int, int]
    file_bytes: tuple[int, int]
    memory_bytes: tuple[int, int]
    speed: SpeedComparison
    run: dict[str, Any]

    @property
    def sentence(self) -> str:
        """What came of it, in words."""
        fewer = 1 - self.parameters[1] / self.parameters[0]
        ratio, reduction, increase = self.speed.ratio(), self.comparison.reduction, self.perplexity_increase
        return (
            f"{fewer:.0%} fewer parameters, {ratio.value:.2f} times the decoding speed (95 % {ratio.low:.2f} to "
            f"{ratio.high:.2f}), perplexity {increase.value:+.1%} ({increase.low:+.1%} to {increase.high:+.1%}), bias "
            f"{-reduction.value:+.0%} ({-reduction.high:+.0%} to {-reduction.low:+.0%})."
        )

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Figures for people: name, before, after, change."""
        bias, increase, ratio = self.comparison, self.perplexity_increase, self.speed.ratio()
        rows = [
            (
                f"bias B, {self.suite.name}",
                str(bias.before),
                str(bias.after),
                f"{-bias.reduction.value:+.0%} [{-bias.reduction.high:+.0%}, {-bias.reduction.low:+.0%}]",
            ),
            (
                "perplexity",
                f"{self.perplexity_before:.2f}",
                f"{self.perplexity_after:.2f}",
                f"{increase.value:+.1%} [{increase.low:+.1%}, {increase.high:+.1%}]",
            ),
            ("parameters", *_pair(self.parameters, 1e6, "M")),
            ("weights on disk", *_pair(self.file_bytes, 1e6, "MB")),
            ("memory, with a cache of 1,024 tokens", *_pair(self.memory_bytes, 1e6, "MB")),
            (
                "decoding, tokens per second",
                f"{np.median(self.speed.before):.1f}",
                f"{np.median(self.speed.after):.1f}",
                f"{ratio.value:.2f} times [{ratio.low:.2f}, {ratio.high:.2f}]",
            ),
        ]
        if self.control is not None:
            change = self.control.change
            rows.insert(
                1,
                (
                    f"control, {self.control_suite}",
                    f"{self.control.before.value:.2f}",
                    f"{self.control.after.value:.2f}",
                    f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]",
                ),
            )
        return rows

    def plan_record(self) -> dict[str, Any]:
        """What the plan of all removed units says of them."""
        figures = self.as_dict()
        told = {key: figures[key] for key in ("model", "suite", "test", "utility")}
        run = {key: self.run[key] for key in ("settings", "versions", "command")}
        run["settings"] = {key: value for key, value in run["settings"].items() if key != "max_perplexity_increase"}
        return {**told, **run, "method": "slim", "verdict": "measured", "explanation": self.sentence}

    def as_dict(self) -> dict[str, Any]:
        """The content of ``slim.json``."""
        return {
            "model": self.model,
            "suite": self.suite.name,
            "size": {"neurons": self.size.neurons, "kv_heads": self.size.kv_heads},
            "units": {"heads": self.mask.heads_removed, "neurons": self.mask.neurons_removed},
            "test": {
                **self.comparison.as_dict(),
                "control_suite": self.control_suite,
                "control_change": None if self.control is None else self.control.change.as_dict(),
            },
            "utility": {
                "perplexity_before": self.perplexity_before,
                "perplexity_after": self.perplexity_after,
                "perplexity_increase": self.perplexity_increase.as_dict(),
            },
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "memory_bytes": self.memory_bytes,
            "decode": {
                "tokens_per_second_before": self.speed.before,
                "tokens_per_second_after": self.speed.after,
                "ratio": self.speed.ratio().as_dict(),
            },
            "candidates": [vars(candidate) for candidate in self.candidates],
            "run": self.run,
        }


def check_plan(model: LanguageModel, mask: AnyMask | None) -> Mask:
    """The plan that slimming starts from.

    Raises
    ------
    MaskError: it is for another model, or does not remove whole units for nothing in their place.
    """
    if mask is None:
        return Mask.removing(model, [])
    mask.check(model)
    if not isinstance(mask, Mask) or mask.ablation != "zero":
        raise MaskError("A slimmer model starts from a plan that removes whole units with zero ablation.")
    return mask


def slim(
    model: LanguageModel,
    suite: Suite,
    directory: Path,
    load: Load,
    mask: AnyMask | None = None,
    settings: SlimSettings | None = None,
    *,
    progress: Progress | None = None,
    seen: Seen = NOTHING_SEEN,
) -> SlimResult:
    """Write a slimmer model to a directory, and measure what is written.

    Importance and stand-in weights come from the fit part of the neutral text, the way is chosen by perplexity on its
    select part, and the test parts are read once, before and after. "After" is the checkpoint, loaded again.

    Parameters
    ----------
    load: how to load the checkpoint as the model was. mask: of a plan whose units go first, or None.
    seen: what a plan for another suite has seen, and the test part leaves out.
    """
    settings = settings or SlimSettings()
    settings.check()
    start = check_plan(model, mask)
    size = target_size(model, settings.width, settings.multiple, settings.kv_heads)
    recorder = Recorder(model, progress or Progress())
    parts = Parts.prepare(model, suite, settings, seen=seen)
    chosen, candidates = _choose(model, parts, start, size, settings, recorder)
    write_uniform(model, chosen.mask, directory, settings.multiple, weights=chosen.weights)
    before = _measure(parts, recorder, "before")
    slimmer = load(directory)
    after = _measure(Parts.prepare(slimmer, suite, settings, seen=seen), recorder, "after")
    with recorder.step("Decode in turns", settings.decode_runs + 1) as advance:
        speed = compare_speed(model, slimmer, settings.decode_tokens, settings.decode_runs, advance)
    text = parts.test.text
    assert text is not None
    assert before.test.nll is not None
    assert after.test.nll is not None
    told = {**settings.as_dict(), "suite": suite.name, "suite_hash": suite_hash(suite)}
    return SlimResult(
        model=model.source,
        suite=suite,
        size=Size(slimmer.kv_heads_per_layer[0], slimmer.neurons_per_layer[0]),
        mask=chosen.mask,
        space=UnitSpace.of(model),
        candidates=candidates,
        comparison=compare_tables(before.test.table, after.test.table, settings.seed),
        control_suite=settings.control_suite,
        control=_compared(before.control, after.control, settings.seed),
        perplexity_before=perplexity(before.test.nll, text),
        perplexity_after=perplexity(after.test.nll, text),
        perplexity_increase=perplexity_increase(before.test.nll, after.test.nll, text, settings.seed),
        parameters=(_parameters(model), _parameters(slimmer)),
        file_bytes=(model.weight_bytes, sum(file.stat().st_size for file in directory.glob("*.safetensors"))),
        memory_bytes=(memory_bytes(model), memory_bytes(slimmer)),
        speed=speed,
        run=recorder.describe(told),
    )


def _choose(
    model: LanguageModel, parts: Parts, start: Mask, size: Size, settings: SlimSettings, recorder: Recorder
) -> tuple[Slimming, list[SlimCandidate]]:
    """Make every candidate from the fit text; take that with the lowest perplexity on the select text."""
    fit, select = parts.fit.text, parts.select.text
    assert fit is not None
    assert select is not None
    ridges = RIDGES if settings.calibrate else (None,)
    with recorder.step("Importance of neurons", work(model, fit, size, settings.importances)) as advance:
        made = slimmings(model, fit, start, size, settings.importances, ridges, advance)
    found = []
    with recorder.step("Select", (len(made) + 1) * len(select.windows)) as advance:
        base = negative_log_likelihood(model, select, hidden_states(model, select, advance))
        for one in made:
            with replaced(model, one.weights), one.mask.applied(model):
                nll = negative_log_likelihood(model, select, hidden_states(model, select, advance))
            found.append(SlimCandidate(one.importance, one.ridge, perplexity_increase(base, nll, select).value))
    best = min(range(len(found)), key=lambda number: found[number].perplexity_increase)
    return made[best], [replace(one, chosen=number == best) for number, one in enumerate(found)]


@dataclass(frozen=True)
class _Measured:
    test: Measurement
    control: Table | None


def _measure(parts: Parts, recorder: Recorder, name: str) -> _Measured:
    """Test and control of a model as it is."""
    control_work = 0 if parts.control is None else parts.control.work()
    with recorder.step(f"Test: {name}", parts.test.work(utility=True) + control_work) as advance:
        test = parts.test.evaluate(None, advance, utility=True)
        control = None if parts.control is None else parts.control.evaluate(None, advance).table
    return _Measured(test, control)


def _compared(before: Table | None, after: Table | None, seed: int) -> Comparison | None:
    return None if before is None or after is None else compare_tables(before, after, seed)


def _pair(values: tuple[int, int], unit: float, name: str) -> tuple[str, str, str]:
    """Before, after and change of two counts, in units."""
    one, other = values
    return f"{one / unit:,.1f} {name}", f"{other / unit:,.1f} {name}", f"{other / one - 1:+.1%}"


def _parameters(model: LanguageModel) -> int:
    return sum(parameter.numel() for parameter in model.model.parameters())
