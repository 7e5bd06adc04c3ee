"""The pictures of a report, as Plotly figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from secateur.studies.audit import ScenarioDisparity
from secateur.studies.candidates import CandidateRecord
from secateur.studies.compare import MethodResult
from secateur.studies.reach import Cell, Fit, GeneraliseResult

# Each stands out from a white and from a dark page by at least 3 to 1.
BEFORE, AFTER, NEUTRAL = "#ea580c", "#0d9488", "#8b8b8b"
# Okabe and Ito's colours and black's grey stand-in, which colour-blind readers can tell apart, with symbols beside.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b8b8b", "#b8860b", "#7b3fa0")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "hexagon")
# Scales of heat maps, pale enough at both ends for one dark ink on every cell, on a white page and on a dark one.
PALE, FALL, RISE, INK = "#f5f5f4", "#14b8a6", "#f97316", "#1c1917"
CELL_TEXT = {"color": INK, "size": 12}
WIDEST_LIMITS = 10
WIDEST_NAME = 16
FEW = 12


@dataclass(frozen=True)
class Choices:
    """A figure that shows one thing at a time, and what replaces it for every other.

    Attributes
    ----------
    figure: of what is shown first. start: its number.
    names: of all things that can be chosen.
    states: for each of them what to set of the traces ("data") and of the layout, and its content in words ("text").
    """

    figure: go.Figure
    start: int
    names: list[str]
    states: list[dict[str, Any]]


def style(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """What all pictures share: nothing drawn behind them, no zoom that would catch a reader's scrolling.

    The colour of text comes from the page's style sheet, which follows the reader's light or dark scheme.
    """
    figure.update_layout(
        template="none",
        height=height,
        dragmode=False,
        hovermode="closest",
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": NEUTRAL, "size": 13},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        **layout,
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,.25)", zerolinecolor="rgba(128,128,128,.6)", automargin=True)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.25)", zerolinecolor="rgba(128,128,128,.6)", automargin=True)
    return figure


def numbered(count: int) -> dict[str, Any]:
    """An axis of so many cells, without a tick between two of them."""
    return {"range": [-0.5, count - 0.5], "zeroline": False, **({"dtick": 1} if count <= FEW else {})}


def plain(text: str, most: int | None = None) -> str:
    """Text that Plotly draws as it is, cut to ``most`` characters; its pseudo-HTML knows no entities for quotes."""
    cut = text if most is None or len(text) <= most else f"{text[: most - 1]}…"
    return escape(cut, quote=False)


def broken(name: str) -> str:
    """A long name on two lines, so that a narrow screen keeps room for the picture."""
    hyphens = [place for place, sign in enumerate(name) if sign == "-"]
    if len(name) <= WIDEST_NAME or not hyphens:
        return plain(name)
    middle = 1 + min(hyphens, key=lambda place: abs(2 * place - len(name)))
    return f"{plain(name[:middle])}<br>{plain(name[middle:])}"


def scenario_figure(before: list[ScenarioDisparity], after: list[ScenarioDisparity] | None = None) -> go.Figure:
    """|SMD| of every scenario, before and (where given) after, over the noise level."""
    names = [broken(scenario.id) for scenario in before]
    figure = go.Figure()
    if after is not None:
        for name, one, other in zip(names, before, after, strict=True):
            figure.add_scatter(
                x=[abs(one.smd.value), abs(other.smd.value)],
                y=[name, name],
                mode="lines",
                line={"color": "rgba(128,128,128,.5)", "width": 3},
                showlegend=False,
                hoverinfo="skip",
            )
    states = [("before", before, BEFORE)] + ([("after", after, AFTER)] if after is not None else [])
    for label, scenarios, colour in states:
        figure.add_scatter(
            x=[abs(s.smd.value) for s in scenarios],
            y=names,
            mode="markers",
            name=label if after is not None else "|SMD|",
            marker={"color": colour, "size": 11},
            customdata=[
                [plain(" - ".join(s.pair)), s.smd.value, s.smd.low, s.smd.high, s.gap.value] for s in scenarios
            ],
            hovertemplate="%{y}<br>%{customdata[0]}<br>SMD %{customdata[1]:.2f} "
            "[%{customdata[2]:.2f}, %{customdata[3]:.2f}]<br>gap %{customdata[4]:.2f}<extra></extra>",
        )
    figure.add_scatter(
        x=[s.null_abs_smd for s in before],
        y=names,
        mode="markers",
        name="noise (labels shuffled)",
        marker={"color": NEUTRAL, "symbol": "line-ns-open", "size": 12},
        hovertemplate="noise %{x:.2f}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed")
    return style(figure, 90 + 40 * len(names), xaxis_title="|SMD|")


def candidates_figure(candidates: list[CandidateRecord], limit: float) -> go.Figure:
    """Every candidate's bias and perplexity on the select part, with the chosen one and the Pareto front.

    Increases above :func:`widest_increase` are drawn there, since some masks destroy the model.
    """
    figure = go.Figure(_front(candidates, limit))
    symbols = {"heads": "diamond", "neurons": "circle", "both": "square"}
    for kind in dict.fromkeys(candidate.kind for candidate in candidates):
        group = [candidate for candidate in candidates if candidate.kind == kind]
        colours = [AFTER if c.chosen else NEUTRAL for c in group]
        figure.add_trace(_marks(kind, group, limit, color=colours, symbol=symbols.get(kind, "circle")))
    return _bias_by_cost(figure, limit, 380, "on select")


def sources_figure(fits: Sequence[Fit], limit: float) -> Choices | None:
    """The candidates of one fit at a time, with its own Pareto front; None where no fit has any.

    B of different sources cannot be set side by side.
    """
    shown = [fit for fit in fits if fit.candidates]
    if not shown:
        return None
    figure = go.Figure()
    for number, fit in enumerate(shown):
        colour, symbol = distinct(number)
        traces = _front(fit.candidates, limit), _marks(fit.source, fit.candidates, limit, color=colour, symbol=symbol)
        for trace in traces:
            figure.add_trace(trace.update(visible=number == 0))
    states = [
        {
            "data": {"visible": [one is fit for one in shown for _ in traces]},
            "layout": {},
            "text": f"{fit.source}. {_told(fit.candidates)}",
        }
        for fit in shown
    ]
    return Choices(_bias_by_cost(figure, limit, 400, "on select"), 0, [fit.source for fit in shown], states)


def _told(candidates: Sequence[CandidateRecord]) -> str:
    """Candidates in words."""
    inside = sum(one.within_limit for one in candidates)
    chosen = [f"{_units(c)}, B {c.bias:.2f} at {100 * c.perplexity_increase:+.2f} %" for c in candidates if c.chosen]
    return f"Candidates: {len(candidates)}, within the limit: {inside}; chosen: {', '.join(chosen) or 'none'}."


def distinct(number: int) -> tuple[str, str]:
    """Colour and symbol of one thing among many; the first 81 pairs differ."""
    return COLOURS[number % len(COLOURS)], SYMBOLS[(number + number // len(COLOURS)) % len(SYMBOLS)]


def _front(candidates: Sequence[CandidateRecord], limit: float) -> go.Scatter:
    best = pareto_front(candidates, limit)
    return go.Scatter(
        x=[100 * c.perplexity_increase for c in best],
        y=[c.bias for c in best],
        mode="lines",
        line={"color": AFTER, "width": 1.5, "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )


def _marks(name: str, candidates: Sequence[CandidateRecord], limit: float, **marker: Any) -> go.Scatter:
    """A mark for every candidate, a large one with a rim for the chosen one; ``marker`` says colour and symbol."""
    widest, told = widest_increase(limit), plain(name)
    return go.Scatter(
        x=[100 * min(c.perplexity_increase, widest) for c in candidates],
        y=[c.bias for c in candidates],
        mode="markers",
        name=told,
        marker={
            "size": [15 if c.chosen else 8 for c in candidates],
            "opacity": [1.0 if c.chosen else 0.85 for c in candidates],
            "line": {"width": [2 if c.chosen else 0 for c in candidates], "color": NEUTRAL},
            **marker,
        },
        customdata=[[_units(c), ", chosen" if c.chosen else "", 100 * c.perplexity_increase] for c in candidates],
        hovertemplate=f"{told}, select<br>%{{customdata[0]}}%{{customdata[1]}}<br>"
        "B %{y:.2f}, perplexity %{customdata[2]:+.2f} %<extra></extra>",
    )


def _bias_by_cost(figure: go.Figure, limit: float, height: int, part: str = "") -> go.Figure:
    """Bias over the increase of perplexity, with the limit."""
    figure.add_vline(x=100 * limit, line_dash="dash", line_color=BEFORE, annotation_text="limit")
    figure.update_yaxes(rangemode="tozero")
    titles = {"xaxis_title": f"perplexity increase {part}".strip() + ", %", "yaxis_title": f"bias B {part}".strip()}
    return style(figure, height, **titles)


def pareto_front(candidates: Sequence[CandidateRecord], limit: float) -> list[CandidateRecord]:
    """The candidates, cheapest first, that are each better than all cheaper ones, as far as they are drawn."""
    front: list[CandidateRecord] = []
    for one in sorted(candidates, key=lambda c: (c.perplexity_increase, c.bias)):
        inside = one.perplexity_increase <= widest_increase(limit)
        if inside and (not front or one.bias < front[-1].bias):
            front.append(one)
    return front


def widest_increase(limit: float) -> float:
    """The largest perplexity increase that is drawn to scale."""
    return WIDEST_LIMITS * limit


def pareto_figure(methods: list[MethodResult], limit: float) -> go.Figure:
    """Every candidate of every method on select with the front of them all, and each method's choice on test with its
    intervals.

    Increases above :func:`widest_increase` are drawn there, since some masks destroy the model.
    """
    figure = go.Figure(_front([one for found in methods for one in found.candidates], limit))
    for number, found in enumerate(methods):
        name, (colour, symbol) = plain(found.name), distinct(number)
        marks = _marks(found.name, found.candidates, limit, color=colour, symbol=symbol)
        figure.add_trace(marks.update(legendgroup=name))
        if found.bias_after is not None and found.perplexity_increase is not None:
            bias, increase = found.bias_after, found.perplexity_increase
            figure.add_scatter(
                x=[100 * increase.value],
                y=[bias.value],
                error_x=_bar(increase.value, increase.low, increase.high, 100),
                error_y=_bar(bias.value, bias.low, bias.high, 1),
                mode="markers",
                legendgroup=name,
                showlegend=False,
                marker={"color": colour, "symbol": symbol, "size": 19, "line": {"width": 1.5, "color": "white"}},
                hovertemplate=f"{name}, chosen, test<br>B %{{y:.2f}}, perplexity %{{x:+.2f}} %<extra></extra>",
            )
    before = next((found.bias_before for found in methods if found.bias_before is not None), None)
    if before is not None:
        figure.add_scatter(
            x=[0],
            y=[before.value],
            error_y=_bar(before.value, before.low, before.high, 1),
            mode="markers",
            name="unpruned, test",
            marker={"color": BEFORE, "symbol": "x", "size": 11},
            hovertemplate="unpruned, test<br>B %{y:.2f}<extra></extra>",
        )
    return _bias_by_cost(figure, limit, 520)


def _units(candidate: CandidateRecord) -> str:
    if candidate.weights:
        return f"{candidate.weights:,} single weights"
    return f"{candidate.heads} heads, {candidate.neurons} neurons"


def _bar(value: float, low: float, high: float, scale: float) -> dict[str, Any]:
    return {
        "array": [scale * max(0.0, high - value)],
        "arrayminus": [scale * max(0.0, value - low)],
        "thickness": 1.2,
        "width": 4,
    }


def cost_figure(methods: list[MethodResult]) -> go.Figure:
    """Tokens by every method: forward to find the units and to choose, and backward."""
    names = [plain(found.name) for found in methods]
    figure = go.Figure()
    parts = (
        ("to find the units", AFTER, [found.localise_tokens for found in methods]),
        ("to choose and to judge", NEUTRAL, [found.tokens_forward - found.localise_tokens for found in methods]),
        ("backward", BEFORE, [found.tokens_backward for found in methods]),
    )
    for label, colour, tokens in parts:
        figure.add_bar(
            y=names,
            x=tokens,
            orientation="h",
            name=label,
            marker_color=colour,
            customdata=[[found.seconds] for found in methods],
            hovertemplate="%{y}: %{x:,} tokens " + label + "<br>%{customdata[0]:.0f} s in all<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed")
    return style(figure, 110 + 34 * len(names), barmode="stack", xaxis_title="tokens")


def matrix_figure(result: GeneraliseResult, name: str) -> go.Figure:
    """Held-out change of B of one method, by source (rows) and target (columns); stars are proven."""
    cells = {(cell.source, cell.target): cell for cell in result.cells if cell.method == name}
    targets = [suite.name for suite in result.suites]
    sources = result.sources(name)
    grid = [[cells.get((source, target)) for target in targets] for source in sources]
    figure = go.Figure()
    figure.add_heatmap(
        x=[plain(target) for target in targets],
        y=[broken(source) for source in sources],
        z=[[None if cell is None else round(cell.change_percent.value, 1) for cell in row] for row in grid],
        zmin=-100,
        zmax=100,
        colorscale=[[0, FALL], [0.5, PALE], [1, RISE]],
        colorbar={"title": "change<br>of B, %", "thickness": 12},
        text=[["" if cell is None else _cell_label(cell) for cell in row] for row in grid],
        texttemplate="%{text}",
        textfont=CELL_TEXT,
        customdata=[
            [
                [""] * 4
                if cell is None
                else [
                    f"B {cell.before.value:.2f} to {cell.after.value:.2f}",
                    f"{cell.change_percent.low:+.0f} to {cell.change_percent.high:+.0f} %",
                    ", ".join(cell.differs) or cell.relation,
                    "" if cell.relation == "random" else "proven" if cell.proven else "; ".join(cell.faults),
                ]
                for cell in row
            ]
            for row in grid
        ],
        hovertemplate="fitted on %{y}<br>judged on %{x} (%{customdata[2]})<br>%{customdata[0]}, %{z:+.0f} % "
        "[%{customdata[1]}]<br>%{customdata[3]}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
    )
    figure.update_yaxes(autorange="reversed", title={"text": "fitted on", "standoff": 14})
    figure.update_xaxes(title_text="judged on", tickangle=-40)
    return style(figure, 190 + 34 * len(sources))


def _cell_label(cell: Cell) -> str:
    """The label of a cell: bold where it is proven, in italics where no bias was shown before."""
    if cell.proven:
        return f"<b>{cell.label}</b>"
    return cell.label if cell.bias_shown or not cell.repaired else f"<i>{cell.label}</i>"


def agreement_figure(result: GeneraliseResult, name: str) -> go.Figure:
    """Jaccard's index of the units of every two suites, with what chance gives in the hover."""
    found = [one for one in result.agreements if one.method == name]
    names = [suite.name for suite in result.suites if any(suite.name in (one.one, one.other) for one in found)]
    place = {suite: number for number, suite in enumerate(names)}
    z = np.full((len(names), len(names)), np.nan)
    hover = [["" for _ in names] for _ in names]
    for one in found:
        words = f"{one.found.shared} shared; by chance {one.found.by_chance:.3f}, p (Holm) {one.p_holm:.3g}"
        for row, column in ((one.one, one.other), (one.other, one.one)):
            z[place[row], place[column]] = round(one.found.jaccard, 3)
            hover[place[row]][place[column]] = words
    labels = [broken(suite) for suite in names]
    figure = go.Figure()
    figure.add_heatmap(
        x=labels,
        y=labels,
        z=[[None if np.isnan(value) else value for value in row] for row in z.tolist()],
        zmin=0,
        zmax=max((one.found.jaccard for one in found), default=0) or 1,
        colorscale=[[0, PALE], [1, FALL]],
        colorbar={"title": "Jaccard", "thickness": 12},
        texttemplate="%{z:.2f}",
        textfont=CELL_TEXT,
        customdata=hover,
        hovertemplate="%{y} and %{x}<br>Jaccard %{z:.3f}: %{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-40)
    return style(figure, 170 + 32 * len(names))


def layers_figure(layers: dict[str, list[int]]) -> go.Figure:
    """How many units every source's repair removes in every layer."""
    sources = list(layers)
    depth = max(map(len, layers.values()), default=0)
    figure = go.Figure()
    figure.add_heatmap(
        x=list(range(depth)),
        y=[broken(source) for source in sources],
        z=[layers[source] for source in sources],
        zmin=0,
        zmax=max((max(counts) for counts in layers.values()), default=0) or 1,
        colorscale=[[0, PALE], [1, FALL]],
        colorbar={"title": "units", "thickness": 12},
        hovertemplate="%{y}, layer %{x}: %{z} units<extra></extra>",
        xgap=1,
        ygap=2,
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="layer", **numbered(depth))
    return style(figure, 120 + 28 * len(sources))
