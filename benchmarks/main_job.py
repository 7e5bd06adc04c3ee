"""Print the figures of the main job on the default model: cost of scoring, invariance, repair.

Run with ``python benchmarks/main_job.py [--suite NAME] [--max-markers N] [--skip-repair]``. Ratios are
measured in one run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import secateur
from secateur.evaluation import Evaluator
from secateur.measures.answers import measure_y, pack
from secateur.measures.prompts import build_prompts
from secateur.measures.splits import split
from secateur.measures.utility import read_passages, split_text
from secateur.scoring import Attribution
from secateur.studies.record import peak_memory_bytes


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def scoring_cost(model: secateur.LanguageModel, suite: secateur.Suite) -> None:
    """Time of scoring all units against one pass over the same prompts and text."""
    text = split_text(model, read_passages())["fit"]
    prompts = build_prompts(model, suite, split(suite).fit)
    fit = Evaluator(model, prompts, text)
    packed = sum(batch.tokens for batch in fit.batches)
    one_pass = seconds(lambda: fit.evaluate(utility=True))
    scoring = seconds(lambda: Attribution().score(fit))  # the unpruned answers are known, as in a repair
    naive = sum(len(p.context) + sum(len(a) for a in p.answers) for p in prompts.prompts)
    print(f"one pass over fit prompts and text  {one_pass:7.1f} s")
    print(f"scoring every head and neuron       {scoring:7.1f} s   {scoring / one_pass:.2f} x one pass")
    print(f"prompt tokens: {packed:,} packed, {naive:,} one by one ({naive / packed:.1f} x fewer)")


def batch_invariance(model: secateur.LanguageModel, suite: secateur.Suite) -> None:
    """Largest difference of y between batch sizes."""
    part = split(suite).select
    prompts = build_prompts(model, suite, part)
    reference = measure_y(model, prompts, pack(model, prompts, 64))
    for size in (1, 7):
        y = measure_y(model, prompts, pack(model, prompts, size))
        print(f"largest difference of y, batch size {size} against 64: {float((y - reference).abs().max()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--max-markers", type=int)
    parser.add_argument("--skip-repair", action="store_true")
    options = parser.parse_args()
    start = time.perf_counter()
    model = secateur.load()
    print(f"load {time.perf_counter() - start:.1f} s, {torch.get_num_threads()} threads, {model.dtype}")
    suite = secateur.load_suite(options.suite)
    scoring_cost(model, suite)
    batch_invariance(model, suite)
    if options.skip_repair:
        return
    with tempfile.TemporaryDirectory() as directory:
        elapsed = time.perf_counter()
        result = secateur.repair(model, suite, output=Path(directory) / "run", max_markers=options.max_markers)
        elapsed = time.perf_counter() - elapsed
    print(f"repair {elapsed:.0f} s, peak memory {peak_memory_bytes() / 1e9:.2f} GB, verdict {result.verdict}")
    if result.comparison is not None and result.perplexity_increase is not None:
        print(f"held-out reduction {result.comparison.reduction}, random {result.random_reduction}")
        print(f"perplexity increase {result.perplexity_increase}")


if __name__ == "__main__":
    main()
