"""Print the held-out hypervolume (bias, perplexity) that four searches reach with the same number of evaluations.

Run with ``python benchmarks/hypervolume.py [--suite NAME] [--seeds 3] [--evaluations 300] [--scenarios N]
[--store FILE]``. Every search measures at most that many masks on draws of the fit part of one size: all scenarios
that are asked, some markers, some windows of text (``fasp`` one mask per head and draw); what attribution and the
unpruned model's answers to all of fit cost before ``annealing`` begins is taken off its masks. Each search proposes up
to twelve masks: those of the Pareto front of all that it has measured which together dominate most, half of them within
the utility limit, by one rule (:func:`secateur.search.pareto.promising`); ``fasp``, which measures single heads alone,
those that its rule combines. Random search differs from ``annealing`` in which masks are measured, and knows no
attribution; draws from turn to turn and what is believed of measured masks are the same.

What is taken is decided on select: for every price from none to the worst that counts, the proposal of the least bias
there among those whose perplexity there rises by no more, or none where none lowers the bias. What it is worth is told
by test: the bias that it takes away there, in full where its perplexity there keeps to the price; where it rises by
more, the share price / increase counts, as if the mask served so many of the requests that the price is kept on
average. That is summed over all prices, as a share of the unpruned model's bias ("removed"). Beside it stands the
standard indicator ("hypervolume"): the share of the rectangle from no bias and no increase to the unpruned model's bias
and the worst price that the same masks dominate on test, which counts a mask by its test figures alone, as if what it
costs had been known.

A store lets a run that was stopped go on; tokens and seconds are then those since.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import secateur
from secateur.errors import NumericalError
from secateur.evaluation.evaluator import Evaluator
from secateur.evaluation.store import Store
from secateur.measures.disparity import corrected_square
from secateur.measures.utility import WINDOW
from secateur.progress import Advance
from secateur.search import pareto
from secateur.search.annealing import Annealing
from secateur.search.attention_pruning import EPSILONS
from secateur.search.base import Outcome, Problem, Selection
from secateur.search.draw import Draw
from secateur.search.methods import method
from secateur.search.protected import protected_selection
from secateur.search.survey import Prior, Survey
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Recorder
from secateur.weights import AnyMask

WORST = 0.10
PROPOSALS = 12
EVERYTHING = 1000  # scenarios
LEAST = 24  # evaluations to search with
TRIES = 100  # at a mask that was not drawn before
GAMMAS = (0.3, 0.7)  # of fasp: published protections
SEARCHES = ("annealing", "attention-pruning", "fasp", "random-search")
# What a search pays for a mask, and for how many, and what it proposes: alike for all, and so not to be set for one.
PRICED = (
    "evaluations",
    "markers",
    "windows",
    "window_tokens",
    "scenarios",
    "seeds",
    "finalists",
    "proposed",
    "front",
    "epsilon",
    "seed",
)


@dataclass(frozen=True)
class Budget:
    """What a search may measure: so many masks, on draws of so many markers per group and windows of neutral text."""

    evaluations: int
    markers: int
    windows: int


@dataclass(frozen=True)
class Point:
    """What a mask does.

    Attributes
    ----------
    square: corrected B^2 before the root, negative below the noise: the root, 0 for all of these, would let one that
        was lucky shut out all that cost more. increase: of perplexity, relative.
    """

    square: float
    increase: float

    @property
    def bias(self) -> float:
        return float(max(0.0, self.square) ** 0.5)


def hypervolume(pairs: list[tuple[Point, Point]], before: float, worst: float) -> float:
    """The share of the rectangle from (0, 0) to (``before``, ``worst``) that the masks dominate on test."""
    if before <= 0:
        return float("nan")
    points = np.array([(test.bias, max(0.0, test.increase)) for _, test in pairs]).reshape(-1, 2)
    return pareto.dominated_area(points, (before, worst)) / (before * worst)


def removed_bias(pairs: list[tuple[Point, Point]], before: float, worst: float) -> float:
    """The share of bias that is taken away, over prices from 0 to ``worst``.

    Parameters
    ----------
    pairs: on select and on test, the masks of the front on select, the cheapest first.
    before: B of the unpruned model on test.
    """
    if before <= 0:
        return float("nan")
    prices = [min(worst, max(0.0, select.increase)) for select, _ in pairs]
    area = 0.0
    for (_, test), price, next_price in zip(pairs, prices, [*prices, worst][1:], strict=True):
        kept = kept_share(test.increase, price, next_price)
        area += kept and kept * (before - test.bias)
    return area / (before * worst)


def kept_share(increase: float, low: float, high: float) -> float:
    """The integral over prices from ``low`` to ``high`` of the share of requests that keeps to them, at most 1."""
    paid = min(high, max(low, increase))  # from here on all
    return high - paid + (0.0 if paid == low else (paid**2 - low**2) / (2 * increase))


FIGURES = {"removed": removed_bias, "hypervolume": hypervolume}


@contextmanager
def quietly(name: str, total: int) -> Iterator[Advance]:
    yield lambda done: None


def settings_of(name: str, problem: Problem, budget: Budget) -> dict[str, Any]:
    """What a search is told, so that it keeps to the budget.

    Raises
    ------
    SystemExit: the budget is too small for it.
    """
    draw, heads = {"markers": budget.markers, "windows": budget.windows}, problem.space.n_heads
    evaluations, least = budget.evaluations, LEAST
    if name == "annealing":
        price = price_of_attribution(problem, budget)
        evaluations, least = evaluations - price, price + LEAST
        told = {"evaluations": evaluations, "finalists": PROPOSALS, **draw}
    elif name == "attention-pruning":
        # Its finalists are measured, too: for each epsilon so many.
        finalists, least = PROPOSALS // 2, LEAST + PROPOSALS // 2 * len(EPSILONS)
        evaluations -= finalists * len(EPSILONS)
        told = {"evaluations": evaluations, "finalists": finalists, "front": PROPOSALS, "window_tokens": WINDOW, **draw}
    elif name == "fasp":
        least = heads
        told = {"seeds": evaluations // heads, "scenarios": EVERYTHING, "window_tokens": WINDOW, **draw}
    else:
        told = {"evaluations": evaluations, "finalists": PROPOSALS, "heads": heads // 20, **draw}
    if budget.evaluations < least:
        raise SystemExit(f"{name} needs at least {least} evaluations, not {budget.evaluations}.")
    return told


def price_of_attribution(problem: Problem, budget: Budget) -> int:
    """In evaluations: the unpruned model on all of fit, a pass forward and one backward, which is worth two."""
    draw = Draw.staggered(problem.fit, budget.markers, budget.windows, 0).part
    return round(4 * problem.fit.tokens / draw.tokens)


def described(name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """All settings of a search, with those that it was not told."""
    if name == "fasp":
        return {**method(name, settings).seeded(seed).scorer.model_dump(), "gamma": GAMMAS, "removed": PROPOSALS // 2}
    if name != "random-search":
        return method(name, settings).seeded(seed).settings
    used = ("evaluations", "rounds", "markers", "windows", "heads", "neurons", "block", "finalists", "seed")
    return {key: value for key, value in Annealing(seed=seed, **settings).model_dump().items() if key in used}


def find(name: str, problem: Problem, settings: dict[str, Any], seed: int) -> list[Selection]:
    """What a search proposes."""
    if name == "random-search":
        return random_search(problem, Annealing(seed=seed, **settings))
    if name == "fasp":
        return protected_heads(problem, settings, seed)
    chosen = method(name, settings).seeded(seed)
    proposals = chosen.search.proposals(problem, chosen.scorer)
    found: list[Selection] = []
    try:
        selection = next(proposals)
        while True:
            found.append(selection)
            selection = proposals.send(Outcome(0.0, 0.0, True))  # each keeps to the limit, so that all are seen
    except StopIteration:
        return found


def random_search(problem: Problem, settings: Annealing) -> list[Selection]:
    """Masks drawn at random: up to so many heads and so many neurons, few more often than many.

    They are measured on draws that change from turn to turn, and believed in, as those of annealing.
    """
    rng, space = np.random.default_rng(settings.seed), problem.space
    order = rng.permutation(np.arange(space.n_heads, space.n_heads + space.n_neurons))
    blocks = [order[i : i + settings.block] for i in range(0, len(order), settings.block)]
    items = [*(np.array([head]) for head in range(space.n_heads)), *blocks]
    survey = Survey(problem, items, settings.markers, settings.windows, settings.seed)
    heads, most = space.n_heads, (settings.heads, min(len(blocks), settings.neurons // settings.block))
    states: dict[bytes, np.ndarray] = {}
    for _ in range(TRIES * settings.evaluations):
        if len(states) == settings.evaluations:
            break
        counts = [int(np.exp(rng.uniform(0, np.log(2 + one)))) - 1 for one in most]
        removed = [
            *rng.choice(heads, counts[0], replace=False),
            *(heads + rng.choice(len(blocks), counts[1], replace=False)),
        ]
        if removed:
            state = np.isin(np.arange(len(items)), removed)
            states[state.tobytes()] = state
    for turn, drawn in enumerate(np.array_split(np.array(list(states.values())), 1 + settings.rounds)):
        survey.turn(turn)
        survey.measure(list(drawn))
    nothing = np.zeros(len(items))
    believed = survey.beliefs(Prior(nothing, nothing, np.arange(len(items)) < heads))
    taken = believed.finalists(settings.finalists, survey.before, survey.limit)
    return [Selection.of_units(survey.units_of(believed.states[one]), space, believed.figures(one)) for one in taken]


def protected_heads(problem: Problem, settings: dict[str, Any], seed: int) -> list[Selection]:
    """fasp: one head and more, of those that perplexity does not need, at two of the published protections."""
    scorer = method("fasp", settings).seeded(seed).scorer
    values, heads = problem.score(scorer).values, problem.space.n_heads
    found = {}
    for count in range(1, PROPOSALS // 2 + 1):
        for gamma in GAMMAS:
            removed = protected_selection(values["bias"], values["log_perplexity"], gamma, count / heads)
            if len(removed):
                found[tuple(sorted(removed.tolist()))] = Selection("heads", removed, {"gamma": gamma})
    return list(found.values())


def held_out(parts: Parts, masks: list[AnyMask], seed: int) -> list[tuple[Point, Point]]:
    """On select and on test, the masks that lower the bias on select and that no other dominates there.

    The cheapest on select comes first, and the last has the least bias there.
    """
    before = corrected_square(parts.select.evaluate(None, utility=True).table, seed)
    seen = [(mask, point(parts.select, mask, seed)) for mask in masks]
    seen = [(mask, one) for mask, one in seen if one.square < before]
    front = pareto.front(np.array([[one.square, one.increase] for _, one in seen]).reshape(-1, 2))
    order = sorted(front, key=lambda number: seen[number][1].increase)
    return [(seen[number][1], point(parts.test, seen[number][0], seed)) for number in order]


def point(evaluator: Evaluator, mask: AnyMask, seed: int) -> Point:
    try:
        found = evaluator.evaluate(mask, utility=True)
    except NumericalError:
        return Point(float("inf"), float("inf"))
    return Point(corrected_square(found.table, seed), evaluator.perplexity(mask) / evaluator.perplexity() - 1)


def told_apart(pairs: list[str], searches: list[str]) -> dict[str, dict[str, str]]:
    """Settings by search from texts METHOD.KEY=VALUE.

    Raises
    ------
    ValueError: says which cannot be set.
    """
    told: dict[str, dict[str, str]] = {name: {} for name in searches if name != "random-search"}
    for pair in pairs:
        setting, _, value = pair.partition("=")
        name, _, key = setting.partition(".")
        if name not in told or key in PRICED:
            raise ValueError(f"{setting} cannot be set; settings of {', '.join(told)} can, but for {', '.join(PRICED)}")
        told[name][key] = value
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=100, help="0 is the split of the tables in the documents")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--scenarios", type=int, help="of the suite, evenly spaced, instead of all")
    parser.add_argument("--markers", type=int, default=4, help="per group, in the draw")
    parser.add_argument("--windows", type=int, default=2, help="of neutral text, in the draw")
    parser.add_argument("--utility-tokens", type=int, default=6144)
    parser.add_argument("--matmul-precision", default="highest")
    parser.add_argument("--methods", default=",".join(SEARCHES))
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE")
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    searches = options.methods.split(",")
    if not set(searches) <= set(SEARCHES):
        parser.error(f"the searches are {', '.join(SEARCHES)}")
    try:
        told = told_apart(options.set, searches)
    except ValueError as error:
        parser.error(str(error))
    budget = Budget(options.evaluations, options.markers, options.windows)
    model = secateur.load(matmul_precision=options.matmul_precision)
    store = None if options.store is None else Store(options.store, model.fingerprint)
    reached = {figure: {name: list[float]() for name in searches} for figure in FIGURES}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        settings = StudySettings(
            seed=seed,
            control_suite=None,
            utility_tokens=options.utility_tokens,
            max_scenarios=options.scenarios,
        )
        recorder = Recorder(model)
        parts = Parts.prepare(model, secateur.load_suite(options.suite), settings, store)
        before = max(0.0, corrected_square(parts.test.evaluate(None, utility=True).table, seed)) ** 0.5
        print(f"seed {seed}: B {before:.2f} on test", flush=True)
        for name in searches:
            problem = parts.problem(settings, recorder)
            problem.step = quietly
            chosen = {**settings_of(name, problem, budget), **told.get(name, {})}
            print(f"  {name}: {json.dumps(described(name, chosen, seed))}", flush=True)
            spent, start = model.usage.copy(), time.perf_counter()
            masks = [problem.mask_of(selection) for selection in find(name, problem, chosen, seed)]
            searched, used = time.perf_counter() - start, model.usage.since(spent)
            pairs = held_out(parts, masks, seed)
            for figure, value in FIGURES.items():
                reached[figure][name].append(value(pairs, before, WORST))
            told_figures = ", ".join(f"{figure} {of[name][-1]:.3f}" for figure, of in reached.items())
            inside = [test for select, test in pairs if select.increase <= settings.max_perplexity_increase]
            best = inside[-1] if inside else None  # along the front the last has the least bias on select
            print(
                f"  {name:<18} {told_figures}; {len(masks):3} proposals, "
                f"{len(pairs):2} on the front; {used.forward:>9,} tokens forward, {used.backward:>7,} backward, "
                f"{searched:5.0f} s; "
                f"chosen within the limit: {'-' if best is None else f'B {best.bias:.2f} at {best.increase:+.1%}'}",
                flush=True,
            )
    for figure, of in reached.items():
        first = next(iter(of.values()))
        for name, found in of.items():
            behind = np.array(first) - np.array(found)
            print(
                f"{figure:<12} {name:<18} mean {np.mean(found):.3f}, least {min(found):.3f}, most {max(found):.3f}; "
                f"less than the first by {behind.mean():.3f} on average, {behind.min():.3f} at least"
            )
    if store is not None:
        store.close()


if __name__ == "__main__":
    main()
