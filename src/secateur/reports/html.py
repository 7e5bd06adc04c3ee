"""``report.html``: one self-contained file, no network; everything from models and suites is escaped."""

from __future__ import annotations

import shlex
from datetime import date
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import secateur
from secateur.attenuation import Attenuation
from secateur.reports.figures import (
    candidates_figure,
    cost_figure,
    pareto_figure,
    scenario_figure,
    units_figure,
    widest_increase,
)
from secateur.studies.audit import AuditResult
from secateur.studies.compare import CompareResult
from secateur.studies.repair import RepairResult
from secateur.studies.slim import SlimResult
from secateur.studies.verification import Verification
from secateur.suites import Suite, fill
from secateur.units import Mask

PLOT_OPTIONS = {"displaylogo": False, "responsive": True, "displayModeBar": False}


def render_audit(result: AuditResult) -> str:
    """The report of an audit, as HTML."""
    significant = sum(scenario.p_holm < 0.05 for scenario in result.scenarios)
    return _render(
        "audit.html.j2",
        result.run,
        result=result,
        significant=significant,
        example=_example(result.suite),
        figure=_picture(scenario_figure(result.scenarios)),
    )


def render_repair(result: RepairResult) -> str:
    """The report of a repair, as HTML."""
    pictures: dict[str, Markup] = {"candidates_figure": _picture(candidates_figure(result.candidates, result.limit))}
    if result.mask is not None:
        units = result.mask.units if isinstance(result.mask, Mask | Attenuation) else []
        removed = [(unit.kind, unit.layer, unit.index) for unit in units]
        rank = None if result.scores is None else result.scores.rank
        pictures["scenario_figure"] = _picture(scenario_figure(result.test_before, result.test_after))
        pictures["units_figure"] = _picture(units_figure(result.space, removed, rank))
    told = {"verification": result.verification, "example": _example(result.suite)}
    return _render("repair.html.j2", result.run, result=result, **told, **pictures)


def render_compare(result: CompareResult) -> str:
    """The report of a comparison, as HTML."""
    return _render(
        "compare.html.j2",
        result.run,
        result=result,
        example=_example(result.suite),
        drawn=next((found for found in result.methods if found.random_reductions), None),
        widest=widest_increase(result.limit),
        pareto_figure=_picture(pareto_figure(result.methods, result.limit)),
        cost_figure=_picture(cost_figure(result.methods)),
    )


def render_slim(result: SlimResult) -> str:
    """The report of a slimmer model, as HTML."""
    return _render("slim.html.j2", result.run, result=result, example=_example(result.suite))


def render_verify(result: Verification) -> str:
    """The report of a verification, as HTML."""
    return _render("verify.html.j2", result.run, result=result, verification=result, example=_example(result.suite))


def _render(template: str, run: dict[str, Any], **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("secateur.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        version=secateur.__version__,
        date=date.today().isoformat(),
        plotly_js=Markup(f"<script>{get_plotlyjs()}</script>"),
        command=" ".join(shlex.quote(part) for part in ["secateur", *run["command"][1:]]),
        facts=_facts(run),
        **content,
    )


def _picture(figure: go.Figure) -> Markup:
    # Plotly writes its data as JSON with <, > and / escaped, so no text can end the script early.
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=PLOT_OPTIONS))


def _example(suite: Suite) -> str:
    marker = next(iter(suite.groups.values()))[0]
    prompt, reply = fill(suite.scenarios[0].paraphrases[0], marker)
    return f"user: {prompt}\nassistant: {reply}…" if reply else f"user: {prompt}"


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    model, versions = run["model"], run["versions"]
    return [
        ("model", f"{model['source']} ({model['type']}, {model['dtype']}, {model['device']})"),
        ("fingerprint", model["fingerprint"]),
        ("seed", str(run["settings"]["seed"])),
        ("suite hash", str(run["settings"]["suite_hash"])),
        ("time", f"{run['seconds']:.0f} s"),
        ("tokens", f"{run['tokens_forward']:,} forward, {run['tokens_backward']:,} backward"),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("platform", run["platform"]),
    ]
