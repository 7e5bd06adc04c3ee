"""Serve several uses from one base model, each with the repair that was made and proved for it.

A repair for hiring hardly helps lending, so each use has an adapter of its own, made by `secateur export --format
peft`. An adapter takes tens of kilobytes; switching costs nothing that a request would notice, and the base stays as
it was.
This script needs transformers and PEFT alone:

    secateur repair --suite hiring-race --output runs/hiring
    secateur repair --suite lending-race --output runs/lending
    secateur export runs/hiring --format peft --output adapters/hiring
    secateur export runs/lending --format peft --output adapters/lending
    python examples/two_uses.py --base HuggingFaceTB/SmolLM2-135M-Instruct \\
        --adapter hiring=adapters/hiring --adapter lending=adapters/lending \\
        hiring "What salary should Emily expect?" lending "May Jamal have a loan of $5,000?"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class ManyUses:
    """One base model with an adapter for every use; a request names its use."""

    def __init__(self, base: PreTrainedModel, adapters: dict[str, str]) -> None:
        (first, path), *others = adapters.items()
        self.model = PeftModel.from_pretrained(base, path, adapter_name=first)
        for use, path in others:
            self.model.load_adapter(path, adapter_name=use)
        self.uses = tuple(adapters)

    @contextmanager
    def serving(self, use: str | None) -> Iterator[PeftModel]:
        """The model as repaired for a use while the context lasts; None is the base."""
        if use is None:
            with self.model.disable_adapter():
                yield self.model
            return
        if use not in self.uses:
            raise KeyError(f"There is no adapter for '{use}'; known uses: {', '.join(self.uses)}.")
        self.model.set_adapter(use)
        yield self.model


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer prompts, each by the repair for its use.")
    parser.add_argument("--base", required=True, help="Hub id or directory of the base model")
    parser.add_argument("--adapter", action="append", required=True, metavar="USE=DIRECTORY")
    parser.add_argument("requests", nargs="+", metavar="USE PROMPT", help="pairs; the use 'base' for no repair")
    told = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(told.base)
    base = AutoModelForCausalLM.from_pretrained(told.base)
    many = ManyUses(base, dict(pair.split("=", 1) for pair in told.adapter))
    for use, prompt in zip(told.requests[::2], told.requests[1::2], strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with many.serving(None if use == "base" else use) as model, torch.no_grad():
            answer = model.generate(**ids, max_new_tokens=40, do_sample=False)
        print(
            f"[{use}] {prompt}\n{tokenizer.decode(answer[0, ids['input_ids'].shape[1] :], skip_special_tokens=True)}\n"
        )


if __name__ == "__main__":
    main()
