"""In which precision fp32 matrices are multiplied: chosen by measuring speed and error on this machine."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from secateur.files import to_json, write_text
from secateur.models.language_model import LanguageModel, MatmulPrecision

# Sentences about one thing after another: what repeats itself is copied with a certainty that no error shakes.
PASSAGE = (
    "The committee met on Thursday to discuss the plans for the new bridge. "
    "Rain is expected in the north by evening, while the coast stays dry and mild. "
    "To make bread, mix flour, water, salt and a little yeast, and let the dough rest for an hour. "
    "The library opens at nine and closes at six, except on public holidays. "
    "A triangle with sides of three, four and five has a right angle. "
    "Most bees live alone and build small nests in the ground or in hollow stems. "
    "The train to the harbour leaves from platform two every twenty minutes. "
    "In 1869 a canal joined two seas and shortened the voyage to the east by weeks. "
    "Please send the signed form back before the end of the month. "
    "The engine would not start, so the mechanic cleaned the filter and checked the battery. "
    "Copper conducts heat better than iron, which is why good pans have a copper base. "
    "Someone had closed the window, put the kettle on and left a letter on the table. "
    "Our team won by two goals, although the goalkeeper had been ill all week. "
    "Prices rose slowly in spring and fell again when the harvest came in. "
    "On a clear night you can see thousands of stars without a telescope. "
    "The function returns the largest number in a list, or nothing if the list is empty."
)
TOKENS = 320  # at most: a pass about as long as those that a study makes
PASSES = 3
LIKELY = 20
READ = 64  # about so many positions, evenly spaced, whose tokens are compared
# A lower precision has to be worth its error: this much faster, and no further off than this, in nats.
FASTER = 1.3
CLOSE = 0.05


@dataclass(frozen=True)
class PrecisionTrial:
    """What was measured and chosen.

    Attributes
    ----------
    speed: in precision "medium", relative to "highest".
    error: the largest change of the log-probability of a likely token against that of another, nats; None where it
        is not finite.
    """

    chosen: MatmulPrecision
    speed: float
    error: float | None

    def __str__(self) -> str:
        off = f"log-probabilities of likely tokens shifted against each other by up to {self.error or 0:.3f} nats"
        if self.error is None:
            off = "some values were not finite"
        figures = f"{self.speed:.2f} times as fast on a test passage, where {off}"
        if self.chosen == "highest":
            return f"Matrix products in full precision; medium was {figures}."
        return (
            f"Matrix products in {self.chosen} precision (bf16 or TF32, as the hardware has it): {figures}; "
            f"--matmul-precision {self.chosen} repeats this choice."
        )


def choose_precision(model: LanguageModel, directory: Path) -> PrecisionTrial | None:
    """The trial of a model on this machine, made once and kept.

    Another timing might come out otherwise, and a run that was killed carries on in its own arithmetic alone.

    Parameters
    ----------
    directory: where trials are kept. If it cannot be written, the next start tries again.

    Returns
    -------
    None for models of another type than fp32, which multiply in that type whatever is chosen.
    """
    if model.dtype != torch.float32:
        return None
    kept = directory / f"{_key(model)}.json"
    try:
        return PrecisionTrial(**json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there yet, or damaged
        trial = try_precision(model)
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        write_text(kept, to_json(asdict(trial)))
    return trial


def try_precision(model: LanguageModel, clock: Callable[[], float] = time.perf_counter) -> PrecisionTrial:
    """Try lower precision on a passage, and take it where it is much faster and hardly different."""
    lower = replace(model, matmul_precision="medium")
    ids = torch.tensor([model.tokenizer(PASSAGE, add_special_tokens=False)["input_ids"][:TOKENS]])
    plain, seconds = _timed(model, ids, clock)
    fast, fast_seconds = _timed(lower, ids, clock)
    likely = plain.topk(LIKELY, dim=-1).indices
    difference = (fast - plain).gather(-1, likely)  # (tokens, likely)
    error = float((difference.amax(dim=-1) - difference.amin(dim=-1)).max())
    speed = seconds / max(fast_seconds, 1e-9)
    chosen: MatmulPrecision = "medium" if speed >= FASTER and error <= CLOSE else "highest"
    return PrecisionTrial(chosen, speed, error if math.isfinite(error) else None)


@torch.no_grad()
def _timed(model: LanguageModel, ids: Tensor, clock: Callable[[], float]) -> tuple[Tensor, float]:
    """Log-probabilities at some positions, (positions, vocabulary), and the seconds of the fastest pass.

    They may be not finite: whether a model is damaged is for a study to say.
    """
    passes = []
    for _ in range(PASSES):
        begin = clock()
        hidden = model.hidden(ids, None, None)[0]
        logits = model.logits(hidden[:: max(1, len(hidden) // READ)])
        log_probabilities = logits.log_softmax(dim=-1).cpu()
        passes.append(clock() - begin)
    return log_probabilities, min(passes)


def _key(model: LanguageModel) -> str:
    """A hash of what a trial depends on: the model, the machine and what computes on it, and the versions."""
    devices = {parameter.device for parameter in model.model.parameters()}
    names = sorted({torch.cuda.get_device_name(one) if one.type == "cuda" else one.type for one in devices})
    told = (model.fingerprint, platform.node(), names, torch.__version__, version("secateur"))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]
