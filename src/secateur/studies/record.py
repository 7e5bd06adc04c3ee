"""What a run did and cost: everything needed to repeat it."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from secateur.models import LanguageModel
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


@dataclass(frozen=True)
class Cost:
    """Seconds, and tokens forwarded and backwarded."""

    seconds: float = 0.0
    tokens_forward: int = 0
    tokens_backward: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.tokens_forward + other.tokens_forward,
            self.tokens_backward + other.tokens_backward,
        )

    def __sub__(self, other: Cost) -> Cost:
        return self + Cost(-other.seconds, -other.tokens_forward, -other.tokens_backward)


@dataclass(eq=False)
class Costs:
    """What the parts of a run have cost so far, in all its sittings.

    Attributes
    ----------
    parts: by the name of the part. carried_on: how often the run was carried on.
    changed: called while work goes on, often.
    """

    parts: dict[str, Cost] = field(default_factory=dict)
    carried_on: int = 0
    changed: Callable[[], None] = lambda: None


@dataclass(eq=False)
class Recorder:
    """Shows the progress of the steps of a run, or of a part of it, and records what each one cost.

    Attributes
    ----------
    costs: of the run; what the ``part`` has cost in earlier sittings is added to what it costs now.
    steps: of this sitting. started: when, see :func:`now`.
    """

    model: LanguageModel
    progress: Progress = field(default_factory=Progress)
    costs: Costs = field(default_factory=Costs)
    part: str = ""
    steps: list[StepRecord] = field(default_factory=list)
    started: str = field(default_factory=now)
    _before: Cost = field(init=False)

    def __post_init__(self) -> None:
        self._before = self.costs.parts.get(self.part, Cost()) - self._clock()

    @contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        start = self._clock()
        try:
            with self.progress.step(name, total) as advance:

                def advanced(done: int) -> None:
                    advance(done)
                    self._note()

                yield advanced
        finally:
            self._note()
        self.steps.append(StepRecord(name, **asdict(self._clock() - start)))

    @property
    def cost(self) -> Cost:
        """Of the part, in all sittings."""
        return self._before + self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done meanwhile, which another recorder counts."""
        start = self._clock()
        try:
            yield
        finally:
            self._before -= self._clock() - start

    def _clock(self) -> Cost:
        """A moment, to be told from another one."""
        return Cost(time.perf_counter(), self.model.usage.forward, self.model.usage.backward)

    def _note(self) -> None:
        self.costs.parts[self.part] = self.cost
        self.costs.changed()

    def describe(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The content of ``run.json``; steps and memory are those of the last sitting."""
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
            **asdict(self.cost),
            "carried_on": self.costs.carried_on,
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
