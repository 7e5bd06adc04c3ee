"""What the figures of reports hold, beside plain arithmetic on the same figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from command import small_suite
from synthetic import METHODS, reach

from secateur.measures.disparity import Table
from secateur.reports.distributions import distributions
from secateur.reports.figures import (
    agreement_figure,
    broken,
    candidates_figure,
    matrix_figure,
    pareto_figure,
    pareto_front,
    plain,
    sources_figure,
)
from secateur.reports.maps import COLUMNS, heads_map, listed, neurons_map, removed_by_layer
from secateur.studies.candidates import CandidateRecord
from secateur.studies.compare import MethodResult
from secateur.studies.reach import Fit
from secateur.suites import Suite
from secateur.units import Unit, UnitSpace

NEURONS = 3 * COLUMNS - 5  # three to a column, the last column not full


def space(neurons: int = NEURONS) -> UnitSpace:
    return UnitSpace(heads=(4, 3), kv_heads=(1, 1), neurons=(neurons, neurons - 7), head_dim=8)


def trace(figure: go.Figure | None, kind: str) -> dict[str, Any]:
    """The only trace of a kind, as a browser reads it."""
    assert figure is not None
    (found,) = [one for one in json.loads(figure.to_json())["data"] if one["type"] == kind]
    return dict(found)


def some_rank(units: UnitSpace) -> np.ndarray:
    rank = np.random.default_rng(0).normal(size=len(units))
    rank[units.head_slice(0)][1] = np.nan
    rank[units.neuron_slice(1)][:3] = [np.nan, -np.inf, np.nan]
    return rank


def test_a_cell_shows_the_highest_score_of_its_neurons_and_whose_it_is() -> None:
    units = space()
    rank = some_rank(units)
    cells = trace(neurons_map(units, [], rank, "removed"), "heatmap")
    assert (cells["x0"], cells["dx"]) == (1, 3)
    for layer in range(2):
        row = rank[units.neuron_slice(layer)]
        for column, (score, best) in enumerate(zip(cells["z"][layer], cells["customdata"][layer], strict=True)):
            part = [(value, 3 * column + i) for i, value in enumerate(row[3 * column : 3 * column + 3])]
            scored = [(value, index) for value, index in part if np.isfinite(value)]
            if not scored:
                assert score is None
            else:
                assert score == pytest.approx(max(scored)[0], rel=0.01)
                assert best == max(scored)[1]


def test_heads_have_a_cell_each_and_blanks_where_there_is_no_score() -> None:
    units = space()
    rank = some_rank(units)
    cells = trace(heads_map(units, [], rank, "removed"), "heatmap")
    expected = [[*rank[:4].tolist()], [*rank[4:7].tolist(), None]]
    expected[0][1] = None
    assert cells["z"] == [[None if v is None else pytest.approx(v, rel=0.01) for v in row] for row in expected]


def test_small_scores_are_not_rounded_away() -> None:
    units = space()
    rank = some_rank(units) * 1e-7
    cells = trace(heads_map(units, [], rank, "removed"), "heatmap")
    assert cells["z"][0][0] == pytest.approx(rank[0], rel=0.01)


@pytest.mark.parametrize("scored", [True, False])
def test_marks_name_the_removed_units(scored: bool) -> None:
    units = space()
    removed = [Unit("head", 1, 2), Unit("neuron", 0, 7), Unit("neuron", 0, 8), Unit("neuron", 1, 9)]
    rank = some_rank(units) if scored else None
    heads = trace(heads_map(units, removed, rank, "removed"), "scatter")
    neurons = trace(neurons_map(units, removed, rank, "turned down"), "scatter")
    assert (heads["x"], heads["y"]) == ([2], [1])
    told = ["head 2", "neurons 7, 8", "neuron 9"]
    if rank is not None:
        first, second = rank[units.neuron_slice(0)], rank[units.neuron_slice(1)]
        scores = (f"{rank[6]:.3g}", f"{first[7]:.3g}, {first[8]:.3g}", f"{second[9]:.3g}")
        told = [f"{words}<br>score {score}" for words, score in zip(told, scores, strict=True)]
    assert heads["text"] + neurons["text"] == told
    assert (neurons["x"], neurons["y"]) == ([7.5, 9], [0, 1])
    assert neurons["hovertemplate"].startswith("turned down: layer ")
    rows = [(0, "", "7, 8"), (1, "2", "9")]
    if rank is not None:
        told = f"7 ({first[7]:.3g}), 8 ({first[8]:.3g})"
        rows = [(0, "", told), (1, f"2 ({rank[6]:.3g})", f"9 ({second[9]:.3g})")]
    assert removed_by_layer(units, removed, rank) == rows


def test_maps_stay_small_for_large_models() -> None:
    units = UnitSpace(heads=(64,) * 80, kv_heads=(8,) * 80, neurons=(28672,) * 80, head_dim=128)
    removed = [Unit("neuron", layer, index) for layer in range(80) for index in range(0, 28672, 64)]
    figure = neurons_map(units, removed, np.random.default_rng(0).normal(size=len(units)), "removed")
    assert len(trace(figure, "heatmap")["z"][0]) <= COLUMNS
    assert figure is not None
    assert len(figure.to_json()) < 1_500_000


def test_there_is_no_map_of_what_was_neither_scored_nor_removed() -> None:
    units = space()
    rank = some_rank(units)
    rank[: units.n_heads] = np.nan
    assert heads_map(units, [Unit("neuron", 0, 7)], rank, "removed") is None
    assert neurons_map(units, [], rank, "removed") is not None
    assert neurons_map(units, [Unit("head", 0, 1)], None, "removed") is None
    assert heads_map(units, [Unit("head", 0, 1)], rank, "removed") is not None


def test_long_lists_are_cut() -> None:
    assert listed([3, 1, 2]) == "1, 2, 3"
    assert listed(range(20), 3) == "0, 1, 2 and 17 more"
    assert listed([2, 0, 1], 3, np.array([0.5, np.nan, -np.inf])) == "0 (0.5), 1, 2"


def test_distributions_hold_every_scenario_and_start_with_the_largest_disparity() -> None:
    suite = plain_suite()
    groups = np.repeat([0, 1], 8)
    y = np.random.default_rng(0).normal(size=(3, 16))
    y[2] += 9 * groups
    before, after = Table(y, groups), Table(y / 2, groups)
    markers = [f"<b>{name}" for name in [*suite.groups["boats"], *suite.groups["lamps"]]]
    found = distributions(suite, markers, {"before": before, "after": after})
    assert (found.start, found.names) == (2, ["like", "price", "end"])
    assert [box.name for box in found.figure.data] == ["before", "after"]
    assert list(found.figure.data[0].y) == ["boats"] * 8 + ["lamps"] * 8
    assert found.figure.data[0].text[0].startswith("&lt;b&gt;")
    for number, state in enumerate(found.states):
        np.testing.assert_allclose(state["data"]["x"], [y[number], y[number] / 2], atol=1e-3)
    boats, lamps = y[2, :8].mean(), y[2, 8:].mean()
    means = f"boats {boats:.2f} → {boats / 2:.2f}; lamps {lamps:.2f} → {lamps / 2:.2f}"
    assert found.states[2]["text"] == f"end. Mean y, before → after: {means}."
    spreads = {(one.scenario, one.group, one.state): one for one in found.spreads}
    assert len(spreads) == len(found.spreads) == 3 * 2 * 2
    lamps_after = np.sort(y[2, 8:] / 2)
    shown = spreads["end", "lamps", "after"]
    assert shown.mean == pytest.approx(lamps_after.mean())
    expected = [lamps_after[1:3].mean(), lamps_after[3:5].mean(), lamps_after[5:7].mean()]
    assert shown.quartiles == pytest.approx(expected)


def plain_suite() -> Suite:
    document = small_suite()
    for scenario in document["scenarios"]:
        scenario["paraphrases"] = [{"prompt": text} for text in scenario["paraphrases"]]
    return Suite.model_validate(document)


def test_text_for_plotly_keeps_quotes_and_loses_markup() -> None:
    assert plain("""O'Neil "Tip" <b>""") == """O'Neil "Tip" &lt;b&gt;"""
    assert plain("thousands of dollars", 10) == "thousands…"
    assert plain("ten signs.", 10) == "ten signs."


def test_long_names_break_at_the_hyphen_nearest_to_the_middle() -> None:
    assert broken("short-name") == "short-name"
    assert broken("days-to-learn-booking-system") == "days-to-learn-<br>booking-system"
    assert broken("averyverylongnamewithoutany") == "averyverylongnamewithoutany"


def candidate(increase: float, bias: float, chosen: bool = False) -> CandidateRecord:
    return CandidateRecord("neurons", 0, 4, bias, bias**2, 0.5, increase, increase, increase < 0.02, chosen=chosen)


def test_the_pareto_front_leaves_out_what_is_no_better_than_cheaper_masks_and_what_is_not_drawn() -> None:
    one, worse, two, far = candidate(0.0, 1.0), candidate(0.01, 1.2), candidate(0.02, 0.4), candidate(3.0, 0.1)
    lost = candidate(float("inf"), float("nan"))
    assert pareto_front([far, two, worse, lost, one], 0.02) == [one, two]
    drawn = json.loads(candidates_figure([one, far], 0.02).to_json())["data"]
    assert drawn[1]["x"] == [0, 20]


def luminance(colour: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB colours from 0 to 1, (..., 3), as WCAG 2 defines it."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return np.asarray(linear @ [0.2126, 0.7152, 0.0722])


def rgb(colour: str) -> list[float]:
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]


@pytest.mark.parametrize("picture", [matrix_figure, agreement_figure])
def test_the_text_of_every_cell_stands_out_from_its_colour(picture: Callable[..., go.Figure]) -> None:
    """At least 4.5 to 1 over the whole scale; cells are opaque, so the same on a light page and on a dark one."""
    cells = trace(picture(reach(), METHODS[0]), "heatmap")
    places, colours = zip(*cells["colorscale"], strict=True)
    ends, along = np.array([rgb(colour) for colour in colours]), np.linspace(0, 1, 201)
    drawn = luminance(np.stack([np.interp(along, places, channel) for channel in ends.T], axis=1))
    ink = luminance(np.array(rgb(cells["textfont"]["color"])))
    contrast = (np.maximum(drawn, ink) + 0.05) / (np.minimum(drawn, ink) + 0.05)
    assert contrast.min() >= 4.5
    assert cells["texttemplate"]


def test_candidates_of_one_source_at_a_time_are_told_apart() -> None:
    one, two = [candidate(0.0, 1.0), candidate(0.01, 0.5, chosen=True)], [candidate(0.0, 0.7)]
    fits = [Fit("m", "a<b", "chosen", one), Fit("m", "none", "no candidate", []), Fit("m", "c", "no reduction", two)]
    found = sources_figure(fits, 0.02)
    assert found is not None
    assert found.names == ["a<b", "c"]
    traces = json.loads(found.figure.to_json())["data"]
    marks = [trace for trace in traces if trace["mode"] == "markers"]
    assert [trace["visible"] for trace in traces] == found.states[0]["data"]["visible"] == [True, True, False, False]
    assert found.states[1]["data"]["visible"] == [False, False, True, True]
    assert [trace["hovertemplate"].split(",")[0] for trace in marks] == ["a&lt;b", "c"]
    assert marks[0]["marker"]["color"] != marks[1]["marker"]["color"]
    assert marks[0]["marker"]["symbol"] != marks[1]["marker"]["symbol"]
    assert marks[0]["marker"]["size"][1] > marks[0]["marker"]["size"][0]
    assert [traces[0]["x"], traces[0]["y"]] == [[0, 1], [1.0, 0.5]]
    told = "a<b. Candidates: 2, within the limit: 2; chosen: 0 heads, 4 neurons, B 0.50 at +1.00 %."
    assert found.states[0]["text"] == told
    assert found.states[1]["text"].endswith("chosen: none.")
    assert sources_figure(fits[1:2], 0.02) is None


def test_a_comparison_draws_the_front_of_all_methods_and_marks_what_each_chose() -> None:
    one, two = [candidate(0.0, 1.0), candidate(0.015, 0.9)], [candidate(0.01, 0.5, chosen=True), candidate(0.012, 0.6)]
    methods = [MethodResult(name, {}, "chosen", found, 0, 0, 0, 0.0) for name, found in (("a", one), ("b", two))]
    front, *marks = json.loads(pareto_figure(methods, 0.02).to_json())["data"]
    assert (front["x"], front["y"]) == ([0, 1], [1.0, 0.5])
    assert [trace["marker"]["line"]["width"] for trace in marks] == [[0, 0], [2, 0]]
