"""In which precision fp32 matrices are multiplied: chosen by measuring speed and error on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.models.language_model import LanguageModel, MatmulPrecision

SENTENCE = "The committee met on Thursday to discuss the plans for the new bridge, and the engineer said that "
REPEATS = 16  # of the sentence: a pass about as long as those that a study makes
PASSES = 3
LIKELY = 20
READ = 64  # positions at the end whose tokens are compared
# A lower precision has to be worth its error: this much faster, and no further off than this, in nats.
FASTER = 1.3
CLOSE = 0.05


@dataclass(frozen=True)
class PrecisionTrial:
    """What was measured and chosen.

    Attributes
    ----------
    speed: of bf16 products, relative to fp32.
    error: the largest change of the log-probability of a likely token against that of another, nats.
    """

    chosen: MatmulPrecision
    speed: float
    error: float

    def __str__(self) -> str:
        figures = f"{self.speed:.2f} times as fast as fp32, off by {self.error:.3f} nats at most"
        if self.chosen == "highest":
            return f"Matrix products in fp32: bf16 would be {figures}."
        return f"Matrix products in bf16 ({figures}); --matmul-precision {self.chosen} repeats this choice."


def choose_precision(model: LanguageModel, clock: Callable[[], float] = time.perf_counter) -> PrecisionTrial:
    """Try bf16 products on a passage, and take them where they are much faster and hardly different.

    Models of another type than fp32 multiply in that type whatever is chosen here.
    """
    if model.dtype != torch.float32:
        return PrecisionTrial("highest", 1.0, 0.0)
    lower = replace(model, matmul_precision="medium", usage=model.usage)
    ids = torch.tensor([model.tokenizer(SENTENCE * REPEATS, add_special_tokens=False)["input_ids"]])
    plain, seconds = _timed(model, ids, clock)
    fast, fast_seconds = _timed(lower, ids, clock)
    likely = plain.topk(LIKELY, dim=-1).indices
    difference = (fast - plain).gather(-1, likely)  # (tokens, likely)
    error = float((difference.amax(dim=-1) - difference.amin(dim=-1)).max())
    speed = seconds / max(fast_seconds, 1e-9)
    return PrecisionTrial("medium" if speed >= FASTER and error <= CLOSE else "highest", speed, error)


@torch.no_grad()
def _timed(model: LanguageModel, ids: Tensor, clock: Callable[[], float]) -> tuple[Tensor, float]:
    """Log-probabilities at the last positions, (positions, vocabulary), and the seconds of the fastest pass."""
    passes = []
    for _ in range(PASSES):
        begin = clock()
        hidden = model.hidden(ids, None, None)[0]
        log_probabilities = model.log_probabilities(hidden[-READ:]).float().cpu()
        passes.append(clock() - begin)
    return log_probabilities, min(passes)
