"""The registry of methods: each is one way to score and one way to choose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from secateur.errors import SettingError
from secateur.models import LanguageModel
from secateur.scoring.attribution import Attribution
from secateur.scoring.base import Scorer, Settings
from secateur.scoring.fairness_pruning import FairnessPruning
from secateur.scoring.fasp import Fasp
from secateur.scoring.gates import GateTraining
from secateur.scoring.gradient import Gradient
from secateur.scoring.magnitude import Magnitude
from secateur.scoring.name_attention import NameAttention
from secateur.scoring.random import Random
from secateur.scoring.sampled_masks import SampledMasks
from secateur.scoring.wanda_difference import WandaDifference
from secateur.search.annealing import Annealing
from secateur.search.attention_pruning import SurrogateAnnealing
from secateur.search.base import Search
from secateur.search.counts import Counts
from secateur.search.difference import SetDifference
from secateur.search.elimination import Elimination
from secateur.search.percent_difference import PercentDifference
from secateur.search.protected import Protected
from secateur.search.rounding import Rounding
from secateur.suites import Suite

DEFAULT_METHOD = "attribution"


@dataclass(frozen=True)
class MethodKind:
    """One line of the registry: what scores, what chooses, and one line for people."""

    scorer: type[Settings]
    search: type[Settings]
    summary: str


METHODS: dict[str, MethodKind] = {
    "attribution": MethodKind(
        Attribution, Elimination, "effect of every head and neuron per cost, from one backward pass; in rounds"
    ),
    "annealing": MethodKind(
        Attribution, Annealing, "heads and blocks of neurons, annealed on surrogates that learn in rounds"
    ),
    "gates": MethodKind(GateTraining, Rounding, "a gate for every unit, trained against bias and damage, then rounded"),
    "random": MethodKind(Random, Counts, "units in a random order: what every method must beat"),
    "magnitude": MethodKind(Magnitude, Counts, "heads and neurons with the smallest weights first"),
    "gradient": MethodKind(Gradient, Counts, "absolute gradient of bias (or of loss) in every unit's gate"),
    "fairness-pruning": MethodKind(
        FairnessPruning, Counts, "neurons whose activation differs between groups, weighed against importance"
    ),
    "wanda-difference": MethodKind(
        WandaDifference, PercentDifference, "neurons or weights at the top for the minority's prompts alone"
    ),
    "fasp": MethodKind(Fasp, Protected, "heads without which bias is lowest, but for those that perplexity needs"),
    "attention-pruning": MethodKind(
        SampledMasks, SurrogateAnnealing, "simulated annealing over heads on networks that predict bias and perplexity"
    ),
    "name-attention": MethodKind(
        NameAttention, SetDifference, "heads that look back at the minority's names and not at the majority's"
    ),
}


@dataclass(frozen=True, eq=False)
class Method:
    """A method with its settings, ready to run."""

    name: str
    scorer: Any
    search: Any

    @property
    def settings(self) -> dict[str, Any]:
        """All settings with their values, as plain data."""
        return {**self.scorer.model_dump(mode="json"), **self.search.model_dump(mode="json")}

    def quick(self) -> Method:
        """The same for a first look."""
        return Method(self.name, self.scorer.quick(), self.search.quick())

    def seeded(self, seed: int) -> Method:
        """The same with the seed of a study, but for seeds that the user has set."""
        return Method(self.name, self.scorer.seeded(seed), self.search.seeded(seed))

    def check(self, model: LanguageModel, suite: Suite, ablation: str = "zero") -> None:
        """Refuse, before anything is computed, what the method cannot work on.

        Raises
        ------
        SettingError: names the method and says what to use instead.
        """
        try:
            self.scorer.check(model, suite)
            self.search.check(model, self.scorer, ablation)
        except SettingError as error:
            raise SettingError(f"{self.name}: {error}") from error


def methods_of(names: Sequence[str], options: dict[str, dict[str, Any]], seed: int, quick: bool) -> list[Method]:
    """The methods of a study by name, with their settings where some are given, seeded like the study.

    Raises
    ------
    SettingError: see :func:`method`.
    """
    found = [method(name, options.get(name)).seeded(seed) for name in names]
    return [one.quick() for one in found] if quick else found


def method(name: str = DEFAULT_METHOD, options: dict[str, Any] | None = None) -> Method:
    """A method by name.

    Parameters
    ----------
    options: its settings by name; values may be text, as a command line gives them.

    Raises
    ------
    SettingError: there is no such method or setting, or a value is out of its range.
    """
    if name not in METHODS:
        raise SettingError(f"Unknown method '{name}'{_nearest(name, METHODS)}; choose one of: {', '.join(METHODS)}.")
    kind, given = METHODS[name], dict(options or {})
    known = {*kind.scorer.model_fields, *kind.search.model_fields}
    for key in given:
        if key not in known:
            raise SettingError(
                f"The method '{name}' has no setting '{key}'{_nearest(key, known)}; it has: {', '.join(sorted(known))}."
            )
    return Method(name, _build(name, kind.scorer, given), _build(name, kind.search, given))


def _build(name: str, kind: type[Settings], given: dict[str, Any]) -> Scorer | Search | Settings:
    chosen = {key: value for key, value in given.items() if key in kind.model_fields}
    try:
        return kind(**chosen)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1]) or "the settings"
        what = first["msg"].removeprefix("Value error, ")
        raise SettingError(
            f"Setting '{where}' of the method '{name}': {what[:1].lower() + what[1:]}, not {first['input']!r}."
        ) from error


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def parse_options(pairs: Iterable[str]) -> dict[str, str]:
    """Settings from ``key=value`` texts; of two values for one key the later holds.

    Raises
    ------
    SettingError: a text is not of this form.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip() or not value.strip():
            raise SettingError(f"'{pair}' is not of the form key=value, such as --set rounds=6.")
        options[key.strip()] = value.strip()
    return options
