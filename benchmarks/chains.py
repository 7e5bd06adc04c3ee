"""Print how long simulated annealing on surrogates takes: parallel chains times steps.

Run with ``python benchmarks/chains.py [--chains 1000] [--steps 10000] [--units 270]``. The surrogates have random
weights, two of them as in ``attention-pruning``, over one 0/1 entry per head of the default model.
"""

from __future__ import annotations

import argparse
import time

import torch

from secateur.scoring.surrogate import WIDTH, Quality, Surrogate
from secateur.search.chains import Energy, anneal


def surrogate(units: int, seed: int) -> Surrogate:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(units, WIDTH, generator=draw), torch.zeros(WIDTH), torch.randn(WIDTH, generator=draw)
    return Surrogate(*weights, 0.0, Quality(0.0, 0.0, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--units", type=int, default=270)
    options = parser.parse_args()
    energy = Energy([surrogate(options.units, seed) for seed in range(2)], [0.5, 0.5])
    start = time.perf_counter()
    found = anneal(energy, options.units, (1, options.units // 2), chains=options.chains, steps=options.steps)
    seconds = time.perf_counter() - start
    moves = options.chains * options.steps
    print(
        f"{options.chains:,} chains of {options.steps:,} steps over {options.units} units: {seconds:.1f} s with "
        f"{torch.get_num_threads()} threads, {moves / seconds / 1e6:.2f} million moves a second, "
        f"{found.accepted:.0%} accepted"
    )


if __name__ == "__main__":
    main()
