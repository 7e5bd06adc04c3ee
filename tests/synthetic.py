"""The result of a full study of reach, made up from plain data: ten suites by three methods, no model."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from secateur.measures.disparity import Comparison, Interval
from secateur.measures.overlap import Overlap
from secateur.measures.selection import GroupSelection, Selection, StateSelections
from secateur.search.methods import method
from secateur.studies.advice import Advice
from secateur.studies.candidates import CandidateRecord
from secateur.studies.leave_one_out import LeftOut, OneScenario
from secateur.studies.reach import Agreement, Cell, Fit, GeneraliseResult, Summary
from secateur.studies.relations import differences, relation
from secateur.suites import Suite, load_suite, suite_hash

DOMAINS = ("housing", "justice", "lending", "purchase", "service")
SUITES = tuple(f"{domain}-{attribute}" for attribute in ("gender", "race") for domain in DOMAINS)
METHODS = ("attribution", "magnitude", "fasp")
LAYERS, CANDIDATES = 30, 24


def around(value: float, width: float) -> Interval:
    return Interval(value, value - width, value + width)


def comparison(before: float, reduction: float) -> Comparison:
    after = before * (1 - reduction)
    return Comparison(
        around(before, 0.2),
        around(after, 0.2),
        around(reduction, 0.3),
        around(after - before, 0.2),
        _fall(before, after),
    )


def _fall(before: float, after: float) -> Interval:
    return around(before**2 - after**2, 0.4)


@cache
def reach() -> GeneraliseResult:
    """Every method fitted on every suite and on all others of its groups, judged on every suite; changes of B from
    -100 to over +100 %, proven and not."""
    rng = np.random.default_rng(0)
    suites = [load_suite(name) for name in SUITES]
    pairs = [(name, source, target) for name in METHODS for source in suites for target in suites]
    cells = [_cell(name, source.name, target, rng, source) for name, source, target in pairs]
    cells += [_cell(name, f"all but {target.name}", target, rng) for name in METHODS for target in suites]
    cells += [_cell(name, "random masks", target, rng) for name in METHODS for target in suites]
    sources = [*SUITES, *(f"all but {name}" for name in SUITES)]
    return GeneraliseResult(
        model="made-up",
        suites=suites,
        limit=0.02,
        control_suite="control-colour",
        verdict="Of 90 pairs of a fitted and a judged use with a bias, repairs are proven to lower it at home in 7.",
        summary=[
            Summary(name, how, 40, 5, 4, 20, 12, 5, 6, 1, 3, comparison(1.0, 0.6), "95 %", 0.01, 0.1, 0.001)
            for name in METHODS
            for how in ("own", "across", "attributes", "joint")
        ],
        fits=[_fit(name, source, rng) for name in METHODS for source in sources],
        cells=cells,
        agreements=[
            Agreement(
                name,
                one,
                other,
                Overlap(3, 90, rng.uniform(0, 0.6), 0.001, 0.01),
                [Overlap(1, 3, 0.33, 0.01, 0.02)] * LAYERS,
            )
            for name in METHODS
            for one, other in combinations(SUITES, 2)
        ],
        layers={name: {source: rng.integers(0, 9, LAYERS).tolist() for source in sources} for name in METHODS},
        left_out=[
            LeftOut(name, suite, "specific", "", [_scenario("one"), _scenario("two")], comparison(1.0, 0.4), 0.1, 0.03)
            for name in METHODS
            for suite in SUITES
        ],
        advice=[
            Advice(
                name,
                f"{attribute} (en)",
                "one repair per use",
                "Own repairs do better on average.",
                around(0.6, 0.1),
                around(0.2, 0.1),
                around(0.4, 0.1),
                uses=tuple(suite for suite in SUITES if suite.endswith(attribute)),
            )
            for name in METHODS
            for attribute in ("gender", "race")
        ],
        selections=[
            StateSelections(suite, state, [_selection(rng, None), _selection(rng, "rent"), _selection(rng, "lease")])
            for suite in SUITES
            for state in ("unpruned", *(f"{name}, its own repair" for name in METHODS))
        ],
        notes=["A note on the suites."],
        run=_run(suites),
    )


def _cell(name: str, source: str, target: Suite, rng: np.random.Generator, suite: Suite | None = None) -> Cell:
    joint = "random" if source == "random masks" else "joint"
    found = comparison(rng.uniform(0.1, 1.5), rng.choice([1.0, rng.uniform(-1.3, 1.0)]))
    return Cell(
        method=name,
        source=source,
        target=target.name,
        relation=joint if suite is None else relation(suite, target),
        differs=() if suite is None else differences(suite, target),
        markers=24,
        scenarios=6,
        p_before=rng.choice([0.001, 0.3]),
        before=found.before,
        after=found.after,
        reduction=found.reduction,
        change=found.change,
        fall=found.fall,
        mean_abs_smd=(0.9, 0.5),
        mean_abs_gap=(1.2, 0.7),
        perplexity_increase=None if joint == "random" and suite is None else around(0.01, 0.005),
        largest_random=0.1,
        p_holm=rng.choice([0.001, 0.4]),
        p_if_closed=rng.choice([0.001, 0.4]),
        fall_if_closed=around(found.before.value**2, 0.4),
        over_limit=source != "random masks" and bool(rng.random() < 0.2),
        unusable="no repair found" if source != "random masks" and rng.random() < 0.1 else "",
    )


def _selection(rng: np.random.Generator, scenario: str | None) -> Selection:
    rates = {"women": rng.uniform(0.4, 0.9), "men": 0.9}
    groups = {name: GroupSelection(12, 0.5, around(rate, 0.1), rate / 0.9) for name, rate in rates.items()}
    return Selection(scenario, () if scenario is None else ("yes",), groups, 0.6)


def _scenario(name: str) -> OneScenario:
    return OneScenario(name, 8, around(0.004, 0.002), False, 0.003, 0.9, 0.4, 0.5, 0.2)


def _fit(name: str, source: str, rng: np.random.Generator) -> Fit:
    candidates = [
        CandidateRecord(
            kind=("heads", "neurons", "both")[number % 3],
            heads=number % 5,
            neurons=4 * number,
            bias=rng.uniform(0, 1),
            bias_square=rng.uniform(0, 1),
            mean_abs_gap=0.3,
            perplexity_increase=0.002 * number,
            perplexity_high=0.003 * number,
            within_limit=number < 9,
            knobs={"count": 4 * number},
            chosen=number == 5,
        )
        for number in range(CANDIDATES)
    ]
    return Fit(
        method=name,
        source=source,
        status="chosen",
        candidates=candidates,
        settings=method(name).settings,
        heads=1,
        neurons=20,
        own=None if source.startswith("all but") else comparison(1.0, 0.6),
        control=comparison(0.1, 0.1),
        perplexity_before=20.0,
        perplexity_after=20.2,
        perplexity_increase=around(0.01, 0.005),
        tokens_forward=100_000,
    )


def _run(suites: list[Suite]) -> dict[str, Any]:
    return {
        "command": ["secateur", "generalise", "--suites", ",".join(SUITES), "--methods", ",".join(METHODS)],
        "settings": {
            "seed": 0,
            "ablation": "zero",
            "dealing": "by text",
            "max_markers": None,
            "max_test_markers": None,
            "max_scenarios": 6,
            "utility_text": None,
            "utility_tokens": 3072,
            "modes": ["across", "attributes", "joint", "specific"],
            "random_draws": 3,
            "scenarios_left_out": 6,
            "suite_hash": ", ".join(suite_hash(suite) for suite in suites),
        },
        "versions": {"secateur": "0.1.0"},
        "platform": "made-up",
        "model": {
            "source": "made-up",
            "type": "llama",
            "fingerprint": "0",
            "dtype": "float32",
            "device": "cpu",
        },
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T04:05:06+00:00",
        "seconds": 3661.0,
        "tokens_forward": 1_000_000,
        "tokens_backward": 100_000,
    }
