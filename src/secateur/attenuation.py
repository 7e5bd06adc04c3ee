"""Attenuations: units turned down instead of removed, reversibly on a live model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.units import HEADER, Ablation, Unit, UnitSpace, check_made_for, gated, gates_of, space_from

ATTENUATION_FORMAT = "secateur-attenuation-1"


@dataclass(frozen=True, eq=False)
class Attenuation:
    """A gate between 0 and 1 for every unit of one model.

    Attributes
    ----------
    space: the units of the model.
    gates: fp32 (units,), what each unit's activation is multiplied by.
    fingerprint: of the model that the gates were made for.
    """

    action: ClassVar[str] = "turned down"

    space: UnitSpace
    gates: np.ndarray
    fingerprint: str

    def __post_init__(self) -> None:
        gates = np.asarray(self.gates, dtype=np.float32).copy()
        if gates.shape != (len(self.space),):
            raise MaskError(f"An attenuation of this model has {len(self.space)} gates, not {gates.shape}.")
        if not ((gates >= 0) & (gates <= 1)).all():
            raise MaskError("A gate lies outside the range from 0 to 1.")
        gates.setflags(write=False)
        object.__setattr__(self, "gates", gates)

    @property
    def ablation(self) -> Ablation:
        """A unit is turned down towards zero."""
        return "zero"

    @property
    def changed(self) -> np.ndarray:
        """Flat positions of the units that are turned down, ascending."""
        return np.flatnonzero(self.gates < 1)

    @property
    def units(self) -> list[Unit]:
        """The units that are turned down."""
        return [self.space.unit(flat) for flat in self.changed]

    @property
    def heads_removed(self) -> int:
        """Heads that are turned down."""
        return int((self.gates[: self.space.n_heads] < 1).sum())

    @property
    def neurons_removed(self) -> int:
        """Neurons that are turned down."""
        return int((self.gates[self.space.n_heads :] < 1).sum())

    @property
    def weights_removed(self) -> int:
        """Gates belong to units, not to single weights."""
        return 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is turned down."""
        return bool((self.gates == 1).all())

    @property
    def summary(self) -> str:
        """What is turned down, in words."""
        return f"{self.heads_removed} heads, {self.neurons_removed} neurons"

    @property
    def key(self) -> bytes:
        """Bytes that identify the gates for one model: what a store of results is keyed by."""
        return b"gates" + hashlib.sha256(self.gates.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Attenuation):
            return NotImplemented
        return self.space == other.space and self.fingerprint == other.fingerprint and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def random_like(self, rng: np.random.Generator) -> Attenuation:
        """The same gates on other units, heads on heads and neurons on neurons."""
        heads, neurons = np.split(self.gates, [self.space.n_heads])
        return Attenuation(
            self.space, np.concatenate([rng.permutation(heads), rng.permutation(neurons)]), self.fingerprint
        )

    def check(self, model: LanguageModel) -> None:
        """Refuse gates that were made for another model.

        Raises
        ------
        MaskError: the fingerprints or the unit counts differ.
        """
        check_made_for(model, self.fingerprint, self.space, "attenuation")

    @contextmanager
    def applied(self, model: LanguageModel) -> Iterator[None]:
        """Turn the units of a live model down while the context lasts.

        Raises
        ------
        MaskError: the gates were made for another model.
        """
        self.check(model)
        with gated(model, gates_of(self.space, self.gates)):
            yield

    def save(self, path: str | Path) -> None:
        """Write the gates to one safetensors file; equal gates give equal bytes."""
        header = {"format": ATTENUATION_FORMAT, "fingerprint": self.fingerprint, "space": asdict(self.space)}
        save_file({"gates": self.gates}, str(path), metadata={HEADER: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Attenuation:
        """Read a file of gates.

        Raises
        ------
        MaskError: the file is missing, damaged or holds no gates.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                if not isinstance(header, dict) or header.get("format") != ATTENUATION_FORMAT:
                    raise MaskError(f"'{path}' is not a Secateur attenuation.")
                gates = file.get_tensor("gates")
            return cls(space_from(header["space"]), gates, str(header["fingerprint"]))
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, OverflowError) as error:
            raise MaskError(f"The attenuation '{path}' cannot be read: {error}.") from error
