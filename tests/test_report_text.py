"""What reports say besides figures: law, methods, settings, when, and where to look for what they do not show."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import save_model, small_suite, write_suite, write_text
from markupsafe import escape
from synthetic import METHODS as SYNTHETIC
from synthetic import reach

import secateur
from secateur.measures.disparity import Interval
from secateur.measures.selection import GroupSelection, Selection
from secateur.reports.html import render_compare, render_generalise, render_repair
from secateur.search.methods import METHODS
from secateur.studies.compare import CompareResult, MethodResult
from secateur.studies.repair import RepairResult

PASSING = 2  # seed of a tiny model: a repair of the small suite finds something
ACT = "AI Act, Regulation (EU) 2024/1689"


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> RepairResult:
    """A repair of a suite with a decision."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("repair")
    document = small_suite()
    document["scenarios"][0]["measure"] |= {"favourable": "a"}
    result = secateur.repair(
        secateur.load(save_model(directory / "model", PASSING), device="cpu"),
        write_suite(directory, document),
        utility_text=write_text(directory, 1200),
        control_suite=None,
        max_perplexity_increase=5,
        random_draws=1,
        options={"max_heads": 1, "max_neurons": 4, "rounds": 1},
    )
    assert result.mask is not None
    return result


def compared(result: RepairResult, *methods: MethodResult) -> str:
    run = {**result.run, "settings": {**result.run["settings"], "random_draws": None}}
    return render_compare(CompareResult("m", result.suite, 0.02, None, list(methods), run))


def text_of(html: str) -> str:
    """The text of a page on one line, without its scripts."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def selection(boats: float, lamps: float, by_chance: float) -> list[Selection]:
    """A mean and one decision with these selection rates; the lamps are a small group."""
    highest = max(boats, lamps)
    groups = {
        name: GroupSelection(markers, share, Interval(rate, rate, rate), rate / highest)
        for name, markers, share, rate in (("boats", 99, 0.99, boats), ("lamps", 1, 0.01, lamps))
    }
    return [Selection(None, (), groups, by_chance), Selection("like", (" yes",), groups, by_chance)]


def test_a_repair_shows_selection_rates_before_and_after_with_their_caveats(repaired: RepairResult) -> None:
    assert [one.scenario for one in repaired.selections_before] == [None, "like"]
    before, after = selection(0.5, 0.25, 0.31), selection(0.5, 0.45, 0.07)
    html = render_repair(replace(repaired, selections_before=before, selections_after=after))
    table = html.split("Selection rates and impact ratios by decision and group")[1].split("</table>")[0]
    for state in ("before", "after"):
        assert f"rate {state} [95&nbsp;%]" in table
        assert f"impact ratio {state}" in table
        assert f"below 0.80 by chance {state}" in table
    assert table.count('<td class="n low">0.50 ↓</td>') == 2, "in the mean and the decision, before"
    assert table.count('<td class="n">0.90</td>') == 2, "after"
    assert table.count("↓") == 2
    assert table.count("(under 2 %)") == 2
    assert table.count(">31 %<") == table.count(">7 %<") == 2
    said = text_of(html)
    assert "This table does not replace that audit." in said
    assert "Local Law 144 asks an independent auditor" in said
    assert "Before, over all decisions: the lowest impact ratio is 0.50 (lamps)" in said
    assert said.count(ACT) == 1
    assert "no legal advice and no conformity assessment" in said


def test_a_comparison_says_where_selection_rates_are(repaired: RepairResult) -> None:
    said = text_of(compared(repaired, MethodResult("random", {}, "no candidate", [], 0, 0, 0, 0.0)))
    assert said.count(ACT) == 1
    assert "secateur audit gives them for the unpruned model and secateur repair" in said


def test_a_study_of_reach_shows_impact_ratios_of_every_use_before_and_after() -> None:
    html = render_generalise(reach())
    assert text_of(html).count(ACT) == 1
    for one in reach().selections:
        group, ratio = one.decisions[0].lowest or ("", 0.0)
        low = " ↓" if ratio < 0.8 - 1e-9 else ""
        assert f"<td>{one.use}</td><td>{one.state}</td>" in html
        assert f">{ratio:.2f} ({group}){low}</td>" in html
    empty = text_of(render_generalise(replace(reach(), selections=[])))
    assert "None of the suites holds a decision with a favourable answer" in empty


def test_a_repair_says_how_units_were_found_and_what_the_figures_rest_on(repaired: RepairResult) -> None:
    assert repaired.scores is not None
    noted: Any = SimpleNamespace(rank=repaired.scores.rank, notes=["A <b>note</b> of the scorer."])
    html = render_repair(replace(repaired, scores=noted))
    said = text_of(html)
    assert f"attribution : {METHODS['attribution'].summary}. Settings: " in said
    assert "max_heads 1" in said
    assert "rounds 1" in said
    assert "A &lt;b&gt;note&lt;/b&gt; of the scorer." in html
    told = dict(re.findall(r'<tr><td>([^<]+)</td><td class="wide">([^<]*)</td></tr>', html))
    assert told["utility limit: perplexity"] == "+500.00 %"
    assert told["what a removed unit gives"] == "zero"
    assert told["control suite"] == "none"
    assert told["text of the utility"].endswith("neutral.txt")
    assert told["random masks"] == "1"
    assert told["seed"] == "0"
    assert told["held-out figures rest on"] == "4 test markers, 3 test wordings of 3 scenarios"
    run = {**repaired.run, "settings": {**repaired.run["settings"], "max_scenarios": 2}}
    assert "4 test markers, 2 test wordings of 2 scenarios" in render_repair(replace(repaired, run=run))


def test_a_comparison_and_a_study_of_reach_say_how_units_were_found(repaired: RepairResult) -> None:
    note = "fasp: it scores <b>heads</b> alone."
    methods = [
        MethodResult("random", {"kind": "both", "count": None}, "no candidate", [], 0, 0, 0, 0.0),
        MethodResult("fasp", {}, "does not apply", [], 0, 0, 0, 0.0, notes=[note]),
    ]
    html = compared(repaired, *methods)
    assert html.count(str(escape(note))) == 1
    assert note not in html
    assert f"random : {METHODS['random'].summary}. Settings: kind both, count not set." in text_of(html)
    assert '<td>random masks</td><td class="wide">20</td>' in html
    said = text_of(render_generalise(reach()))
    for name in SYNTHETIC:
        assert f"{name} : {METHODS[name].summary}. Settings: " in said


def test_a_report_without_texts_says_how_to_get_them(repaired: RepairResult) -> None:
    html = render_repair(repaired, "runs/it's <mine>")
    command = escape("""secateur verify 'runs/it'"'"'s <mine>' --suite FILE -o runs/texts""")
    assert f"<code>{command}</code>" in html
    assert "FILE stands for the suite" in html
    html = render_generalise(reach(), "runs/reach")
    assert "<code>secateur verify runs/reach/plans/attribution/housing-gender -o runs/texts</code>" in html
    assert "FILE stands for" not in html
    without = replace(reach(), fits=[replace(fit, status="no reduction") for fit in reach().fits])
    assert "secateur verify" not in render_generalise(without)


def test_a_report_says_when_it_was_made(repaired: RepairResult) -> None:
    run = {**repaired.run, "started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-03T04:05:06Z"}
    said = text_of(render_repair(replace(repaired, run=run)))
    assert "Secateur repair, 2026-01-03." in said
    assert "started 2026-01-02 03:04:05 UTC finished 2026-01-03 04:05:06 UTC" in said
    older = {key: value for key, value in run.items() if key not in ("started", "finished")}
    said = text_of(render_repair(replace(repaired, run=older)))
    assert f"Secateur repair, {date.today().isoformat()}." in said
    assert "finished" not in said.split("How this was made")[1]
