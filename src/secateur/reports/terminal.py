"""What people see in the terminal: progress bars and tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars
from rich.table import Table

from secateur.errors import DataError
from secateur.files import LOCK, STATE, staging_of
from secateur.locking import holder_of
from secateur.measures.disparity import Interval
from secateur.measures.prompts import candidate_texts
from secateur.progress import Advance, Progress
from secateur.search.methods import METHODS
from secateur.studies.audit import AuditResult
from secateur.studies.compare import CompareResult, MethodResult
from secateur.studies.localise import LocaliseResult
from secateur.studies.reach import GENERALISE_FORMAT, PLACES, Cell, GeneraliseResult
from secateur.studies.repair import RepairResult
from secateur.studies.runs import RESULTS, Run
from secateur.studies.slim import SlimResult
from secateur.studies.verification import told_plan
from secateur.suites import Suite, fill

HOW_TO_CARRY_ON = "The command that began it, or the call from Python, carries on."
FITTED_ON = "fitted on"
TABLE_EDGE = 2  # a blank on either side
LINE_EVERY = 30.0  # seconds between two lines about a step where the output is no terminal
Describe = Callable[[str], None]


class TerminalProgress(Progress):
    """One bar per step, with the time left; where the output is no terminal, a line now and then that says the same."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self._describe: Describe = lambda _: None

    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Advance]:
        shown = self._bar if self.console.is_terminal else self._lines
        with shown(description, total) as (advance, describe):
            before, self._describe = self._describe, describe
            try:
                yield advance
            finally:
                self._describe = before

    @contextmanager
    def _lines(self, description: str, total: int) -> Iterator[tuple[Advance, Describe]]:
        def tell(line: str) -> None:
            self.console.print(escape(line), soft_wrap=True, highlight=False)

        tell(f"{description} ...")
        lines = _Lines(description, total, self.clock, tell)
        yield lines.advance, lines.describe

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[tuple[Advance, Describe]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichBars(*columns, console=self.console) as bars:
            task = bars.add_task(escape(description), total=total)
            yield (
                lambda done: bars.advance(task, done),
                lambda words: bars.update(task, description=escape(f"{description}: {words}")),
            )

    def status(self, words: str) -> None:
        self._describe(words)

    def say(self, message: str) -> None:
        self.console.print(escape(message))


@dataclass(eq=False)
class _Lines:
    """What lines say of one step: how much is done, what it has reached, and the time left."""

    description: str
    total: int
    clock: Callable[[], float]
    tell: Callable[[str], None]
    done: int = 0
    reached: str = ""
    _begun: float = field(init=False)
    _told: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self._told = self.clock()

    def describe(self, words: str) -> None:
        self.reached = words

    def advance(self, done: int) -> None:
        self.done += done
        now = self.clock()
        if now - self._told < LINE_EVERY or not self.done:
            return
        self._told = now
        left = timedelta(seconds=round((now - self._begun) * (self.total - self.done) / self.done))
        reached = f", {self.reached}" if self.reached else ""
        self.tell(f"{self.description}: {self.done}/{self.total}{reached}, {left} left")


def interval_text(interval: Interval, percent: bool = False) -> str:
    """A figure with its interval, as text."""
    if percent:
        return f"{interval.value:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def audit_table(result: AuditResult) -> Table:
    """Every scenario of an audit, one line each."""
    table = Table(title=f"{escape(result.suite.name)} on {escape(result.model)}", box=box.SIMPLE_HEAD)
    table.add_column("scenario")
    table.add_column("groups compared")
    for heading in ("gap [95 %]", "SMD [95 %]", "null |SMD|", "p (Holm)"):
        table.add_column(heading, justify="right")
    for scenario in result.scenarios:
        strong = "bold" if scenario.is_significant else "dim"
        table.add_row(
            escape(scenario.id),
            escape(f"{scenario.pair[0]} - {scenario.pair[1]}"),
            interval_text(scenario.gap),
            interval_text(scenario.smd),
            f"{scenario.null_abs_smd:.2f}",
            f"{scenario.p_holm:.3f}",
            style=strong,
        )
    return table


def audit_summary(result: AuditResult) -> list[str]:
    """The lines under an audit's table."""
    summary = result.summary
    significant = result.significant
    return [
        f"Suite bias B (mean SMD², noise subtracted): {interval_text(result.bias)}; labels shuffled over markers: "
        f"p = {result.p_value:.2g}",
        f"Raw mean |SMD| {summary.mean_abs_smd:.2f} (shuffled labels: {summary.null_abs_smd:.2f}); "
        f"mean |gap| {summary.mean_abs_gap:.2f} (shuffled: {summary.null_abs_gap:.2f})",
        f"{len(significant)} of {len(result.scenarios)} scenarios differ between groups at p < 0.05 after Holm's "
        f"correction{': ' if significant else ''}{', '.join(significant)}",
        *_sampled_lines(result),
        f"{result.run['tokens_forward']:,} tokens forward in {result.run['seconds']:.0f} s",
    ]


def _sampled_lines(result: AuditResult) -> list[str]:
    check = result.sampled
    if check is None:
        return []
    agreement = "cannot be computed" if check.agreement is None else f"is {check.agreement:.2f}"
    return [
        f"Sampled answers ({check.runs} a prompt, temperature {check.temperature:g}): {check.parsed:.0%} hold an "
        f"amount; their correlation with the measured quantities {agreement} (Spearman, mean over scenarios)",
    ]


def repair_table(result: RepairResult) -> Table:
    """Every candidate of a repair on the select part, one line each."""
    table = Table(title="Candidates on the select part", box=box.SIMPLE_HEAD)
    for heading in ("units", "heads", "neurons", "bias B", "mean |gap|", "perplexity", "95 % upper"):
        table.add_column(heading, justify="left" if heading == "units" else "right")
    for candidate in result.candidates:
        table.add_row(
            candidate.kind,
            str(candidate.heads),
            str(candidate.neurons) if not candidate.weights else f"{candidate.weights:,} weights",
            f"{candidate.bias:.2f}",
            f"{candidate.mean_abs_gap:.2f}",
            f"{candidate.perplexity_increase:+.2%}",
            f"{candidate.perplexity_high:+.2%}",
            style="bold green" if candidate.chosen else "" if candidate.within_limit else "dim",
        )
    return table


def repair_lines(result: RepairResult) -> list[str]:
    """The verdict of a repair and the figures behind it."""
    return result_lines(result.as_dict())


def result_lines(result: dict[str, Any]) -> list[str]:
    """The content of a ``result.json`` in words."""
    lines = [f"{result['model']}, suite {result['suite']}, method {result['method']}"]
    if result["test"] is not None:
        units, test, utility = result["units"], result["test"], result["utility"]
        lines += [
            _removed(units),
            f"Held-out bias B   {_interval(test['bias_before'])} -> {_interval(test['bias_after'])}",
            f"Reduction         {_percent(test['reduction'])}",
            *_random_line(test),
            f"Perplexity        {utility['perplexity_before']:.2f} -> {utility['perplexity_after']:.2f}, "
            f"{_percent(utility['perplexity_increase'], 2)}; KL {utility['kl']:.4f} nats per token",
        ]
        if test["control_change"] is not None:
            lines.append(f"Control suite     {test['control_suite']}: change of B {_interval(test['control_change'])}")
    if result.get("verification"):
        lines += verification_lines(result["verification"])[1:]
    lines += [
        *result.get("notes", []),
        f"Verdict: {result['verdict']}. {result['explanation']}",
        _cost(result),
    ]
    return lines


def _cost(told: dict[str, Any]) -> str:
    """What a run took, in all its sittings."""
    sittings = told.get("carried_on", 0) + 1  # not in results of older versions
    return (
        f"{told['seconds']:.0f} s, {told['tokens_forward']:,} tokens forward, {told['tokens_backward']:,} backward"
        + (f", in {sittings} sittings: the run was carried on" if sittings > 1 else "")
    )


def verification_lines(result: dict[str, Any]) -> list[str]:
    """The content of a ``verify.json`` in words."""
    plan = f"; {told_plan(result['plan'])}" if result.get("plan") else ""  # not in results of older versions
    lines = [f"{result['model']}, suite {result['suite']}: what it writes before and after, held out{plan}"]
    amounts, guard = result["amounts"], result["guard"]
    if amounts is not None:
        if amounts["bias"] is not None:
            bias = amounts["bias"]
            lines.append(
                f"Bias B of answers {_interval(bias['before'])} -> {_interval(bias['after'])}, "
                f"change {_interval(bias['change'], '+')}"
            )
        lines += [
            f"Sampled answers   {amounts['answers']:,} ({amounts['runs']} a prompt, temperature "
            f"{amounts['temperature']:g}); {amounts['unchanged']:.0%} unchanged; {amounts['parsed_before']:.0%} -> "
            f"{amounts['parsed_after']:.0%} hold an amount",
            f"Anomaly rate      {1 - amounts['inliers_before']['value']:.1%} -> "
            f"{1 - amounts['inliers_after']['value']:.1%}, {_points(amounts['anomaly_change'])} points",
        ]
    for name, title in (("open", "Open prompts     "), ("mentions", "Mentions         ")):
        if result[name]:
            same = sum(one["unchanged"] for one in result[name])
            lines.append(f"{title} {same} of {len(result[name])} greedy continuations unchanged")
    if guard is not None:
        rose, fell = len(guard["rose"]), sum(one["fell"] for one in guard["groups"].values())
        lines.append(
            f"Classifier        {guard['classifier']}: {rose} continuations worse by {guard['threshold']:g} or more, "
            f"{fell} better"
        )
        if guard.get("limits"):  # not in results of older versions
            lines.append(guard["limits"])
    return [*lines, *result["notes"]]


def _removed(units: dict[str, Any]) -> str:
    did = str(units.get("action", "removed")).capitalize()
    if units.get("weights"):
        return f"{did} {units['weights']:,} single weights"
    heads = f"{units['heads']} of {units['heads_total']:,} heads"
    return f"{did} {heads} and {units['neurons']} of {units['neurons_total']:,} neurons"


def _random_line(test: dict[str, Any]) -> list[str]:
    if "random_reduction" not in test:
        return []
    return [f"Random masks      {_percent(test['random_reduction'])} (mean, smallest and largest draw)"]


def _interval(figure: dict[str, float], sign: str = "") -> str:
    return f"{figure['value']:{sign}.2f} [{figure['low']:{sign}.2f}, {figure['high']:{sign}.2f}]"


def _percent(figure: dict[str, float], digits: int = 0) -> str:
    return f"{figure['value']:+.{digits}%} [{figure['low']:+.{digits}%}, {figure['high']:+.{digits}%}]"


def _points(figure: dict[str, float]) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * figure['value']:+.1f} [{100 * figure['low']:+.1f}, {100 * figure['high']:+.1f}]"


def compare_table(result: CompareResult) -> Table:
    """One line per method, the largest held-out reduction first; narrow enough for 80 columns."""
    title = f"{escape(result.suite.name)} on {escape(result.model)}, held out, limit {result.limit:+.1%} perplexity"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("method", no_wrap=True)
    headings = ("heads\nneurons", "B was\nis", "reduction\n%", "perplexity\n%", "control", "forward\nback", "s")
    for heading in headings:
        table.add_column(heading, justify="right")
    for found in result.methods:
        tokens = f"{found.tokens_forward / 1000:,.0f}k\n{found.tokens_backward / 1000:,.0f}k"
        cost = (tokens, f"{found.seconds:.0f}")
        bias = found.bias_before, found.bias_after
        if bias[0] is None or bias[1] is None or found.reduction is None or found.perplexity_increase is None:
            table.add_row(found.name, "", "", found.status, "", "", *cost, style="dim")
            continue
        table.add_row(
            f"{found.name}{'' if found.faults else ' *'}",
            f"{found.weights:,}\nweights" if found.weights else f"{found.heads}\n{found.neurons:,}{_how(found)}",
            f"{bias[0].value:.2f}\n{bias[1].value:.2f}",
            _stacked(found.reduction, 0),
            _stacked(found.perplexity_increase, 1),
            "" if found.control_change is None else _stacked(found.control_change, 2, scale=1),
            *cost,
        )
    return table


def _how(found: MethodResult) -> str:
    return "" if found.action == "removed" else f"\n{found.action}"


def _stacked(interval: Interval, digits: int, scale: float = 100) -> str:
    """A figure, in percent by default, on one line and the interval below."""
    value, low, high = (f"{scale * number:.{digits}f}" for number in (interval.value, interval.low, interval.high))
    return f"{value}\n[{low}, {high}]"


def compare_lines(result: CompareResult) -> list[str]:
    """The lines under a comparison's table."""
    lines = []
    if any(found.reduction is not None and not found.faults for found in result.methods):
        lines.append("* proven: there was a bias, its fall is not chance, and perplexity keeps to the limit.")
    if sum(found.reduction is not None and not found.over_limit for found in result.methods) > 1:
        lines.append("The first method is chosen by the test part, so its figure is likely too good.")
    for found in result.methods:
        lines += [f"{found.name} is not proven: {'; '.join(found.faults)}."] if found.faults else []
        lines += [f"{found.name}: {note}" for note in found.notes]
        if found.random_reductions:
            draws = found.random_reductions
            lines.append(
                f"random: {len(draws)} draws of {'the chosen' if found.reduction else 'one'} size changed the bias by "
                f"{-max(draws):+.0%} to {-min(draws):+.0%}, mean {-sum(draws) / len(draws):+.0%}"
            )
    return [*lines, _cost(result.run)]


def generalise_tables(result: GeneraliseResult, width: int) -> list[Table]:
    """For every method the change of B by source and target, in tables as wide as fit, and what it comes to.

    Parameters
    ----------
    width: of the terminal, characters.
    """
    names = [suite.name for suite in result.suites]
    column = max(
        *(len(cell.label) for cell in result.cells), *(len(word) for name in names for word in name.split("-"))
    )
    label = max(
        len(source) for source in [FITTED_ON, *(one for name in result.methods for one in result.sources(name))]
    )
    abreast = max(1, (width - label - TABLE_EDGE) // (column + 1))
    starts = range(0, len(names), abreast)
    tables = list[Table]()
    for method in result.methods:
        for number, start in enumerate(starts, start=1):
            part = f" ({number} of {len(starts)})" if len(starts) > 1 else ""
            tables.append(_matrix_table(result, method, names[start : start + abreast], column, part))
        tables.append(_summary_table(result, method))
    return tables


def _summary_table(result: GeneraliseResult, name: str) -> Table:
    title = f"{name}: over pairs that differ in one thing (+ in more)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("judged", min_width=max(map(len, " ".join(PLACES.values()).split())))
    for heading in (
        "pairs",
        "no\nrepair",
        "with\na bias",
        "proven/\nprov-\nable",
        "shown\nto\nrise",
        "B\nbefore",
        "change, %",
        "perple-\nxity, %",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.summary:
        if row.method != name:
            continue
        cost, pooled = row.perplexity_increase, row.pooled
        change, star = None if pooled is None else pooled.reduction.as_change, "*" if row.lowered else ""
        table.add_row(
            row.place,
            f"{row.pairs} (+{row.set_aside})" if row.set_aside else str(row.pairs),
            "" if row.relation == "random" else str(row.without_repair),
            str(row.biased),
            *([""] * 2 if row.relation == "random" else (f"{row.proven}/{row.provable}", str(row.rose))),
            "" if pooled is None else f"{pooled.before.value:.2f}",
            "" if change is None else escape(f"{change.value:+.0f} [{change.low:+.0f}, {change.high:+.0f}]") + star,
            "" if cost is None else f"{100 * cost:+.2f}",
        )
    return table


def _matrix_table(result: GeneraliseResult, name: str, targets: Sequence[str], column: int, part: str) -> Table:
    table = Table(
        title=f"{name}: held-out change of B, %, by where it was fitted{part}", box=box.SIMPLE_HEAD, padding=0
    )
    table.add_column(FITTED_ON, no_wrap=True)
    for target in targets:
        table.add_column(escape(target.replace("-", "\n")), justify="right", min_width=column)
    cells = {(cell.source, cell.target): cell for cell in result.cells if cell.method == name}
    for source in result.sources(name):
        row = [cells.get((source, target)) for target in targets]
        table.add_row(escape(source), *("" if cell is None else _cell_text(cell) for cell in row))
    return table


def _cell_text(cell: Cell) -> str:
    """The label of a cell: bold where it is proven, dim where there is no repair or no bias was shown before."""
    if cell.proven:
        return f"[bold]{cell.label}[/]"
    return cell.label if cell.repaired and cell.bias_shown else f"[dim]{cell.label}[/]"


def generalise_lines(result: GeneraliseResult) -> list[str]:
    """The lines under the tables."""
    lines = [
        result.verdict,
        "* proven after Holm's correction, by more than under random masks, within the utility limit; ▲ shown to have "
        "risen; ! perplexity over the limit; none: no repair found; in brackets: no bias could be told from chance "
        "before; = B is 0 before and after. Provable: a repair that closes every gap would be shown to lower it. "
        "* at a change over all pairs of a kind: shown for these together, and more than under any random mask. "
        "Intervals and reasons are in the report.",
    ]
    for fit in result.fits:
        if fit.status != "chosen":
            lines.append(f"{fit.method} on {fit.source}: {fit.status}")
        elif fit.over_limit and fit.perplexity_increase is not None:
            lines.append(
                f"{fit.method} on {fit.source}: perplexity {fit.perplexity_increase.value:+.2%}, over the limit"
            )
    for one in result.left_out:
        what = f"{one.method}, {one.suite}, {one.mode}" + (f" by {one.rule}" if one.rule else "")
        beside = "" if one.random_reduction is None else f", random masks {0 - one.random_reduction:+.0%}"
        cost = "not finite" if one.perplexity_increase is None else f"{one.perplexity_increase:+.2%}"
        destroyed = f" ({one.not_finite} not finite)" if one.not_finite else ""
        lines.append(
            f"{what}: bias {_change(one.comparison.reduction.as_change)} over {len(one.scenarios)} scenarios{beside}; "
            f"perplexity {cost}, {one.over_limit} over the limit{destroyed}"
        )
    for name in result.methods:
        if (overlap := result.mean_overlap(name)) is not None:
            lines.append(
                f"{name}: units that two repairs share, Jaccard's index, mean {overlap[0]:.3f}; by chance "
                f"{overlap[1]:.4f}"
            )
    lines += result.notes
    lines += [f"{one.method}, {one.family}: {one.choice}. {one.explanation}" for one in result.advice]
    return [*lines, _cost(result.run)]


def _change(change: Interval) -> str:
    return f"{change.value:+.0f}% [{change.low:+.0f}%, {change.high:+.0f}%]"


def slim_table(result: SlimResult) -> Table:
    """Before and after of a slimmer model."""
    table = Table(title=escape(f"Slimmer {result.model}"), box=box.SIMPLE_HEAD)
    for heading in ("figure", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for row in result.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def localise_table(result: LocaliseResult, count: int = 15) -> Table:
    """The first units in the order of removal."""
    table = Table(title=f"First units by {result.method}", box=box.SIMPLE_HEAD)
    for heading in ("unit", "rank", *result.values):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for row in result.top(count):
        figures = (f"{row[name]:.4g}" for name in ("rank", *result.values))
        table.add_row(f"{row['kind']} {row['layer']}.{row['index']}", *figures)
    return table


def runs_table(runs: list[Run]) -> Table:
    """One line per run."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "study", "suite", "model", "started (UTC)", "result"):
        table.add_column(heading, overflow="fold")
    for run in runs:
        style = None if run.finished else "dim" if run.holder is None else "bold"
        started = run.started[:16].replace("T", " ")
        cells = (str(run.path), run.study, run.suite, run.model, started, run.summary)
        table.add_row(*map(escape, cells), style=style)
    return table


def methods_table() -> Table:
    """The methods, one line each."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method")
    table.add_column("what it does")
    table.add_column("settings")
    for name, kind in METHODS.items():
        settings = sorted({*kind.scorer.model_fields, *kind.search.model_fields})
        table.add_row(name, escape(kind.summary), ", ".join(settings))
    return table


def show_lines(directory: Path) -> list[str]:
    """What a run's directory holds, or ``NAME.partial`` beside it, in words.

    Raises
    ------
    DataError: it holds no result that can be read.
    """
    readers: dict[str, Reader] = {name: READERS[study] for name, study in RESULTS.items()}
    staging = staging_of(directory)
    holder = holder_of(staging / LOCK)
    readers[STATE] = lambda state: _partial_lines(state, holder)
    for place in (directory, staging):
        for name, reader in readers.items():
            file = place / name
            if file.is_file():
                try:
                    return reader(json.loads(file.read_text(encoding="utf-8")))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"'{file}' is not a Secateur result, or is damaged.") from error
    if holder is not None:
        return [_running(holder)]
    raise DataError(f"'{directory}' holds no result of Secateur.")


def _localise_lines(result: dict[str, Any]) -> list[str]:
    units = result["units"]
    lines = [
        f"{result['model']}, suite {result['suite']}: {result['scored']:,} of {units['heads']:,} heads and "
        f"{units['neurons']:,} neurons scored by {result['method']}",
        *result["notes"],
        "First in the order of removal:",
    ]
    names = [name for name in (result["top"] or [{}])[0] if name not in ("place", "kind", "layer", "index", "rank")]
    for row in result["top"]:
        figures = ", ".join(f"{name} {row[name]:.4g}" for name in names)
        lines.append(f"{row['place']:>3}  {row['kind']} {row['layer']}.{row['index']}  {figures}")
    return lines


def _audit_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['model']}, suite {result['suite']}: bias B {_interval(result['bias'])}"]
    for scenario in result["scenarios"]:
        lines.append(f"  {scenario['id']}: SMD {_interval(scenario['smd'])}, p (Holm) {scenario['p_holm']:.3f}")
    return lines


def _compare_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['model']}, suite {result['suite']}, limit {result['limit']:+.1%} perplexity; held out:"]
    for found in result["methods"]:
        if found["reduction"] is None:
            lines.append(f"  {found['name']}: {found['status']}")
        else:
            lines.append(
                f"  {found['name']}: {_units(found)}, reduction {_percent(found['reduction'])}, perplexity "
                f"{_percent(found['perplexity_increase'], 2)}{_marks(found['faults'])}"
            )
    return lines


def _generalise_lines(result: dict[str, Any]) -> list[str]:
    if result.get("format") != GENERALISE_FORMAT:
        raise DataError("The results were written by another version of Secateur; run the study again.")
    lines = [f"{result['model']}, suites {', '.join(result['suites'])}", *([result["verdict"]] * ("verdict" in result))]
    lines.append("change of B, held out:")
    for cell in result["cells"]:
        figures = _change(Interval(**cell["change_percent"]))
        verdict = " (proven)" if cell["proven"] else _marks(cell["faults"])
        lines.append(f"  {cell['method']}, {cell['source']} -> {cell['target']}: {figures}{verdict}")
    advice = (f"{one['method']}, {one['family']}: {one['choice']}. {one['explanation']}" for one in result["advice"])
    return [*lines, *advice]


def _marks(faults: list[str]) -> str:
    return f" (not proven: {'; '.join(faults)})" if faults else ""


def _slim_lines(result: dict[str, Any]) -> list[str]:
    size, test, utility = result["size"], result["test"], result["utility"]
    lines = [
        f"{result['model']}, suite {result['suite']}: {size['neurons']:,} neurons and {size['kv_heads']} KV heads in "
        "every layer",
        f"Held-out bias B   {_interval(test['bias_before'])} -> {_interval(test['bias_after'])}",
        f"Reduction         {_percent(test['reduction'])}",
        f"Perplexity        {utility['perplexity_before']:.2f} -> {utility['perplexity_after']:.2f}, "
        f"{_percent(utility['perplexity_increase'], 2)}",
    ]
    for name, title, unit in (
        ("parameters", "Parameters       ", "M"),
        ("file_bytes", "Weights on disk  ", "MB"),
        ("memory_bytes", "Memory           ", "MB"),
    ):
        before, after = result[name]
        lines.append(f"{title} {before / 1e6:,.1f} {unit} -> {after / 1e6:,.1f} {unit}, {after / before - 1:+.1%}")
    return [*lines, f"Decoding speed    {_interval(result['decode']['ratio'])} times"]


def _running(holder: str) -> str:
    return f"Another process is writing it ({holder})."


def _partial_lines(state: dict[str, Any], holder: str | None) -> list[str]:
    """What a run has found that is not finished."""
    how, then = ("Interrupted", HOW_TO_CARRY_ON) if holder is None else ("Running", _running(holder))
    if "methods" in state:
        done = ", ".join(found["name"] for found in state["methods"]) or "no method yet"
        return [f"{how} comparison; finished: {done}. {then}"]
    if "fits" in state:
        done = ", ".join(f"{fit['method']} on {fit['source']}" for fit in state["fits"]) or "none yet"
        return [f"{how} study of where repairs hold; finished: {done}. {then}"]
    if state["key"].get("study") == "localise":
        return [f"{how} localisation of suite {state['suite']}. {then}"]
    if "candidates" not in state:
        return [f"{how} repair; no candidate was measured yet. {then}"]
    lines = [f"{how} repair of suite {state['suite']}; candidates measured so far on the select part:"]
    for candidate in state["candidates"]:
        lines.append(
            f"  {_units(candidate)}: bias B {candidate['bias']:.2f}, perplexity {candidate['perplexity_increase']:+.2%}"
            if candidate["bias"] is not None
            else f"  {_units(candidate)}: the model's answers are not finite"
        )
    return [*lines, then]


# What is made of the file of every study, see RESULTS.
Reader = Callable[[dict[str, Any]], list[str]]
READERS: dict[str, Reader] = {
    "repair": result_lines,
    "compare": _compare_lines,
    "generalise": _generalise_lines,
    "audit": _audit_lines,
    "localise": _localise_lines,
    "verify": verification_lines,
    "slim": _slim_lines,
}


def _units(found: dict[str, Any]) -> str:
    if found.get("weights"):
        return f"{found['weights']:,} single weights"
    return f"{found['heads']} heads, {found['neurons']} neurons"


def suites_table(suites: list[Suite]) -> Table:
    """The built-in suites, one line each."""
    table = Table(box=box.SIMPLE_HEAD)
    # A name is there to be copied, so it is never cut.
    table.add_column("suite", min_width=max(len(suite.name) for suite in suites))
    for heading in ("attribute", "language", "groups x markers", "scenarios", "title"):
        table.add_column(heading, overflow="fold")
    for suite in suites:
        sizes = sorted({len(markers) for markers in suite.groups.values()})
        size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        title = f"{suite.title} (control)" if suite.control else suite.title
        cells = (
            suite.name,
            suite.attribute,
            suite.language,
            f"{len(suite.groups)} x {size}",
            len(suite.scenarios),
            title,
        )
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


def suite_lines(suite: Suite, examples: int) -> list[str]:
    """A suite in words, with filled examples from different scenarios and groups."""
    lines = [f"{suite.name} (version {suite.version}): {suite.title}", suite.description, ""]
    for group, markers in suite.groups.items():
        lines.append(f"group {group} ({len(markers)}): {', '.join(markers[:6])}, ...")
    lines += [f"source: {source}" for source in suite.sources]
    groups = list(suite.groups.values())
    for number in range(min(examples, len(suite.scenarios))):
        scenario = suite.scenarios[number]
        markers = groups[number % len(groups)]
        marker = markers[number % len(markers)]
        prompt, reply = fill(scenario.paraphrases[number % len(scenario.paraphrases)], marker)
        candidates = candidate_texts(scenario.measure, marker)
        shown = ", ".join(repr(text) for text in candidates[:4]) + (", ..." if len(candidates) > 4 else "")
        chosen = getattr(scenario.measure, "favourable", None)
        decides = f"; favourable: {getattr(scenario.measure, chosen)[0]!r}" if chosen else ""
        lines += ["", f"[{scenario.id}] {scenario.measure.kind}: {shown}{decides}"]
        lines += [f"  user: {prompt}"] if prompt else []
        lines += [f"  assistant: {reply} ..."] if reply else []
    return lines
