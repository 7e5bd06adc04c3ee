"""Print what it costs to score every head by ``attribution`` and by ``fasp`` from the same pool of prompts and text.

Run with ``python benchmarks/localise.py [--suite NAME] [--markers N] [--windows N] [--matmul-precision P]``. Both are
measured in one run. ``attribution`` reads the whole pool; ``fasp`` reads three draws, as in its published scores, each
with half of the pool's markers and a third of its windows, so that three draws read about the pool once and a half.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import secateur
from secateur.evaluation import Evaluator
from secateur.measures.prompts import build_prompts
from secateur.measures.splits import split
from secateur.measures.utility import hidden_states, read_passages, split_text
from secateur.models import TokenUsage
from secateur.scoring.attribution import Attribution
from secateur.scoring.fasp import Fasp

SEEDS = 3
KEPT = 1 << 30  # bytes for states between masks


def cost(model: secateur.LanguageModel, work: Callable[[], object]) -> tuple[TokenUsage, float]:
    """Tokens and seconds of a piece of work."""
    usage, start = model.usage.copy(), time.perf_counter()
    work()
    return model.usage.since(usage), time.perf_counter() - start


def read_once(pool: Evaluator, fasp: Fasp) -> None:
    """One whole pass over what the draws of ``fasp`` read for every head."""
    for draw in fasp.prompt_draws(pool):
        Evaluator(pool.model, draw.of(pool.prompts)).evaluate()
    for numbers in fasp.window_draws(pool):
        hidden_states(pool.model, fasp.text_of(pool, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--markers", type=int, default=4, help="per group, in the pool")
    parser.add_argument("--windows", type=int, default=6, help="of neutral text, in the pool")
    parser.add_argument("--matmul-precision", default="highest")
    options = parser.parse_args()
    model = secateur.load(matmul_precision=options.matmul_precision)
    suite = secateur.load_suite(options.suite)
    prompts = build_prompts(model, suite, split(suite, max_markers=options.markers).fit)
    text = split_text(model, read_passages())["fit"].first(options.windows)
    heads = secateur.UnitSpace.of(model).n_heads
    print(f"{suite.name}: {len(prompts)} prompts, {len(text.windows)} windows; {heads} heads", flush=True)

    def report(name: str, spent: TokenUsage, seconds: float) -> None:
        print(
            f"{name:<42} {spent.forward:>10,} tokens forward {spent.backward:>7,} backward {seconds:7.1f} s   "
            f"{spent.forward / ours.forward:6.1f} x tokens forward, {seconds / our_time:6.1f} x time",
            flush=True,
        )

    ours, our_time = cost(model, lambda: Attribution().score(Evaluator(model, prompts, text)))
    report("attribution (scores every neuron, too)", ours, our_time)
    fasp = Fasp(
        window_tokens=text.window,
        seeds=SEEDS,
        markers=max(2, options.markers // 2),
        scenarios=len(prompts.scenarios),
        windows=max(1, options.windows // SEEDS),
    )
    pool = Evaluator(model, prompts, text, walk_bytes=KEPT)
    theirs, their_time = cost(model, lambda: fasp.score(pool))
    report("fasp, passes begun at the head's layer", theirs, their_time)
    whole, one_time = cost(model, lambda: read_once(pool, fasp))
    plain = TokenUsage(forward=(1 + heads) * whole.forward)
    report(f"fasp, whole passes ({1 + heads} x one, measured)", plain, (1 + heads) * one_time)


if __name__ == "__main__":
    main()
