"""Count what one evaluation of a mask costs on models of any size, without loading them.

Run with ``python benchmarks/scaling.py [--suite NAME] [--tflops N] [--efficiency E]``. The prompts of the suite's
select part and its neutral text are packed as the engine packs them, with the default model's tokenizer; the model
runs on PyTorch's "meta" device, which has shapes and no numbers, while the floating-point operations of every product
are counted. ``--tflops`` is the peak of a device and ``--efficiency`` the share of it that is reached (measure yours
with ``benchmarks/engine.py``). ``--vocabulary`` is the models', which what the output head takes grows with.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

import secateur
from secateur.evaluation import Evaluator
from secateur.evaluation.memory import KL_COPIES, Shape
from secateur.measures.answers import Batch, pack
from secateur.measures.prompts import build_prompts
from secateur.measures.splits import split
from secateur.measures.utility import read_passages, split_text

MODELS: dict[str, dict[str, Any]] = {
    "7B (32 layers, 4,096 wide)": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "70B (80 layers, 8,192 wide)": {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def without_numbers(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model that has shapes and no numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@torch.no_grad()
def operations(model: Any, engine: Evaluator) -> int:
    """Floating-point operations of one mask: prompts, text, and the output head where it is read.

    Parameters
    ----------
    model: without numbers.
    """
    body, head = model.base_model, model.get_output_embeddings()
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    with FlopCounterMode(display=False) as counter:
        for batch in engine.batches:
            layout = batch.layout
            body(
                input_ids=(layout.input_ids % vocabulary).to("meta"),
                position_ids=layout.position_ids.to("meta"),
                attention_mask=layout.attention_mask.to("meta", model.dtype),
                use_cache=False,
            )
            head(torch.empty(len(batch.nodes), width, device="meta", dtype=model.dtype))
        assert engine.text is not None
        for numbers in engine.text.batches():
            shape = (len(numbers), len(engine.text.windows[numbers[0]].tokens))
            body(
                input_ids=torch.empty(shape, dtype=torch.long, device="meta"),
                position_ids=torch.empty(shape, dtype=torch.long, device="meta"),
                attention_mask=torch.empty(shape[0], 1, shape[1], shape[1], device="meta", dtype=model.dtype),
                use_cache=False,
            )
            head(
                torch.empty(
                    sum(engine.text.windows[n].scored for n in numbers), width, device="meta", dtype=model.dtype
                )
            )
    return int(counter.get_total_flops())


def largest(batches: list[Batch]) -> tuple[int, int]:
    """The most tokens, and the most of them that are read, of any pass."""
    return max(batch.tokens for batch in batches), max(len(batch.nodes) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--tflops", type=float, default=989.0, help="peak of one device, dense bf16")
    parser.add_argument("--efficiency", type=float, default=0.3)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    options = parser.parse_args()
    small = secateur.load()
    suite = secateur.load_suite(options.suite)
    prompts = build_prompts(small, suite, split(suite).select)
    engine = Evaluator(small, prompts, split_text(small, read_passages())["select"])
    assert engine.text is not None
    asked = sum(batch.tokens for batch in engine.batches)
    read = sum(len(window.tokens) for window in engine.text.windows)
    print(f"{suite.name}, select: {len(prompts)} prompts in {asked:,} tokens, {read:,} tokens of text")
    tokens, reads = largest(engine.batches)
    scored = int(engine.text.scored.max())
    padded = largest(pack(small, prompts, share_prefixes=False))
    print(
        f"A pass: at most {tokens:,} tokens, {reads:,} of them read ({padded[0]:,} and {padded[1]:,} as padded rows); "
        f"a window of text: {scored} read"
    )
    for name, sizes in MODELS.items():
        shape = Shape(sizes["hidden_size"], sizes["intermediate_size"], options.vocabulary, itemsize=2)
        model = without_numbers(LlamaConfig(**sizes, vocab_size=options.vocabulary))
        weights = sum(parameter.numel() for parameter in model.parameters())
        work = operations(model, engine)
        rate = options.tflops * 1e12 * options.efficiency / work
        kept = (asked + read) * shape.width * shape.itemsize
        print(
            f"{name}: {weights / 1e9:.1f} billion weights, {2 * weights / 1e9:.0f} GB in bf16; "
            f"{work / 1e12:.1f} TFLOP a mask ({work / (asked + read) / 1e9:.1f} GFLOP a token); "
            f"{rate:.2f} masks/s at {options.efficiency:.0%} of {options.tflops:g} TFLOP/s; "
            f"{kept / 1e6:.0f} MB for each layer whose entry is kept"
        )
        activations = [f"{shape.activations(most) / 1e6:,.0f} MB" for most in (tokens, padded[0])]
        logits = [f"{one / 1e6:,.0f} MB" for one in (shape.logits(reads), shape.logits(scored, KL_COPIES))]
        print(
            f"  a pass: activations {activations[0]} (padded rows: {activations[1]}), output head in fp32 "
            f"{shape.head_copy / 1e6:,.0f} MB, logits of prompts {logits[0]}, KL on a window of text {logits[1]}"
        )


if __name__ == "__main__":
    main()
