"""The pictures of a report, as Plotly figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from secateur.studies.audit import ScenarioDisparity
from secateur.studies.candidates import CandidateRecord
from secateur.units import UnitSpace

BEFORE, AFTER, NEUTRAL = "#c2410c", "#0f766e", "#8b8b8b"


def _style(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    figure.update_layout(
        height=height,
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


def scenario_figure(before: list[ScenarioDisparity], after: list[ScenarioDisparity] | None = None) -> go.Figure:
    """|SMD| of every scenario, before and (where given) after, over the noise level."""
    names = [escape(scenario.id) for scenario in before]
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
                [escape(" - ".join(s.pair)), s.smd.value, s.smd.low, s.smd.high, s.gap.value] for s in scenarios
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
    return _style(figure, 90 + 30 * len(names), xaxis_title="|SMD|")


def candidates_figure(candidates: list[CandidateRecord], limit: float) -> go.Figure:
    """Every candidate's bias and perplexity on the select part, with the chosen one."""
    figure = go.Figure()
    symbols = {"heads": "diamond", "neurons": "circle", "both": "square"}
    for kind in dict.fromkeys(candidate.kind for candidate in candidates):
        group = [candidate for candidate in candidates if candidate.kind == kind]
        figure.add_scatter(
            x=[100 * c.perplexity_increase for c in group],
            y=[c.bias for c in group],
            mode="markers",
            name=escape(kind),
            marker={
                "symbol": symbols.get(kind, "circle"),
                "size": [16 if c.chosen else 9 for c in group],
                "color": [AFTER if c.chosen else NEUTRAL for c in group],
            },
            customdata=[[c.heads, c.neurons, "chosen" if c.chosen else ""] for c in group],
            hovertemplate="%{customdata[0]} heads, %{customdata[1]} neurons %{customdata[2]}<br>"
            "bias %{y:.2f}, perplexity %{x:+.2f} %<extra></extra>",
        )
    figure.add_vline(x=100 * limit, line_dash="dash", line_color=BEFORE, annotation_text="limit")
    figure.update_yaxes(rangemode="tozero")
    return _style(figure, 380, xaxis_title="perplexity increase on select, %", yaxis_title="bias B on select")


def units_figure(space: UnitSpace, removed: Sequence[tuple[str, int, int]], rank: np.ndarray | None) -> go.Figure:
    """Heads by layer with their scores and the removed ones marked, and removed neurons by layer."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.5, 0.5], subplot_titles=("heads: score", "neurons removed per layer")
    )
    layers = list(range(space.n_layers))
    if rank is not None:
        grid = np.full((space.n_layers, max(space.heads)), np.nan)
        for layer in layers:
            grid[layer, : space.heads[layer]] = rank[space.head_slice(layer)]
        scored = np.abs(grid[~np.isnan(grid)])
        bound = (float(np.percentile(scored, 98)) if len(scored) else 0.0) or 1.0
        figure.add_heatmap(
            z=np.round(grid, 4).tolist(),
            zmin=-bound,
            zmax=bound,
            colorscale="RdBu",
            reversescale=True,
            showscale=False,
            hovertemplate="layer %{y}, head %{x}<br>score %{z:.3g}<extra></extra>",
            row=1,
            col=1,
        )
    heads = [(layer, index) for kind, layer, index in removed if kind == "head"]
    figure.add_scatter(
        x=[index for _, index in heads],
        y=[layer for layer, _ in heads],
        mode="markers",
        marker={"symbol": "x", "size": 10, "color": AFTER, "line": {"width": 1, "color": "white"}},
        hovertemplate="removed: layer %{y}, head %{x}<extra></extra>",
        showlegend=False,
        row=1,
        col=1,
    )
    counts = [sum(1 for kind, at, _ in removed if kind == "neuron" and at == layer) for layer in layers]
    figure.add_bar(
        x=counts,
        y=layers,
        orientation="h",
        marker_color=AFTER,
        showlegend=False,
        hovertemplate="layer %{y}: %{x} neurons<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_xaxes(title_text="head", row=1, col=1)
    figure.update_xaxes(title_text="neurons", row=1, col=2)
    return _style(figure, 60 + 14 * max(20, space.n_layers)).update_layout(margin={"t": 40})
