"""Maps of a model's units, layer by layer: what each one scored, and which are removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from secateur.reports.figures import AFTER, numbered, style
from secateur.units import Unit, UnitSpace

# Columns of a map; where layers have more units, a column stands for several and shows the highest score.
COLUMNS = 192
NAMED = 12


@dataclass(frozen=True)
class _Kind:
    """How a kind of units is drawn."""

    name: str
    counts: tuple[int, ...]
    rows: list[np.ndarray]
    mark: int


def heads_map(space: UnitSpace, removed: Sequence[Unit], rank: np.ndarray | None, action: str) -> go.Figure | None:
    """Every head's score by layer, the removed ones marked; None where no head was scored or removed.

    Parameters
    ----------
    rank: (units,), the higher, the sooner a unit is removed; NaN without a score; None where no unit was scored.
    action: what became of the marked units, "removed" or "turned down".
    """
    rows = [] if rank is None else [rank[space.head_slice(layer)] for layer in range(space.n_layers)]
    return _map(_Kind("head", space.heads, rows, 11), removed, action)


def neurons_map(space: UnitSpace, removed: Sequence[Unit], rank: np.ndarray | None, action: str) -> go.Figure | None:
    """The same for neurons."""
    rows = [] if rank is None else [rank[space.neuron_slice(layer)] for layer in range(space.n_layers)]
    return _map(_Kind("neuron", space.neurons, rows, 8), removed, action)


def _map(kind: _Kind, removed: Sequence[Unit], action: str) -> go.Figure | None:
    marked = [unit for unit in removed if unit.kind == kind.name]
    scored = any(np.isfinite(row).any() for row in kind.rows)
    if not marked and not scored:
        return None
    figure, layers, longest = go.Figure(), len(kind.counts), max(kind.counts)
    width = -(-longest // COLUMNS)
    if scored:
        _draw_scores(figure, kind, width)
    _draw_marks(figure, kind, marked, width, action)
    figure.update_xaxes(title_text=kind.name, **numbered(longest))
    figure.update_yaxes(title_text="layer", **numbered(layers))
    return style(figure, 90 + min(560, max(90, 15 * layers)), showlegend=False)


def _draw_scores(figure: go.Figure, kind: _Kind, width: int) -> None:
    """A cell for every ``width`` units, coloured by the highest score among them; blank without a score."""
    columns = -(-max(kind.counts) // width)
    scores = np.full((len(kind.rows), columns * width), np.nan)
    for layer, row in enumerate(kind.rows):
        scores[layer, : len(row)] = np.where(np.isfinite(row), row, np.nan)
    cells = scores.reshape(len(kind.rows), columns, width)
    best = np.argmax(np.where(np.isnan(cells), -np.inf, cells), axis=2)
    highest = np.take_along_axis(cells, best[:, :, None], axis=2)[:, :, 0]
    known = np.abs(highest[~np.isnan(highest)])
    bound = (float(np.percentile(known, 98)) if len(known) else 0.0) or 1.0
    first = width * np.arange(columns)
    figure.add_heatmap(
        z=[[_short(value) for value in row] for row in highest],
        x0=(width - 1) / 2,
        dx=width,
        customdata=(first + best).tolist(),
        zmin=-bound,
        zmax=bound,
        colorscale="RdBu",
        reversescale=True,
        showscale=False,
        hoverongaps=False,
        hovertemplate=f"layer %{{y}}, {kind.name} %{{customdata}}<br>score %{{z:.3g}}"
        + (f", the highest of {width} neighbours" if width > 1 else "")
        + "<extra></extra>",
    )


def _short(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.3g}")


def _draw_marks(figure: go.Figure, kind: _Kind, removed: Sequence[Unit], width: int, action: str) -> None:
    """A mark for every cell of which something is removed, at its unit; the hover names each unit."""
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for unit in removed:
        cells[unit.layer, unit.index // width].append(unit.index)
    figure.add_scatter(
        x=[float(np.mean(indices)) for indices in cells.values()],
        y=[layer for layer, _ in cells],
        mode="markers",
        marker={"symbol": "x", "size": kind.mark, "color": AFTER, "line": {"width": 1, "color": "white"}},
        text=[_told(kind, layer, indices) for (layer, _), indices in cells.items()],
        hovertemplate=f"{action}: layer %{{y}}, %{{text}}<extra></extra>",
    )


def _told(kind: _Kind, layer: int, indices: list[int]) -> str:
    """The removed units of one cell, with their scores where there are any."""
    words = f"{kind.name}{'s' if len(indices) > 1 else ''} {listed(indices)}"
    if not kind.rows:
        return words
    scores = [f"{kind.rows[layer][index]:.3g}" for index in sorted(indices)[:NAMED]]
    return f"{words}<br>score {', '.join(scores)}"


def listed(indices: Sequence[int], most: int = NAMED, scores: np.ndarray | None = None) -> str:
    """Numbers in words, the first of many only, each with its score where there is one.

    Parameters
    ----------
    scores: by number; NaN, infinite or None altogether for none.
    """

    def told(index: int) -> str:
        return f"{index} ({scores[index]:.3g})" if scores is not None and np.isfinite(scores[index]) else str(index)

    shown = ", ".join(told(index) for index in sorted(indices)[:most])
    return shown if len(indices) <= most else f"{shown} and {len(indices) - most} more"


def removed_by_layer(
    space: UnitSpace, removed: Sequence[Unit], rank: np.ndarray | None, most: int = 60
) -> list[tuple[int, str, str]]:
    """What a map marks, in text: layer, heads and neurons of every layer that lost some, with their scores."""
    layers: dict[int, dict[str, list[int]]] = defaultdict(lambda: {"head": [], "neuron": []})
    for unit in removed:
        layers[unit.layer][unit.kind].append(unit.index)
    return [
        (
            layer,
            listed(found["head"], most, None if rank is None else rank[space.head_slice(layer)]),
            listed(found["neuron"], most, None if rank is None else rank[space.neuron_slice(layer)]),
        )
        for layer, found in sorted(layers.items())
    ]
