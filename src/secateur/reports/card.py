"""``README.md`` of an export: a model card with the Hub's metadata, what was removed, and the held-out figures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

import secateur
from secateur.measures.disparity import Interval
from secateur.models import LanguageModel
from secateur.models.loading import hub_name, is_hub_id
from secateur.studies.plan import Plan

LOADING = {
    "hf": 'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("{here}")',
    "peft": (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "{here}")'
    ),
    "compact": (
        'import secateur\nmodel = secateur.load("{here}").model\n\n'
        "# or without Secateur, once you have read modeling_compact.py:\n"
        "from transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("{here}", trust_remote_code=True)'
    ),
    "gguf": 'from llama_cpp import Llama\nmodel = Llama("{here}/model.gguf")',
}
LOADING["hf-uniform"] = LOADING["hf"]


def render_card(model: LanguageModel, plan: Plan, name: str, library: str, here: str) -> str:
    """The card of a plan that was written in a format.

    Parameters
    ----------
    name, library: of the format, and what the Hub calls its library. here: what the result is loaded by.
    """
    record, base = plan.record, hub_name(model)
    suite = str(record.get("suite", "unknown"))
    environment = Environment(
        loader=PackageLoader("secateur.reports"),
        autoescape=False,  # Markdown; see the filter
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = plain_markdown
    text = environment.get_template("card.md.j2").render(
        title=here,
        made=f"{base}, {plan.mask.summary} {plan.mask.action} by Secateur {secateur.__version__}; written as {name}.",
        removed=_removed(plan),
        suite=suite,
        figures=_figures(record),
        measured_on=f"the suite {suite}" if record.get("test") else "the neutral text",
        verdict=record.get("verdict", ""),
        explanation=record.get("explanation", ""),
        command=command_line(record.get("command", [])),
        quantised=name == "gguf",
        how=_how(record),
        loading=LOADING["compact" if name == "hf" and model.compact is not None else name].format(here=here, base=base),
    )
    return f"---\n{_metadata(record, base, name, library, here, suite).to_yaml()}\n---\n{text}"


def plain_markdown(value: Any) -> str:
    """Text on one line that Markdown and HTML leave as it is."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#!])", r"\\\1", text)


def _metadata(record: dict[str, Any], base: str, name: str, library: str, here: str, suite: str) -> ModelCardData:
    relation = {"peft": "adapter", "gguf": "quantized"}.get(name, "finetune")
    known: dict[str, Any] = {"base_model": base, "base_model_relation": relation} if is_hub_id(base) else {}
    return ModelCardData(
        **known,
        pipeline_tag="text-generation",
        library_name=library,
        tags=["secateur", "pruning", "fairness", "bias"],
        model_name=here,
        eval_results=_results(record, suite) or None,
    )


def _results(record: dict[str, Any], suite: str) -> list[EvalResult]:
    """The figures on test in the Hub's format."""
    if not record.get("test") or not record.get("utility"):
        return []
    test, utility = record["test"], record["utility"]
    metrics = [
        ("bias", "corrected suite bias B before", test["bias_before"]["value"]),
        ("bias", "corrected suite bias B", test["bias_after"]["value"]),
        ("bias-reduction", "reduction of B", test["reduction"]["value"]),
        ("perplexity", "perplexity on neutral text", utility["perplexity_after"]),
    ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="secateur-suite",
            dataset_name=f"Secateur suite {suite}",
            dataset_split="test",
            metric_type=kind,
            metric_name=title,
            metric_value=value,
        )
        for kind, title, value in metrics
        if value is not None
    ]


def _figures(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table: name, before, after, change with interval. They hold figures alone, no text of a suite."""
    test, utility = record.get("test"), record.get("utility")
    rows: list[tuple[str, ...]] = []
    if test:
        change = Interval(**test["reduction"]).as_change
        rows.append(
            (
                "corrected suite bias B",
                _between(test["bias_before"]),
                _between(test["bias_after"]),
                f"{change.value:+.0f}% [{change.low:+.0f}%, {change.high:+.0f}%]",
            )
        )
    if utility:
        increase = utility["perplexity_increase"]
        rows.append(
            (
                "perplexity on neutral text",
                f"{utility['perplexity_before']:.2f}",
                f"{utility['perplexity_after']:.2f}",
                f"{increase['value']:+.2%} [{increase['low']:+.2%}, {increase['high']:+.2%}]",
            )
        )
    if test and "random_reduction" in test:
        change = Interval(**test["random_reduction"]).as_change
        rows.append(("bias under random masks of the same size", "", "", f"{change.value:+.0f}%"))
    return rows


def _between(interval: dict[str, float]) -> str:
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def command_line(told: list[Any]) -> str:
    """The command line that made something; empty where it was made from Python."""
    if not told or Path(str(told[0])).name != "secateur":
        return ""
    return shlex.join(["secateur", *map(str, told[1:])])


def _removed(plan: Plan) -> str:
    units = getattr(plan.mask, "units", [])
    named = ", ".join(f"{unit.kind} {unit.layer}.{unit.index}" for unit in units[:60])
    more = f" and {len(units) - 60} more (see secateur/plan.json)" if len(units) > 60 else ""
    return (
        f"{plan.mask.summary} {plan.mask.action}. {named}{more}"
        if named
        else f"{plan.mask.summary} {plan.mask.action}."
    )


def _how(record: dict[str, Any]) -> list[str]:
    settings, versions = record.get("settings", {}), record.get("versions", {})
    told = [
        ("method", record.get("method")),
        ("seed", settings.get("seed")),
        ("suite hash", settings.get("suite_hash")),
        ("utility limit", settings.get("max_perplexity_increase")),
        ("versions", ", ".join(f"{one} {number}" for one, number in versions.items())),
    ]
    return [f"{key}: {value}" for key, value in told if value not in (None, "")]
