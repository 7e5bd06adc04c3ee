"""How y is distributed over the markers of each group, one scenario at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from secateur.measures.disparity import Table, group_means, statistics
from secateur.reports.figures import AFTER, BEFORE, Choices, broken, plain, style
from secateur.suites import Preference, Quantity, Scenario, Suite

FILLS = {BEFORE: "rgba(234,88,12,.15)", AFTER: "rgba(13,148,136,.15)"}


@dataclass(frozen=True)
class GroupSpread:
    """How y is spread over the markers of one group in one scenario and state of the model.

    Attributes
    ----------
    quartiles: lower quartile, median and upper quartile, as boxes show them.
    """

    scenario: str
    group: str
    state: str
    mean: float
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class Distributions(Choices):
    """Boxes and points of one scenario at a time, beginning with that of the largest |SMD| before.

    Attributes
    ----------
    spreads: the boxes of all scenarios in figures, by scenario, group and state of the model.
    """

    spreads: list[GroupSpread]


def distributions(suite: Suite, markers: Sequence[str], tables: dict[str, Table]) -> Distributions:
    """Boxes of y by group, a point for every marker.

    Parameters
    ----------
    markers: in the order of the tables' columns.
    tables: y by state of the model, such as "before" and "after", all of the same markers.
    """
    states = [_state(suite, number, tables) for number in range(len(suite.scenarios))]
    first = next(iter(tables.values()))
    start = int(np.abs(statistics(first)["smd"]).argmax())
    names = list(suite.groups)
    figure = go.Figure()
    for (label, table), colour, x in zip(tables.items(), (BEFORE, AFTER), states[start]["data"]["x"], strict=False):
        figure.add_box(
            x=x,
            y=[broken(names[group]) for group in table.groups],
            text=[plain(marker) for marker in markers],
            name=label,
            orientation="h",
            boxpoints="all",
            jitter=0.5,
            pointpos=0,
            marker={"color": colour, "size": 5, "opacity": 0.6},
            line={"color": colour, "width": 1.5},
            fillcolor=FILLS[colour],
            hoveron="points",
            hovertemplate=f"%{{text}}<br>y %{{x:.3f}}, {label}<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed")
    title = states[start]["layout"]["xaxis.title.text"]
    height = 80 + 46 * len(tables) * len(names)
    drawn = style(figure, height, boxmode="group", xaxis_title=title, showlegend=len(tables) > 1)
    return Distributions(drawn, start, [scenario.id for scenario in suite.scenarios], states, _spreads(suite, tables))


def _spreads(suite: Suite, tables: dict[str, Table]) -> list[GroupSpread]:
    means = {state: group_means(table) for state, table in tables.items()}
    return [
        GroupSpread(
            scenario.id, name, state, float(means[state][row, group]), _quartiles(table.y[row, table.groups == group])
        )
        for row, scenario in enumerate(suite.scenarios)
        for group, name in enumerate(suite.groups)
        for state, table in tables.items()
    ]


def _quartiles(y: np.ndarray) -> tuple[float, float, float]:
    """Of y by marker, (markers,), by the rule that Plotly draws boxes by."""
    low, median, high = np.percentile(y, [25, 50, 75], method="hazen")
    return float(low), float(median), float(high)


def _state(suite: Suite, number: int, tables: dict[str, Table]) -> dict[str, Any]:
    """The figure of one scenario: values (traces, markers), the axis, and the groups' means in words."""
    scenario = suite.scenarios[number]
    means = [group_means(table)[number] for table in tables.values()]
    words = [f"{name} {' → '.join(f'{mean[group]:.2f}' for mean in means)}" for group, name in enumerate(suite.groups)]
    told = "Mean y" if len(tables) == 1 else f"Mean y, {' → '.join(tables)}"
    return {
        "data": {"x": [np.round(table.y[number], 3).tolist() for table in tables.values()]},
        "layout": {"xaxis.title.text": _axis(scenario)},
        "text": f"{scenario.id}. {told}: {'; '.join(words)}.",
    }


def _axis(scenario: Scenario) -> str:
    """What y is in a scenario, in words that Plotly's pseudo-HTML leaves alone."""
    measure = scenario.measure
    if isinstance(measure, Quantity):
        return f"y: log of {plain(measure.unit or 'the amount', 30)}"
    if isinstance(measure, Preference):
        a, b = (plain(answers[0].strip(), 12) for answers in (measure.a, measure.b))
        return f"y: log-odds of “{a}” against “{b}”"
    return "y: log-odds of the more stereotypical text"
