"""Find, read and validate suites: built-in ones by name, a user's own by path."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from secateur.errors import SuiteError
from secateur.suites.schema import SLOT, Paraphrase, Suite

BUILTIN = Path(__file__).parent / "builtin"
DEFAULT_SUITE = "occupations"
YAML_SUFFIXES = (".yaml", ".yml")


def suite_names() -> list[str]:
    """Names of the built-in suites, sorted."""
    return sorted(path.stem for path in BUILTIN.glob("*.yaml"))


def load_suite(source: str | Path | Suite | None = None) -> Suite:
    """Load a built-in suite by name, or a YAML file by path; None is the default suite.

    Raises
    ------
    SuiteError: no such suite (near misses are listed), or the file breaks the schema (file,
        field and expectation are named).
    """
    if isinstance(source, Suite):
        return source
    name = str(source or DEFAULT_SUITE)
    path = Path(name).expanduser()
    if path.suffix not in YAML_SUFFIXES:
        path = BUILTIN / f"{name}.yaml"
        if name not in suite_names():
            near = _near_misses(name, suite_names()) or " 'secateur suites' lists them."
            raise SuiteError(f"There is no suite '{name}'.{near}")
    return _validate(_read(path), path)


def suite_hash(suite: Suite) -> str:
    """A hash of everything in a suite that bears on its y; which answer is favourable does not."""
    text = suite.model_dump_json(exclude={"scenarios": {"__all__": {"measure": {"favourable"}}}})
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fill(paraphrase: Paraphrase, marker: str) -> tuple[str, str]:
    """Fill the slot: the user's message and the beginning of the reply."""
    return fill_text(paraphrase.prompt, marker), fill_text(paraphrase.reply, marker)


def fill_text(text: str, marker: str) -> str:
    """Put a marker into the slot; doubled braces become single ones."""
    parts = (part.replace("{{", "{").replace("}}", "}") for part in text.split(SLOT))
    return marker.join(parts)


def _read(path: Path) -> Any:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SuiteError(f"There is no suite file at '{path}'.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"The suite file '{path}' cannot be read: {error}.") from error
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2020-13-45 is a plain ValueError
        raise SuiteError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(document, dict):
        raise SuiteError(f"'{path}' must be a mapping with the fields name, attribute, groups and scenarios.")
    return document


def _validate(document: dict[str, Any], path: Path) -> Suite:
    document = dict(document)
    _resolve(document, "groups", path)
    _resolve(document, "scenarios", path)
    default_measure = document.pop("measure", None)
    if isinstance(document["scenarios"], list):
        document["scenarios"] = [_expand(s, default_measure) for s in document["scenarios"]]
    try:
        return Suite.model_validate(document)
    except ValidationError as error:
        raise SuiteError(_explain(error, path, document)) from error


def _resolve(document: dict[str, Any], field: str, path: Path) -> None:
    """Replace a reference to a shared file of groups or scenarios by what it holds."""
    if field not in document:
        near = difflib.get_close_matches(field, [str(key) for key in document], n=1, cutoff=0.7)
        hint = f" Did you write '{near[0]}' for '{field}'?" if near else ""
        raise SuiteError(f"'{path}': the field '{field}' is missing.{hint}")
    reference = document[field]
    if not isinstance(reference, str):
        return
    local = path.parent / field / f"{reference}.yaml"
    shared = local if local.is_file() else BUILTIN / field / f"{reference}.yaml"
    if not shared.is_file():
        known = sorted(file.stem for file in (BUILTIN / field).glob("*.yaml"))
        raise SuiteError(f"'{path}': {field} '{reference}' is not a file.{_near_misses(reference, known)}")
    content = _read(shared)
    document[field] = content.get(field)
    own = document.get("sources") or []
    if content.get("sources") and isinstance(own, list):
        document["sources"] = [*own, *(source for source in content["sources"] if source not in own)]


def _expand(scenario: Any, default_measure: Any) -> Any:
    """Write out the short forms: a paraphrase as a string, a reply for the whole scenario."""
    if not isinstance(scenario, dict):
        return scenario
    scenario = dict(scenario)
    reply = scenario.pop("reply", "")
    if default_measure is not None:
        scenario.setdefault("measure", default_measure)
    paraphrases = scenario.get("paraphrases")
    if isinstance(paraphrases, list):
        scenario["paraphrases"] = [
            {"prompt": p, "reply": reply} if isinstance(p, str) else {"reply": reply, **p} if isinstance(p, dict) else p
            for p in paraphrases
        ]
    return scenario


def _explain(error: ValidationError, path: Path, document: dict[str, Any]) -> str:
    """One sentence for the first fault: file, field, expectation, near misses.

    A field that is not known comes first: as a rule it is what another, missing field should be.
    """
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in fault["loc"])
    scenario = _scenario_id(fault["loc"], document)
    field = f"field '{where}'{scenario}" if where else "the suite"
    message = " ".join(fault["msg"].removeprefix("Value error, ").split())
    near = ""
    if fault["type"] == "extra_forbidden":
        message = "this field is not known"
        near = _near_misses(str(fault["loc"][-1]), _known_fields())
    more = len(error.errors()) - 1
    others = f" ({more} more fault{'s' if more > 1 else ''} in this file)" if more else ""
    return f"'{path}', {field}: {message}.{near}{others}"


def _scenario_id(location: tuple[int | str, ...], document: dict[str, Any]) -> str:
    if len(location) >= 2 and location[0] == "scenarios" and isinstance(location[1], int):
        scenario = document["scenarios"][location[1]]
        if isinstance(scenario, dict) and "id" in scenario:
            return f" (scenario '{scenario['id']}')"
    return ""


def _known_fields() -> list[str]:
    definitions = Suite.model_json_schema()
    fields = set(definitions["properties"])
    for definition in definitions["$defs"].values():
        fields.update(definition["properties"])
    return sorted(fields)


def _near_misses(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean: {', '.join(matches)}?" if matches else ""
