"""Print the held-out hypervolume (bias, perplexity) that four searches reach with the same number of evaluations.

Run with ``python benchmarks/hypervolume.py [--suite NAME] [--seeds 3] [--evaluations 300] [--store FILE]``. Every
search measures that many masks on draws of the fit part of one size (``fasp`` one mask per head, and proposes as many
of its settings as are left); what attribution costs before ``annealing`` begins is taken off its masks. What a search
then proposes is measured on select, and those that no other proposal of the search dominates there are measured on
test. The hypervolume is what these dominate in the rectangle from no bias and no cost to the unpruned model's bias and
the worst perplexity that counts, as a share of it. A store lets a run that was stopped go on.
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
from secateur.progress import Advance
from secateur.search.annealing import Annealing, Survey, first_states
from secateur.search.base import Outcome, Problem, Selection
from secateur.search.methods import method
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Recorder
from secateur.weights import AnyMask

WORST = 0.10
PROPOSALS = 20


@dataclass(frozen=True)
class Point:
    """What a mask does: corrected bias B, and the relative increase of perplexity."""

    bias: float
    increase: float

    def dominates(self, other: Point) -> bool:
        return self.bias <= other.bias and self.increase <= other.increase and self != other


def hypervolume(points: list[Point], worst: Point) -> float:
    """Share of the rectangle up to ``worst`` that points dominate; an increase below 0 counts as 0."""
    if worst.bias <= 0:
        return float("nan")
    inside = sorted(
        (max(0.0, p.increase), p.bias) for p in points if p.bias < worst.bias and p.increase < worst.increase
    )
    area, lowest = 0.0, worst.bias
    for increase, bias in inside:
        if bias < lowest:
            area += (lowest - bias) * (worst.increase - increase)
            lowest = bias
    return area / (worst.bias * worst.increase)


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
    """The front of masks drawn at random over single heads and blocks of neurons."""
    rng, space = np.random.default_rng(settings.seed), problem.space
    heads = rng.permutation(space.n_heads)[: settings.heads]
    neurons = space.n_heads + rng.permutation(space.n_neurons)[: settings.neurons]
    items = [heads[i : i + 1] for i in range(len(heads))]
    items += [neurons[i : i + settings.block] for i in range(0, len(neurons), settings.block)]
    survey = Survey.prepare(problem, [items[n] for n in rng.permutation(len(items))], settings)
    survey.measure(first_states(len(items), settings.evaluations, rng))
    front = survey.front()[:PROPOSALS]
    return [Selection.of_units(survey.units_of(one.state), space, {}) for one in front]


def price_of_attribution(problem: Problem, settings: Annealing) -> int:
    """Attribution in evaluations: an evaluation of all of fit, a pass forward and one backward, which is worth two."""
    draw = Survey.prepare(problem, [], settings).draw.part
    return round(4 * problem.fit.tokens / draw.tokens)


def held_out(parts: Parts, masks: list[AnyMask], seed: int) -> list[Point]:
    """On test, the masks that no other dominates on select."""

    def point(evaluator: Any, mask: AnyMask) -> Point:
        try:
            found = evaluator.evaluate(mask, utility=True)
        except NumericalError:
            return Point(float("inf"), float("inf"))
        bias = max(0.0, corrected_square(found.table, seed)) ** 0.5
        return Point(bias, evaluator.perplexity(mask) / evaluator.perplexity() - 1)

    seen = [(mask, point(parts.select, mask)) for mask in masks]
    front = [mask for mask, one in seen if not any(other.dominates(one) for _, other in seen)]
    return [point(parts.test, mask) for mask in front]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
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
        "attention-pruning": {**search, "finalists": PROPOSALS // 4},
        "fasp": {"seeds": max(1, options.evaluations // heads), **draw},
    }
    for pair in options.set:
        name, value = pair.split("=", 1)
        told.setdefault(name.split(".")[0], {})[name.split(".")[1]] = value

    def random_masks(problem: Problem, seed: int) -> list[Selection]:
        return random_search(problem, Annealing(seed=seed, **search))

    def annealed(problem: Problem, seed: int) -> list[Selection]:
        left = options.evaluations - price_of_attribution(problem, Annealing(seed=seed, **search))
        return proposed(problem, "annealing", {**told["annealing"], "evaluations": left}, seed)

    def of(name: str) -> Callable[[Problem, int], list[Selection]]:
        return lambda problem, seed: proposed(problem, name, told.get(name, {}), seed)

    special = {"random-search": random_masks, "annealing": annealed}
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
            points = held_out(parts, masks, seed)
            volumes[name].append(hypervolume(points, Point(before, WORST)))
            best = min(
                (p for p in points if p.increase <= settings.max_perplexity_increase),
                key=lambda p: p.bias,
                default=None,
            )
            print(
                f"  {name:<18} hypervolume {volumes[name][-1]:.3f}  {len(masks):3} proposals, "
                f"{len(points):2} on the front; {used.forward:>9,} tokens forward, {used.backward:>7,} backward, "
                f"{searched:5.0f} s; "
                f"least B within the limit {'-' if best is None else f'{best.bias:.2f} at {best.increase:+.1%}'}",
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
