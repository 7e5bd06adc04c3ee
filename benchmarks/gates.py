"""Print what `gates` leaves of a bias on held-out data, beside the plain form of relaxed gates and `attribution`.

Run with ``python benchmarks/gates.py [--suite NAME] [--seeds 3] [--first-seed 0] [--set KEY=VALUE ...]``. All choose on
the select part, within the utility limit, by one rule, and are judged once on test.

The plain form: every gate begins at 1; Adam lowers gap^2 + 5 KL + 0.0005 sum(1 - gate), the gap that of 24 prompts
drawn from all scenarios, KL on twice 128 tokens of neutral text; gates are clamped to [0, 1]; after 60 steps the lowest
10, 30, 60, 100 or 200 are rounded to 0, which of these being decided on select. ``--set`` adds a row of ``gates`` with
these settings.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import secateur
from secateur.measures.answers import batch_y, pack
from secateur.measures.disparity import suite_bias
from secateur.models import LanguageModel
from secateur.scoring.gates import Course
from secateur.search.base import Problem, Proposals, Selection
from secateur.search.methods import method, parse_options
from secateur.studies.candidates import Candidates
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Recorder
from secateur.studies.verdict import examine
from secateur.units import Gates, gated

STEPS, RATE, PROMPTS, WINDOWS = 60, 0.03, 24, 2
DAMAGE, PRICE = 5.0, 5e-4
COUNTS = (10, 30, 60, 100, 200)


def plain_gates(problem: Problem, seed: int) -> np.ndarray:
    """Gates after plain training, (units,)."""
    model, rng = problem.model, np.random.default_rng(seed)
    course = Course.prepare(problem.fit, problem.fit.evaluate().table, PROMPTS, seed)
    gates = Gates.ones(model, (), None)
    leaves = gates.leaves()
    optimiser = torch.optim.Adam(leaves, lr=RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        with torch.enable_grad(), gated(model, gates), model.arithmetic():
            _gap(model, problem, rng).square().backward()
            (DAMAGE * course.divergence(WINDOWS)).backward()
        for leaf in leaves:
            assert leaf.grad is not None
            leaf.grad -= PRICE
        optimiser.step()
        for leaf in leaves:
            leaf.data.clamp_(0, 1)
    return torch.cat([leaf.detach().cpu() for leaf in leaves]).numpy()


def _gap(model: LanguageModel, problem: Problem, rng: np.random.Generator) -> torch.Tensor:
    """Mean y of one group less that of the other, over prompts drawn from all scenarios, equally many of each."""
    known = problem.fit.prompts
    group_of = dict(zip(known.markers, known.groups.tolist(), strict=True))
    groups = np.array([group_of[prompt.marker] for prompt in known.prompts])
    drawn = np.zeros(len(groups), dtype=bool)
    for group in (0, 1):
        drawn[rng.permutation(np.flatnonzero(groups == group))[: PROMPTS // 2]] = True
    asked = known.where(drawn)
    batches = pack(model, asked, problem.fit.batch_size)
    y = torch.cat([batch_y(model, known.suite, batch) for batch in batches])  # (prompts,)
    of = torch.tensor([group_of[prompt.marker] for prompt in asked.prompts], device=y.device)
    return y[of == 0].mean() - y[of == 1].mean()


def plain_proposals(problem: Problem, seed: int) -> Proposals:
    order = np.argsort(plain_gates(problem, seed), kind="stable")
    for count in COUNTS:
        yield Selection.of_units(order[:count], problem.space, {"count": count})


def judge(name: str, parts: Parts, candidates: Candidates, seed: int, recorder: Recorder, seconds: float) -> None:
    """Print every candidate on select, and the chosen one on test."""
    mask = candidates.choose()
    for record in candidates.records:
        print(
            f"    {name}, select: {record.heads} heads, {record.neurons} neurons, B {record.bias:.2f}, "
            f"mean |gap| {record.mean_abs_gap:.2f}, perplexity {record.perplexity_increase:+.2%}"
            f"{'' if record.within_limit else ', over the limit'}{', chosen' if record.chosen else ''}",
            flush=True,
        )
    if mask is None:
        print(f"  seed {seed} {name}: nothing chosen, {seconds:.0f} s", flush=True)
        return
    found = examine(parts, mask, seed, recorder)
    gaps = [suite_bias(table, seed).mean_abs_gap for table in (found.before, found.after)]
    comparison, fall, increase = found.comparison, found.comparison.reduction, found.perplexity_increase
    print(
        f"  seed {seed} {name}, test: {mask.heads_removed} heads, {mask.neurons_removed} neurons, "
        f"B {comparison.before.value:.2f} to {comparison.after.value:.2f}, reduction {fall.value:.0%} "
        f"[{fall.low:.0%}, {fall.high:.0%}], mean |gap| {gaps[0]:.2f} to {gaps[1]:.2f}, "
        f"perplexity {increase.value:+.2%} [{increase.low:+.2%}, {increase.high:+.2%}], {seconds:.0f} s",
        flush=True,
    )


def compare(suite: str, seed: int, told: dict[str, str]) -> None:
    model = secateur.load()
    settings = StudySettings(seed=seed, control_suite=None)
    recorder = Recorder(model)
    parts = Parts.prepare(model, secateur.load_suite(suite), settings)
    rows = {"attribution": method("attribution").seeded(seed), "gates": method("gates").seeded(seed)}
    if told:
        rows["gates " + " ".join(f"{key}={value}" for key, value in told.items())] = method("gates", told).seeded(seed)
    for name in ("plain gates", *rows):
        start, problem = time.perf_counter(), parts.problem(settings, recorder)
        candidates = Candidates(parts.select, problem.limit, seed, recorder)
        chosen = rows.get(name)
        proposals = chosen.search.proposals(problem, chosen.scorer) if chosen else plain_proposals(problem, seed)
        candidates.run(problem, proposals)
        judge(name, parts, candidates, seed, recorder, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    told = parse_options(options.set)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        print(f"{options.suite}, seed {seed}", flush=True)
        compare(options.suite, seed, told)


if __name__ == "__main__":
    main()
