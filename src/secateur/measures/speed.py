"""How fast a model writes: greedy decoding with a cache, timed in turns so that both models meet the same machine.

Transformers runs it as it would for anyone, without the faster products that measurements use.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from secateur.measures.disparity import REPLICATES, Interval
from secateur.models import LanguageModel
from secateur.progress import Advance

CONTEXT = 32


@dataclass(frozen=True)
class SpeedComparison:
    """Tokens per second of two models, (runs,) each, taken in turns."""

    before: np.ndarray
    after: np.ndarray

    def ratio(self, seed: int = 0) -> Interval:
        """Median of the paired ratios after / before, with a 95 % bootstrap interval over runs."""
        ratios = self.after / self.before
        drawn = np.random.default_rng(seed).integers(len(ratios), size=(REPLICATES, len(ratios)))
        return Interval.of(np.median(ratios), np.median(ratios[drawn], axis=1))


def compare_speed(
    before: LanguageModel, after: LanguageModel, tokens: int, runs: int, advance: Advance = lambda _: None
) -> SpeedComparison:
    """Time both models in turns, after a run of each that does not count.

    Parameters
    ----------
    tokens: to write in one run. runs: of each model.
    """
    seconds = np.empty((runs + 1, 2))
    for run in range(runs + 1):
        order = (0, 1) if run % 2 == 0 else (1, 0)
        for which in order:
            seconds[run, which] = _seconds((before, after)[which], tokens)
        advance(1)
    rates = tokens / seconds[1:]
    return SpeedComparison(rates[:, 0], rates[:, 1])


@torch.no_grad()
def _seconds(model: LanguageModel, tokens: int) -> float:
    vocabulary = int(model.model.config.vocab_size)
    prompt = torch.arange(1, CONTEXT + 1)[None] % vocabulary
    begin = time.perf_counter()
    plain: Any = model.model
    plain.generate(
        prompt.to(model.input_device),
        attention_mask=torch.ones_like(prompt).to(model.input_device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    if model.input_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def memory_bytes(model: LanguageModel, context: int = 1024) -> int:
    """Bytes of the weights and of the keys and values of one sequence."""
    cached = 2 * sum(model.kv_heads_per_layer) * model.head_dim * context
    return model.weight_bytes + cached * torch.empty(0, dtype=model.dtype).element_size()
