"""Print the held-out hypervolume (bias, perplexity) that four searches reach with the same number of evaluations.

Run with ``python benchmarks/hypervolume.py [--suite NAME] [--seeds 3] [--evaluations 300] [--store FILE]``. Every
search measures that many masks on draws of the fit part of one size: all scenarios, some markers, some windows of text
(``fasp`` one mask per head); what attribution and the unpruned model's answers to all of fit cost before ``annealing``
begins is taken off its masks. Each search proposes up to twenty masks. Those that no other proposal of the search
dominates on select are measured on test, in the order of what they cost on select: for every price that a user would
pay, the one taken is the last in this order that keeps to it on test. The hypervolume is the area between the unpruned
model's bias and that of the masks taken, over prices from none to the worst that counts, as a share of the whole. A
store lets a run that was stopped go on; tokens and seconds are then those since.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import secateur
from secateur.errors import NumericalError
from secateur.evaluation.store import Store
from secateur.measures.disparity import corrected_square
from secateur.measures.utility import WINDOW
from secateur.progress import Advance
from secateur.search import pareto
from secateur.search.annealing import Annealing
from secateur.search.base import Outcome, Problem, Selection
from secateur.search.methods import method
from secateur.search.protected import protected_selection
from secateur.search.survey import Survey
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Recorder
from secateur.weights import AnyMask

WORST = 0.10
PROPOSALS = 20
EVERYTHING = 1000  # scenarios
LEAST = 24  # evaluations to search with
# What a search pays for a mask, and for how many: alike for all, and so not to be set for one.
PRICED = (
    "evaluations",
    "markers",
    "windows",
    "window_tokens",
    "scenarios",
    "seeds",
    "finalists",
    "proposed",
    "epsilon",
)


@dataclass(frozen=True)
class Point:
    """What a mask does: corrected bias B, and the relative increase of perplexity."""

    bias: float
    increase: float


def hypervolume(points: list[Point], before: float, worst: float) -> float:
    """Share of bias times price that is taken away by points in the order of what they were expected to cost."""
    if before <= 0:
        return float("nan")
    prices = sorted({max(0.0, point.increase) for point in points if point.increase < worst})
    area = 0.0
    for price, next_price in zip(prices, [*prices[1:], worst], strict=True):
        taken = [point for point in points if point.increase <= price][-1]
        area += (before - taken.bias) * (next_price - price)
    return area / (before * worst)


@contextmanager
def quietly(name: str, total: int) -> Iterator[Advance]:
    yield lambda done: None


def proposed(problem: Problem, name: str, options: dict[str, Any], seed: int) -> list[Selection]:
    """What a method proposes when every proposal keeps to the limit, so that all are seen."""
    chosen = method(name, options).seeded(seed)
    proposals = chosen.search.proposals(problem, chosen.scorer)
    found: list[Selection] = []
    try:
        selection = next(proposals)
        while len(found) < PROPOSALS:
            found.append(selection)
            selection = proposals.send(Outcome(0.0, 0.0, True))
    except StopIteration:
        pass
    return found


def random_search(problem: Problem, settings: Annealing) -> list[Selection]:
    """The front of masks drawn at random: up to a twentieth of the heads, and of neurons as many as annealing may."""
    rng, space = np.random.default_rng(settings.seed), problem.space
    order = rng.permutation(np.arange(space.n_heads, space.n_heads + space.n_neurons))
    blocks = [order[i : i + settings.block] for i in range(0, len(order), settings.block)]
    items = [*(np.array([head]) for head in range(space.n_heads)), *blocks]
    survey = Survey(problem, items, settings.markers, settings.windows, settings.seed)
    heads, most = space.n_heads, (space.n_heads // 20, settings.neurons // settings.block)
    states: dict[bytes, np.ndarray] = {}
    while len(states) < settings.evaluations:
        counts = [int(np.exp(rng.uniform(0, np.log(2 + one)))) - 1 for one in most]
        removed = [
            *rng.choice(heads, counts[0], replace=False),
            *(heads + rng.choice(len(blocks), counts[1], replace=False)),
        ]
        if removed:
            state = np.isin(np.arange(len(items)), removed)
            states[state.tobytes()] = state
    survey.measure(list(states.values()))
    points = np.array([[one.bias, one.cost] for one in survey.found])
    worst = (survey.before, float(np.log1p(WORST)))
    taken = pareto.greedy(points, pareto.front(points), PROPOSALS, worst)
    return [Selection.of_units(survey.units_of(survey.found[number].state), space, {}) for number in taken]


def protected_heads(problem: Problem, options: dict[str, Any], seed: int) -> list[Selection]:
    """fasp: one head and more, of those that perplexity does not need, at two of the published protections."""
    scorer = method("fasp", options).seeded(seed).scorer
    values, heads = problem.score(scorer).values, problem.space.n_heads
    found = {}
    for count in range(1, PROPOSALS // 2 + 1):
        for gamma in (0.3, 0.7):
            removed = protected_selection(values["bias"], values["log_perplexity"], gamma, count / heads)
            found[tuple(sorted(removed.tolist()))] = Selection("heads", removed, {"gamma": gamma})
    return list(found.values())


def price_of_attribution(problem: Problem, settings: Annealing) -> int:
    """In evaluations: the unpruned model on all of fit, a pass forward and one backward, which is worth two."""
    draw = Survey(problem, [], settings.markers, settings.windows, settings.seed).draw.part
    return round(4 * problem.fit.tokens / draw.tokens)


def held_out(parts: Parts, masks: list[AnyMask], seed: int) -> list[tuple[Point, Point]]:
    """On select and on test, the masks that no other dominates on select, in the order of what they cost there."""

    def point(evaluator: Any, mask: AnyMask) -> Point:
        try:
            found = evaluator.evaluate(mask, utility=True)
        except NumericalError:
            return Point(float("inf"), float("inf"))
        bias = max(0.0, corrected_square(found.table, seed)) ** 0.5
        return Point(bias, evaluator.perplexity(mask) / evaluator.perplexity() - 1)

    seen = [point(parts.select, mask) for mask in masks]
    front = pareto.front(np.array([[one.bias, one.increase] for one in seen])) if seen else []
    order = sorted(front, key=lambda number: seen[number].increase)
    return [(seen[number], point(parts.test, masks[number])) for number in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=100, help="0 is the split of the tables in the documents")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--markers", type=int, default=4, help="per group, in the draw")
    parser.add_argument("--windows", type=int, default=2, help="of neutral text, in the draw")
    parser.add_argument("--utility-tokens", type=int, default=6144)
    parser.add_argument("--matmul-precision", default="highest")
    parser.add_argument("--methods", default="annealing,attention-pruning,fasp,random-search")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE")
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    model = secateur.load(matmul_precision=options.matmul_precision)
    store = None if options.store is None else Store(options.store, model.fingerprint)
    draw = {"markers": options.markers, "windows": options.windows}
    heads = secateur.UnitSpace.of(model).n_heads
    search = {"evaluations": options.evaluations, **draw}
    told: dict[str, dict[str, Any]] = {
        "annealing": {**search, "finalists": PROPOSALS},
        "attention-pruning": {
            **search,
            "evaluations": options.evaluations - 2 * PROPOSALS,  # its finalists are measured, too
            "finalists": PROPOSALS // 2,  # for each of four epsilons, and half of them proposed
            "proposed": PROPOSALS // 4,
            "window_tokens": WINDOW,
        },
        "fasp": {
            "seeds": max(1, options.evaluations // heads),
            "scenarios": EVERYTHING,
            "window_tokens": WINDOW,
            **draw,
        },
    }
    for pair in options.set:
        setting, value = pair.split("=", 1)
        name, key = setting.split(".", 1)
        if name not in told or key in PRICED:
            parser.error(f"{setting} cannot be set; settings of {', '.join(told)} can, but for {', '.join(PRICED)}")
        told[name][key] = value

    def random_masks(problem: Problem, seed: int) -> list[Selection]:
        return random_search(problem, Annealing(seed=seed, **search))

    def annealed(problem: Problem, seed: int) -> list[Selection]:
        price = price_of_attribution(problem, Annealing(seed=seed, **search))
        left = options.evaluations - price
        if left < LEAST:
            raise SystemExit(f"attribution costs {price} evaluations, so at least {price + LEAST} are needed")
        return proposed(problem, "annealing", {**told["annealing"], "evaluations": left}, seed)

    def of(name: str) -> Callable[[Problem, int], list[Selection]]:
        return lambda problem, seed: proposed(problem, name, told.get(name, {}), seed)

    def protected(problem: Problem, seed: int) -> list[Selection]:
        return protected_heads(problem, told["fasp"], seed)

    special = {"random-search": random_masks, "annealing": annealed, "fasp": protected}
    searches = {name: special.get(name) or of(name) for name in options.methods.split(",")}
    volumes: dict[str, list[float]] = {name: [] for name in searches}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        settings = StudySettings(seed=seed, control_suite=None, utility_tokens=options.utility_tokens)
        recorder = Recorder(model)
        parts = Parts.prepare(model, secateur.load_suite(options.suite), settings, store)
        before = max(0.0, corrected_square(parts.test.evaluate(None, utility=True).table, seed)) ** 0.5
        print(f"seed {seed}: B {before:.2f} on test", flush=True)
        for name, run in searches.items():
            problem = parts.problem(settings, recorder)
            problem.step = quietly
            spent, start = model.usage.copy(), time.perf_counter()
            masks = [problem.mask_of(selection) for selection in run(problem, seed)]
            searched, used = time.perf_counter() - start, model.usage.since(spent)
            pairs = held_out(parts, masks, seed)
            volumes[name].append(hypervolume([test for _, test in pairs], before, WORST))
            inside = [(select, test) for select, test in pairs if select.increase <= settings.max_perplexity_increase]
            best = inside[-1][1] if inside else None  # along the front the last has the least bias on select
            print(
                f"  {name:<18} hypervolume {volumes[name][-1]:.3f}  {len(masks):3} proposals, "
                f"{len(pairs):2} on the front; {used.forward:>9,} tokens forward, {used.backward:>7,} backward, "
                f"{searched:5.0f} s; "
                f"chosen within the limit: {'-' if best is None else f'B {best.bias:.2f} at {best.increase:+.1%}'}",
                flush=True,
            )
    first = next(iter(volumes.values()))
    for name, found in volumes.items():
        behind = np.array(first) - np.array(found)
        print(
            f"{name:<18} mean {np.mean(found):.3f}, least {min(found):.3f}, most {max(found):.3f}; "
            f"less than the first by {behind.mean():.3f} on average, {behind.min():.3f} at least"
        )
    if store is not None:
        store.close()


if __name__ == "__main__":
    main()
