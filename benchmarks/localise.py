"""Print what it costs to score every head by ``attribution`` and by ``fasp`` on the same prompts and text.

Run with ``python benchmarks/localise.py [--suite NAME] [--markers N] [--windows N]``. Both are measured in one
run, on one draw of fit markers and windows; ``fasp`` averages over three such draws, so a whole localisation of
its kind costs three times as much.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import secateur
from secateur.evaluation import Evaluator
from secateur.measures.prompts import build_prompts
from secateur.measures.splits import split
from secateur.measures.utility import read_passages, split_text
from secateur.models import TokenUsage
from secateur.scoring.attribution import Attribution
from secateur.scoring.fasp import Fasp


def cost(model: secateur.LanguageModel, work: Callable[[], object]) -> tuple[TokenUsage, float]:
    """Tokens and seconds of a piece of work."""
    usage, start = model.usage.copy(), time.perf_counter()
    work()
    return model.usage.since(usage), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--markers", type=int, default=4, help="per group")
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()
    model = secateur.load()
    suite = secateur.load_suite(options.suite)
    prompts = build_prompts(model, suite, split(suite, max_markers=options.markers).fit)
    text = split_text(model, read_passages())["fit"].first(options.windows)
    data = sum(batch.tokens for batch in Evaluator(model, prompts).batches) + sum(len(w.tokens) for w in text.windows)
    heads = secateur.UnitSpace.of(model).n_heads
    ours, our_time = cost(model, lambda: Attribution().score(Evaluator(model, prompts, text)))
    fasp = Fasp(seeds=1, markers=options.markers, windows=options.windows)
    theirs, their_time = cost(model, lambda: fasp.score(Evaluator(model, prompts, text)))
    plain = (1 + heads) * data
    print(f"{suite.name}: {len(prompts)} prompts, {len(text.windows)} windows, {data:,} tokens; {heads} heads")
    print(f"attribution (also scores every neuron)   {ours.forward:>10,} tokens forward {our_time:7.1f} s")
    print(f"fasp, one full pass per head (counted)   {plain:>10,} tokens forward   {plain / ours.forward:6.1f} x")
    print(
        f"fasp, passes begun at the head's layer   {theirs.forward:>10,} tokens forward {their_time:7.1f} s   "
        f"{theirs.forward / ours.forward:6.1f} x, {their_time / our_time:.1f} x the time"
    )


if __name__ == "__main__":
    main()
