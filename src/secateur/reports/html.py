"""``report.html``: one self-contained file, no network; everything from models and suites is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import secateur
from secateur.attenuation import Attenuation
from secateur.reports.card import command_line
from secateur.reports.distributions import Distributions, distributions
from secateur.reports.figures import (
    Choices,
    agreement_figure,
    candidates_figure,
    cost_figure,
    layers_figure,
    matrix_figure,
    pareto_figure,
    scenario_figure,
    sources_figure,
    widest_increase,
)
from secateur.reports.maps import COLUMNS, heads_map, neurons_map, removed_by_layer
from secateur.search.methods import METHODS
from secateur.studies.audit import AuditResult
from secateur.studies.compare import DRAWS, CompareResult
from secateur.studies.reach import GeneraliseResult
from secateur.studies.repair import RepairResult
from secateur.studies.slim import SlimResult
from secateur.studies.verification import Verification, told_plan
from secateur.suites import Suite, fill, load_suite, suite_names
from secateur.suites.joining import spaced
from secateur.units import Mask

MOST = ("utility_tokens", "max_markers", "max_test_markers", "max_scenarios")
CHAT_IF_THERE = "through the chat template where the model has one"
RUN = "RUN"  # where a study's files lie, if nobody says where
# Pixels: a cell with a figure such as "-100*", a layer, and what stands beside the cells (names and the scale).
CELL_WIDTH, LAYER_WIDTH, BESIDE_CELLS = 60, 12, 240
REPORT_JS = files("secateur.reports").joinpath("templates/report.js").read_text(encoding="utf-8")


def render_audit(result: AuditResult) -> str:
    """The report of an audit, as HTML."""
    return _render(
        "audit.html.j2",
        result.run,
        result=result,
        example=_example(result.suite),
        figure=_picture(scenario_figure(result.scenarios)),
        distributions=_drawn(distributions(result.suite, result.suite.markers, {"unpruned": result.table})),
    )


def render_repair(result: RepairResult, place: str | Path = RUN) -> str:
    """The report of a repair, as HTML; its files lie at ``place``."""
    content: dict[str, Any] = {"candidates_figure": _picture(candidates_figure(result.candidates, result.limit))}
    if result.mask is not None and result.table_before is not None and result.table_after is not None:
        removed = result.mask.units if isinstance(result.mask, Mask | Attenuation) else []
        rank = None if result.scores is None else result.scores.rank
        tables = {"before": result.table_before, "after": result.table_after}
        markers = result.run["splits"]["test"]["markers"]
        content |= {
            "scenario_figure": _picture(scenario_figure(result.test_before, result.test_after)),
            "distributions": _drawn(distributions(result.asked, markers, tables)),
            "maps": {
                kind: _picture(figure)
                for kind, drawn in (("heads", heads_map), ("neurons", neurons_map))
                if (figure := drawn(result.space, removed, rank, result.mask.action)) is not None
            },
            "removed": removed_by_layer(result.space, removed, rank),
            "columns": COLUMNS,
        }
    return _render(
        "repair.html.j2",
        result.run,
        result=result,
        verification=result.verification,
        example=_example(result.suite),
        widest=widest_increase(result.limit),
        methods=_methods([(result.method, result.run["settings"]["options"], result.notes)]),
        settings=_settings(result.run),
        texts=_texts(place, result.suite),
        **content,
    )


def render_verify(result: Verification) -> str:
    """The report of a verification, as HTML."""
    return _render(
        "verify.html.j2",
        result.run,
        plots=False,
        result=result,
        verification=result,
        plan=told_plan(result.plan),
        example=_example(result.suite),
    )


def render_compare(result: CompareResult) -> str:
    """The report of a comparison, as HTML."""
    return _render(
        "compare.html.j2",
        result.run,
        result=result,
        example=_example(result.suite),
        methods=_methods((found.name, found.settings, found.notes) for found in result.methods),
        settings=_settings(result.run),
        drawn=next((found for found in result.methods if found.random_reductions), None),
        widest=widest_increase(result.limit),
        pareto_figure=_picture(pareto_figure(result.methods, result.limit)),
        cost_figure=_picture(cost_figure(result.methods)),
    )


def render_generalise(result: GeneraliseResult, place: str | Path = RUN) -> str:
    """The report of where repairs hold, as HTML; its files lie at ``place``."""
    pictures = {
        name: {
            "matrix": _heat_map(matrix_figure(result, name), "Change of B by source and target"),
            "agreement": _heat_map(agreement_figure(result, name), "Units shared by every two repairs"),
            "layers": _heat_map(layers_figure(result.layers[name]), "Removed units by layer", LAYER_WIDTH),
            "candidates": _choices(shown) if (shown := sources_figure(result.fits_of(name), result.limit)) else None,
        }
        for name in result.methods
    }
    examples = [(suite, _example(suite)) for suite in result.suites]
    suites = {suite.name: suite for suite in result.suites}
    kept = [fit for fit in result.fits if fit.status == "chosen" and fit.source in suites]
    return _render(
        "generalise.html.j2",
        result.run,
        result=result,
        pictures=pictures,
        examples=examples,
        methods=_methods((name, result.fits_of(name)[0].settings, ()) for name in result.methods),
        texts=_texts(Path(place) / "plans" / kept[0].name, suites[kept[0].source]) if kept else None,
        widest=widest_increase(result.limit),
    )


def render_slim(result: SlimResult) -> str:
    """The report of a slimmer model, as HTML."""
    return _render("slim.html.j2", result.run, plots=False, result=result, example=_example(result.suite))


def _render(template: str, run: dict[str, Any], *, plots: bool = True, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("secateur.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [*([get_plotlyjs()] if plots else []), REPORT_JS]
    return environment.get_template(template).render(
        plots=plots,
        version=secateur.__version__,
        date=run["finished"][:10] if run.get("finished") else date.today().isoformat(),
        scripts=Markup("\n").join(Markup(f"<script>{script}</script>") for script in scripts),
        script_hashes=Markup(" ").join(Markup(f"'sha256-{_digest(script)}'") for script in scripts),
        command=command_line(run["command"]) or f"{' '.join(run['command'])} (made from Python)",
        facts=_facts(run),
        **content,
    )


def _digest(script: str) -> str:
    """By which the page's security policy knows a script: no other one runs, whatever a suite smuggles in."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _picture(figure: go.Figure, least: int = 0) -> Markup:
    """Where a figure is drawn, as high as it will be and at least so wide, in pixels, and what is drawn, as data."""
    size = f"height: {figure.layout.height}px" + (f"; min-width: {least}px" if least else "")
    return Markup('<div class="plot" style="{}"></div>').format(size) + _data(figure.to_json())


def _heat_map(figure: go.Figure, label: str, column: int = CELL_WIDTH) -> Markup:
    """A heat map with room for what its cells say: a narrow screen scrolls it sideways instead of squeezing it.

    Parameters
    ----------
    label: of the region that scrolls. column: least width of a column, in pixels.
    """
    least = BESIDE_CELLS + column * len(figure.data[0].x)
    region = Markup('<div class="scroll" tabindex="0" role="region" aria-label="{}">{}</div>')
    return region.format(label, _picture(figure, least))


def _choices(found: Choices) -> dict[str, Any]:
    """What the template shows of a figure that shows one thing at a time."""
    picture, data = _picture(found.figure), _data(json.dumps(found.states), "states")
    return {"picture": picture, "data": data, "names": found.names, "start": found.start, "states": found.states}


def _drawn(found: Distributions) -> dict[str, Any]:
    """What the template shows of distributions."""
    return {**_choices(found), "spreads": found.spreads}


def _data(text: str, name: str = "data") -> Markup:
    """JSON as an element that no browser runs; <, > and & are written so that no text can end it early."""
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(f'<script type="application/json" class="{name}">{text}</script>')


def _methods(found: Iterable[tuple[str, dict[str, Any], Sequence[str]]]) -> list[tuple[str, str, str, Sequence[str]]]:
    """How units were found: every method's name, what it does, its settings, and what it has to say of this run."""
    return [
        (name, METHODS[name].summary, ", ".join(f"{key} {_value(value)}" for key, value in settings.items()), notes)
        for name, settings, notes in found
    ]


def _value(value: Any) -> str:
    return "not set" if value is None else str(value)


def _settings(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What a study of one suite was told, and how much its figures rest on."""
    told, test = run["settings"], run["splits"]["test"]
    scenarios = spaced(len(test["paraphrases"]), told["max_scenarios"])
    wordings = sum(len(test["paraphrases"][number]) for number in scenarios)
    most = {name: f"at most {told[name]}" if told[name] else "all" for name in MOST}
    return [
        ("utility limit: perplexity", f"{100 * told['max_perplexity_increase']:+.2f} %"),
        ("text of the utility", f"{told['utility_text'] or 'the built-in English text'}"),
        ("tokens of it a part", most["utility_tokens"]),
        ("control suite", told["control_suite"] or "none"),
        ("random masks", str(told["random_draws"] or DRAWS)),
        ("what a removed unit gives", told["ablation"]),
        ("dealing into fit, select and test", told["dealing"]),
        ("markers a group to fit, and to choose", f"{most['max_markers']} of the part"),
        ("markers a group to judge", f"{most['max_test_markers']} of the part"),
        ("scenarios of the suite", most["max_scenarios"]),
        (
            "held-out figures rest on",
            f"{len(test['markers'])} test markers, {wordings} test wordings of {len(scenarios)} scenarios",
        ),
        ("prompts", {"chat": "through the chat template", "plain": "plain"}.get(told["chat"], CHAT_IF_THERE)),
        ("seed", str(told["seed"])),
    ]


def _texts(plan: str | Path, suite: Suite) -> dict[str, Any]:
    """The command that shows what a repaired model writes, and whether it has to name the suite's file."""
    own = suite.name not in suite_names() or load_suite(suite.name) != suite
    command = shlex.join(["secateur", "verify", str(plan), *(["--suite", "FILE"] if own else []), "-o", "runs/texts"])
    return {"command": command, "names_file": own}


def _example(suite: Suite) -> str:
    marker = next(iter(suite.groups.values()))[0]
    prompt, reply = fill(suite.scenarios[0].paraphrases[0], marker)
    return f"user: {prompt}\nassistant: {reply}…" if reply else f"user: {prompt}"


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    model, versions, sittings = run["model"], run["versions"], run.get("carried_on", 0) + 1
    return [
        ("model", f"{model['source']} ({model['type']}, {model['dtype']}, {model['device']})"),
        ("fingerprint", model["fingerprint"]),
        ("seed", str(run["settings"]["seed"])),
        *((name, _moment(run[name])) for name in ("started", "finished") if run.get(name)),
        ("suite hash", str(run["settings"]["suite_hash"])),
        ("time", f"{run['seconds']:.0f} s"),
        ("tokens", f"{run['tokens_forward']:,} forward, {run['tokens_backward']:,} backward"),
        *([("sittings", f"{sittings}: the run was carried on; time and tokens are those of all")] * (sittings > 1)),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("platform", run["platform"]),
    ]


def _moment(told: str) -> str:
    """A moment of a record, for people."""
    return f"{datetime.fromisoformat(told):%Y-%m-%d %H:%M:%S} UTC"
