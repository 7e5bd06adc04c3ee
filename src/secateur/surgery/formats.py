"""The formats in which a plan leaves, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.errors import MaskError, SettingError
from secateur.models import LanguageModel
from secateur.surgery.compact import check_compact, write_compact
from secateur.surgery.gguf import check_gguf, check_quantisation, write_gguf
from secateur.surgery.hf import write_checkpoint
from secateur.surgery.peft import check_adapter, write_adapter
from secateur.surgery.pruned import check_removal
from secateur.surgery.uniform import check_uniform, write_uniform
from secateur.weights import AnyMask


@dataclass(frozen=True)
class Format:
    """One way to write what a mask leaves.

    Attributes
    ----------
    description: one line.
    check: refuses, before anything is written, a model and mask that the format cannot carry.
    write: writes into a directory. options: names of the settings that both take.
    library: that loads the result, as the Hub names it.
    """

    description: str
    check: Callable[..., None]
    write: Callable[..., None]
    options: tuple[str, ...] = ()
    library: str = "transformers"


FORMATS: dict[str, Format] = {
    "hf": Format("same shapes, removed units zeroed; loads everywhere", check_removal, write_checkpoint, ("shard",)),
    "peft": Format("a tiny IA3 adapter, reversible and switched per request", check_adapter, write_adapter, (), "peft"),
    "hf-uniform": Format(
        "smaller, all layers alike; plain transformers", check_uniform, write_uniform, ("multiple", "shard")
    ),
    "compact": Format("smaller, exactly the plan's units removed", check_compact, write_compact, ("shard",)),
    "gguf": Format("one file for llama.cpp", check_gguf, write_gguf, ("quantisation",), "gguf"),
}


def format_named(name: str, options: dict[str, Any]) -> Format:
    """The format of a name.

    Raises
    ------
    SettingError: the name is unknown, or the format has no such setting or value.
    """
    if name not in FORMATS:
        raise SettingError(f"Unknown format '{name}'; choose one of: {', '.join(FORMATS)}.")
    found = FORMATS[name]
    for option in options:
        if option not in found.options:
            fitting = ", ".join(other for other, one in FORMATS.items() if option in one.options)
            raise SettingError(f"The format {name} has no setting {option}; it is one of: {fitting}.")
    shard, multiple = options.get("shard"), options.get("multiple", 1)
    if shard is not None and not re.fullmatch(r"\d+[KMGT]?B", str(shard)):
        raise SettingError(f"'{shard}' is no size of a file; write it as 500MB or 5GB.")
    if multiple < 1:
        raise SettingError(f"A multiple must be at least 1, not {multiple}.")
    check_quantisation(options.get("quantisation", "f16"))
    return found


def check_export(model: LanguageModel, mask: AnyMask, name: str, **options: Any) -> None:
    """Refuse what a format cannot carry, before anything is written.

    Raises
    ------
    MaskError, SettingError: says what to use instead.
    """
    if model.compact is not None and name not in ("peft", "hf"):
        raise MaskError("The model is compact already; export from the model it was made from.")
    format_named(name, options).check(model, mask, **options)
