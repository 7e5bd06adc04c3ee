"""``localise``: a method's scores of every unit, without removing any."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from secateur.evaluation.evaluator import Pool
from secateur.evaluation.store import Store
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.scoring.base import notes_of
from secateur.search.methods import DEFAULT_METHOD, method
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.record import Costs, Recorder
from secateur.suites import Suite, suite_hash
from secateur.units import UnitSpace

TOP = 200
SCORES_FORMAT = "secateur-scores-1"


@dataclass(frozen=True)
class LocaliseSettings(StudySettings):
    """What a localisation can be told, besides what every study can.

    Attributes
    ----------
    method: how units are scored.
    options: settings of the method by name.
    """

    method: str = DEFAULT_METHOD
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        method(self.method, self.options)


@dataclass(frozen=True, eq=False)
class LocaliseResult:
    """What a method says about every unit.

    Attributes
    ----------
    rank: (units,), the higher, the sooner the unit would be removed; NaN where the method says nothing.
    values: what the rank was made from, by name, each (units,).
    notes: what the method has to say about its scores, in sentences.
    run: versions, seed, data hashes, cost.
    """

    model: str
    suite: str
    method: str
    space: UnitSpace
    rank: np.ndarray
    values: dict[str, np.ndarray]
    notes: list[str]
    run: dict[str, Any]

    def top(self, count: int = TOP) -> list[dict[str, Any]]:
        """The first units in the order of removal, with all their values."""
        order = np.argsort(-self.rank, kind="stable")
        order = order[~np.isnan(self.rank[order])][:count]
        rows = []
        for place, flat in enumerate(order, start=1):
            unit = self.space.unit(int(flat))
            figures = {name: float(values[flat]) for name, values in self.values.items()}
            rows.append(
                {
                    "place": place,
                    "kind": unit.kind,
                    "layer": unit.layer,
                    "index": unit.index,
                    "rank": float(self.rank[flat]),
                    **figures,
                }
            )
        return rows

    def as_dict(self) -> dict[str, Any]:
        """The content of ``localise.json``."""
        return {
            "model": self.model,
            "suite": self.suite,
            "method": self.method,
            "units": {"heads": self.space.n_heads, "neurons": self.space.n_neurons},
            "scored": int((~np.isnan(self.rank)).sum()),
            "notes": self.notes,
            "top": self.top(20),
            "run": self.run,
        }

    def save_scores(self, path: str | Path) -> None:
        """Write rank and values, each (units,), to one safetensors file: heads first, layer by layer."""
        tensors = {"rank": self.rank, **self.values}
        tensors = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in tensors.items()}
        fingerprint = str(self.run["model"]["fingerprint"])
        save_file(
            tensors, str(path), metadata={"secateur": f'{{"format": "{SCORES_FORMAT}", "model": "{fingerprint}"}}'}
        )

    def csv(self, count: int = TOP) -> str:
        """The first units as comma-separated values with a heading."""
        rows = self.top(count)
        text = io.StringIO()
        names = ["place", "kind", "layer", "index", "rank", *self.values]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def localise(
    model: LanguageModel,
    suite: Suite,
    settings: LocaliseSettings | None = None,
    *,
    progress: Progress | None = None,
    costs: Costs | None = None,
    store: Store | None = None,
    cluster: Pool | None = None,
) -> LocaliseResult:
    """Score every unit of a model by a method on the fit part of a suite and of the neutral text.

    Parameters
    ----------
    costs: of earlier sittings, which this one adds to.
    store: keeps every measured mask, and those that it has already are not measured again.
    cluster: measures many masks at once, or None.
    """
    settings = settings or LocaliseSettings()
    settings.check()
    chosen = method(settings.method, settings.options).seeded(settings.seed)
    chosen.check(model, suite, settings.ablation)
    parts = Parts.prepare(model, suite, settings, store, cluster)
    recorder = Recorder(model, progress or Progress(), costs or Costs())
    scores = parts.problem(settings, recorder).score(chosen.scorer)
    told = {**settings.as_dict(), "options": chosen.settings, "suite": suite.name, "suite_hash": suite_hash(suite)}
    return LocaliseResult(
        model=model.source,
        suite=suite.name,
        method=settings.method,
        space=UnitSpace.of(model),
        rank=scores.rank,
        values=scores.values,
        notes=notes_of(scores),
        run=recorder.describe(told),
    )
