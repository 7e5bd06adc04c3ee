"""What a run did and cost: everything needed to repeat it."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from secateur.models import LanguageModel, TokenUsage
from secateur.progress import Advance, Progress

PACKAGES = ("secateur", "torch", "transformers", "safetensors", "numpy")


def now() -> str:
    """The date and time, UTC in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class StepRecord:
    """One step of a run: its name, seconds, and tokens forwarded and backwarded."""

    name: str
    seconds: float
    tokens_forward: int
    tokens_backward: int


@dataclass(eq=False)
class Recorder:
    """Shows the progress of a run's steps and records what each one cost; ``started`` is when, see :func:`now`."""

    model: LanguageModel
    progress: Progress = field(default_factory=Progress)
    steps: list[StepRecord] = field(default_factory=list)
    started: str = field(default_factory=now)
    _start: float = field(default_factory=time.perf_counter)
    _usage: TokenUsage = field(init=False)

    def __post_init__(self) -> None:
        self._usage = self.model.usage.copy()

    @contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        start, usage = time.perf_counter(), self.model.usage.copy()
        with self.progress.step(name, total) as advance:
            yield advance
        spent = self.model.usage.since(usage)
        self.steps.append(StepRecord(name, time.perf_counter() - start, spent.forward, spent.backward))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def usage(self) -> TokenUsage:
        """Tokens since the recorder was made."""
        return self.model.usage.since(self._usage)

    def describe(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The content of ``run.json``."""
        trial = self.model.precision_trial
        return {
            "command": sys.argv,
            "settings": settings,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "platform": platform.platform(),
            "started": self.started,
            "finished": now(),
            "model": {
                "source": self.model.source,
                "type": self.model.model.config.model_type,
                "fingerprint": self.model.fingerprint,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "matmul_precision": self.model.matmul_precision,
                "precision_trial": None if trial is None else asdict(trial),
                "device": device_name(self.model),
            },
            "threads": torch.get_num_threads(),
            "seconds": self.seconds,
            "tokens_forward": self.usage.forward,
            "tokens_backward": self.usage.backward,
            "peak_memory_bytes": peak_memory_bytes(),
            "steps": [asdict(step) for step in self.steps],
        }


def device_name(model: LanguageModel) -> str:
    """The device, or the devices of a model that is spread over several."""
    return ", ".join(sorted({str(parameter.device) for parameter in model.model.parameters()}))


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
