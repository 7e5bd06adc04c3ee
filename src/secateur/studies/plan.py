"""A plan: the chosen mask with everything needed to reproduce and to judge it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.attenuation import Attenuation
from secateur.errors import MaskError, SettingError, SuiteError
from secateur.files import to_json, write_text
from secateur.measures.splits import NOTHING_SEEN, Seen, split
from secateur.models import LanguageModel
from secateur.suites import Suite, load_suite, suite_hash
from secateur.weights import AnyMask, WeightMask, load_mask

PLAN_FORMAT = "secateur-plan-1"
PLAN_FILE = "plan.json"
MASK_FILE = "mask.safetensors"
# Where the plan lies in a directory of weights: some loaders take every safetensors file beside a config for weights.
BESIDE_WEIGHTS = "secateur"


@dataclass(frozen=True, eq=False)
class Plan:
    """The chosen mask and its record.

    Attributes
    ----------
    mask: what is removed: units, or single weights; or units that are turned down.
    record: plain data: model, suite and its hash, method, settings, splits, figures.
    """

    mask: AnyMask
    record: dict[str, Any]

    def applied(self, model: LanguageModel) -> AbstractContextManager[None]:
        """Remove the plan's units or weights from a live model while the context lasts.

        Raises
        ------
        MaskError: the plan was made for another model.
        """
        return self.mask.applied(model)

    def save(self, directory: str | Path) -> None:
        """Write ``plan.json`` and ``mask.safetensors`` into a directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.mask.save(directory / MASK_FILE)
        content = {
            "format": PLAN_FORMAT,
            "mask": MASK_FILE,
            "fingerprint": self.mask.fingerprint,
            "ablation": self.mask.ablation,
            **_removed(self.mask),
            **self.record,
        }
        write_text(directory / PLAN_FILE, to_json(content))

    def seen(self, suite: Suite) -> Seen:
        """The markers and wordings to leave out of a suite's test part, as far as the plan's record says.

        None of its own suite: there :meth:`held_out` keeps test apart.
        """
        return NOTHING_SEEN if suite.name == self.record.get("suite") else Seen.of(self.record.get("splits", {}))

    def held_out(self, suite: Suite | None, settings: dict[str, Any]) -> tuple[Suite, dict[str, Any]]:
        """Suite and settings under which the test parts of suite and text are those that the plan has not seen.

        Parameters
        ----------
        suite: another than the plan's, or None for it; of a plan that was fitted on all suites of a family but one,
            None is that one. Of another than the plan's, what the plan has :meth:`seen` is to be left out.
        settings: of a study; a seed, dealing or utility text that is None or missing becomes the plan's.

        Raises
        ------
        SettingError: the plan's suite is not there as it was, or a setting would test on what the plan was fitted on.
        SuiteError: too little of the suite is left to test on.
        """
        told = self.record.get("settings", {})
        if suite is None:
            name = self.record.get("target") or self.record.get("suite")
            if "sources" in self.record and self.record.get("target") is None:
                sources = ", ".join(self.record["sources"])
                raise SettingError(
                    f"The plan was made for several suites; name the one to test on (--suite): {sources}."
                )
            if name is None:
                raise SettingError("The plan does not say what suite it was made for; name one (--suite).")
            try:
                suite = load_suite(name)
            except SuiteError as error:
                raise SettingError(
                    f"The plan's suite '{name}' is not a built-in one; name its file (--suite)."
                ) from error
        chosen = dict(settings)
        for key in ("seed", "dealing", "utility_text"):
            own = told.get(key)
            if chosen.get(key) is None:
                chosen[key] = own
            elif key in told and str(chosen[key]) != str(own):
                raise SettingError(
                    f"The plan was made with {key} {own}; with {chosen[key]} it would be tested on what it was fitted "
                    "on. Leave it out."
                )
        if suite.name == self.record.get("suite") and told.get("suite_hash", suite_hash(suite)) != suite_hash(suite):
            raise SettingError(f"The suite '{suite.name}' has changed since the plan was made.")
        chosen |= {"seed": chosen["seed"] or 0, "dealing": chosen["dealing"] or "shuffled"}
        split(suite, chosen["seed"], dealing=chosen["dealing"]).without(suite, self.seen(suite))
        return suite, chosen


def _removed(mask: AnyMask) -> dict[str, Any]:
    """What a mask removes, for people: its units one by one, or the number of weights of every module."""
    if isinstance(mask, WeightMask):
        return {"weights": mask.counts}
    units = [f"{unit.kind} {unit.layer}.{unit.index}" for unit in mask.units]
    if isinstance(mask, Attenuation):
        return {"gates": {name: round(float(mask.gates[at]), 4) for name, at in zip(units, mask.changed, strict=True)}}
    return {"units": units}


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a run's directory, from what was exported or made slimmer, or from its ``plan.json``.

    Raises
    ------
    MaskError: there is no plan, or it cannot be read.
    """
    path = Path(path).expanduser()
    file = path
    if path.is_dir():
        places = [path / inner / PLAN_FILE for inner in ("", BESIDE_WEIGHTS, f"checkpoint/{BESIDE_WEIGHTS}")]
        file = next((place for place in places if place.is_file()), places[0])
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MaskError(f"There is no plan at '{file}'.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MaskError(f"The plan '{file}' cannot be read: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != PLAN_FORMAT or "mask" not in record:
        raise MaskError(f"'{file}' is not a Secateur plan.")
    mask_name = str(record["mask"])
    if Path(mask_name).name != mask_name:
        raise MaskError(f"The plan '{file}' names a mask outside its own directory.")
    for key in ("format", "mask", "fingerprint", "ablation", "units", "weights", "gates"):
        record.pop(key, None)
    return Plan(load_mask(file.parent / mask_name), record)
