"""Print masks per second of the evaluation engine against the naive way, and what each technique is worth.

Run with ``python benchmarks/engine.py [--model NAME] [--suite NAME] [--masks N] [--walk N] [--naive N] [--brief]``, on
the select part of the suite and its neutral text. The naive way is what plain transformers code does: every prompt a
padded row, all logits, one whole pass per mask, and probabilities only where they are read. All ratios are measured in
one run; every technique is then switched off alone. Where the processor multiplies bfloat16 in hardware, the products
of fp32 matrices are also taken in it. Peak memory is read before the naive way, which takes more, has begun.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scaling import operations, without_numbers
from torch.nn.functional import linear

import secateur
from secateur.evaluation import Evaluator
from secateur.evaluation.racing import Race
from secateur.evaluation.walk import walking_order
from secateur.measures.answers import MEASURES
from secateur.measures.prompts import PromptSet, build_prompts
from secateur.measures.splits import split
from secateur.measures.utility import NeutralText, read_passages, split_text
from secateur.models.linear import fast_linear, onednn_is_faster
from secateur.scoring.attribution import disparity
from secateur.studies.record import peak_memory_bytes
from secateur.units import Mask, UnitSpace

ROWS = 64
KEPT = 1 << 30
AT_ONCE = 4
RANDOM_HEADS = 5
FEW = 4  # masks where all cost the same


# The naive way, in plain transformers.


@torch.no_grad()
def naive(model: secateur.LanguageModel, prompts: PromptSet, text: NeutralText, mask: Mask) -> tuple[np.ndarray, float]:
    """y of every prompt and log-perplexity: one whole pass, padded rows, all logits."""
    rows = sorted({(*prompt.context, *answer[:-1]) for prompt in prompts.prompts for answer in prompt.answers}, key=len)
    wanted: dict[tuple[int, ...], list[tuple[int, int, tuple[int, ...]]]] = {}
    for number, prompt in enumerate(prompts.prompts):
        for which, answer in enumerate(prompt.answers):
            wanted.setdefault((*prompt.context, *answer[:-1]), []).append((number, which, answer))
    found: list[dict[int, torch.Tensor]] = [{} for _ in prompts.prompts]
    with mask.applied(model):
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            width = max(map(len, part))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in part])
            there = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
            logits = model.model(input_ids=ids, attention_mask=there, use_cache=False).logits
            for row, of_row in zip(part, logits, strict=True):
                for number, which, answer in wanted[row]:
                    read = of_row[len(row) - len(answer) : len(row)].log_softmax(-1)
                    found[number][which] = read[torch.arange(len(answer)), torch.tensor(answer)].sum()
        loss = 0.0
        for numbers in text.batches():
            ids = torch.stack([text.windows[n].tokens for n in numbers])
            logits = model.model(input_ids=ids, use_cache=False).logits
            for number, one in zip(numbers, logits, strict=True):
                window = text.windows[number]
                targets = window.tokens[window.start :]
                read = one[window.start - 1 : len(window.tokens) - 1].log_softmax(-1)
                loss -= float(read[torch.arange(len(targets)), targets].sum())
    y = []
    for prompt, answers in zip(prompts.prompts, found, strict=True):
        measure: Any = prompts.suite.scenarios[prompt.scenario].measure
        values = torch.stack([answers[which] for which in range(len(prompt.answers))])
        y.append(float(MEASURES[type(measure)](measure, values[None])[0]))
    return np.array(y), loss / float(text.scored.sum())


# The masks.


def walk(model: secateur.LanguageModel, length: int, rng: np.random.Generator) -> list[Mask]:
    """A walk that flips one head at a time."""
    keep, heads = np.ones(len(UnitSpace.of(model)), dtype=bool), UnitSpace.of(model).n_heads
    masks = []
    for _ in range(length):
        keep[rng.integers(heads)] ^= True
        masks.append(Mask(UnitSpace.of(model), keep.copy(), model.fingerprint))
    return masks


def unrelated(model: secateur.LanguageModel, count: int, rng: np.random.Generator) -> list[Mask]:
    """Random masks of a few heads each."""
    heads = UnitSpace.of(model).n_heads
    return [Mask.removing(model, rng.choice(heads, size=RANDOM_HEADS, replace=False)) for _ in range(count)]


@dataclass(eq=False)
class Bench:
    """One model on one part of a suite, and what the naive way found there.

    Attributes
    ----------
    known: y and log-perplexity of masks that were measured naively. slow: masks per second of that.
    """

    model: secateur.LanguageModel
    prompts: PromptSet
    text: NeutralText
    known: list[tuple[Mask, np.ndarray, float]] = field(default_factory=list)
    slow: float = 0.0

    @classmethod
    def load(cls, suite: str, **options: Any) -> Bench:
        model, asked = secateur.load(**options), secateur.load_suite(suite)
        prompts = build_prompts(model, asked, split(asked).select)
        return cls(model, prompts, split_text(model, read_passages())["select"])

    def engine(self, onednn: bool = True, **options: Any) -> Evaluator:
        return Evaluator(replace(self.model, onednn=onednn), self.prompts, self.text, **options)

    def measure_naively(self, masks: Sequence[Mask]) -> None:
        """Measure masks after a first one that is not timed."""
        naive(self.model, self.prompts, self.text, masks[0])
        start = time.perf_counter()
        for mask in masks:
            self.known.append((mask, *naive(self.model, self.prompts, self.text, mask)))
        self.slow = len(masks) / (time.perf_counter() - start)
        print(f"{'naive':<34} {self.slow:7.4f} masks/s")

    def report(self, name: str, masks: Sequence[Mask], **options: Any) -> float:
        """Masks per second, after a first pass that fills what is kept; printed."""
        engine = self.engine(**options)
        if engine.keep_bytes:
            engine.evaluate(None, utility=True)
        else:
            len(engine.batches)
        start = time.perf_counter()
        list(engine.evaluate_each(masks, utility=True))
        fast = len(masks) / (time.perf_counter() - start)
        told = "" if not self.slow else f"   {fast / self.slow:5.2f} x naive"
        differences = [
            max(float(np.abs(engine.y(mask) - y).max()), abs(engine.evaluate(mask, utility=True).log_perplexity - loss))
            for mask, y, loss in self.known
            if mask in masks
        ]
        told += f"   largest difference {max(differences):.1e}" if differences else ""
        print(f"{name:<34} {fast:7.4f} masks/s{told}", flush=True)
        return fast


def memory(bench: Bench, walked: Sequence[Mask], random: Sequence[Mask]) -> None:
    """Print the peak so far of this process, which has measured by the engine alone."""
    list(bench.engine(keep_bytes=KEPT).evaluate_each(walked[:2], utility=True))
    print(f"peak memory of the engine, restarts kept {peak_memory_bytes() / 1e9:.2f} GB")
    list(bench.engine(masks_at_once=AT_ONCE).evaluate_each(random[:AT_ONCE], utility=True))
    print(f"peak memory with several masks in one pass ({AT_ONCE}) {peak_memory_bytes() / 1e9:.2f} GB")


def unrelated_masks(bench: Bench, masks: Sequence[Mask]) -> float:
    """Masks per second without restarts."""
    print(f"\nunrelated random masks of {RANDOM_HEADS} heads")
    whole = bench.report("engine", [masks[number] for number in walking_order(masks)], keep_bytes=KEPT)
    plain = bench.report("  without restarts", masks[:FEW])
    print(f"    order and restarts: {whole / plain:.2f} x")
    bench.report(f"  with several masks in one pass ({AT_ONCE})", masks, masks_at_once=AT_ONCE)
    if not onednn_is_faster():
        print("    oneDNN: not used on this processor")
    switches = {"shared prefixes": "share_prefixes", "head where read": "logits_where_read", "oneDNN": "onednn"}
    for name, switch in switches.items():
        without = bench.report(f"  without restarts and {name}", masks[:FEW], **{switch: False})
        print(f"    {name}: {plain / without:.2f} x")
    return plain


def walked_masks(bench: Bench, masks: Sequence[Mask]) -> None:
    print("\na walk that flips one head at a time")
    walked = bench.report("engine", masks, keep_bytes=KEPT)
    print(f"    restarts: {walked / bench.report('  without restarts', masks[-FEW:]):.2f} x")


def racing(bench: Bench, masks: Sequence[Mask], seed: int) -> None:
    print("\nracing: the better quarter on a slice goes on to the whole")
    race, engine = Race.on(bench.engine(), seed), bench.engine()
    race.first.evaluate(None, utility=True)
    start = time.perf_counter()
    won = race.winners(masks, len(masks) // 4, lambda found: [disparity(found.table)])
    for number in won:
        engine.evaluate(masks[number], utility=True)
    raced = time.perf_counter() - start
    start = time.perf_counter()
    biases = np.array([disparity(engine.evaluate(mask, utility=True).table) for mask in masks])
    whole = (time.perf_counter() - start) * len(masks) / (len(masks) - len(won))
    best = set(np.argsort(biases)[: len(won)].tolist())
    print(f"{len(masks)} masks in {raced:.1f} s instead of {whole:.1f} s: {whole / raced:.2f} x")
    print(f"slice: {race.share:.0%} of the tokens; of the {len(won)} least biased it kept {len(best & set(won))}; ")
    print(f"the least biased of all {'is' if int(biases.argmin()) in won else 'is not'} among them")


def ceiling(shape: tuple[int, int, int], repeats: int = 20) -> float:
    """Floating-point operations per second of a product of fp32 matrices, by the fastest way that the engine uses."""
    a, weight = torch.randn(shape[0], shape[1]), torch.randn(shape[2], shape[1])
    with fast_linear(), torch.no_grad():
        _ = linear(a, weight)
        start = time.perf_counter()
        for _ in range(repeats):
            _ = linear(a, weight)
    return 2 * float(np.prod(shape)) * repeats / (time.perf_counter() - start)


def share_of_ceiling(bench: Bench, masks_per_second: float) -> None:
    """Of whole passes, without restarts."""
    print("\nshare of the matrix-product ceiling, whole passes")
    config = bench.model.model.config
    work = operations(without_numbers(config, torch.float32), bench.engine())
    reached = work * masks_per_second
    print(f"{work / 1e9:.0f} GFLOP a mask, {reached / 1e9:.0f} GFLOP/s")
    for shape in ((1024, 1024, 1024), (768, config.hidden_size, config.intermediate_size)):
        top = ceiling(shape)
        print(f"{reached / top:.0%} of {top / 1e9:.0f} GFLOP/s (a product of {' x '.join(map(str, shape))})")


def in_bfloat16(suite: str, model: str | None, masks: Sequence[Mask], engine: Evaluator, whole: float) -> None:
    print("\nproducts in bfloat16, output head in fp32")
    if not torch.cpu._is_amx_tile_supported():
        print("this processor has no AMX; not tried")
        return
    quick = Bench.load(suite, source=model, matmul_precision="medium")
    fast, used = quick.report("engine", masks), quick.engine()
    off = max(float(np.abs(used.y(mask) - engine.y(mask)).max()) for mask in masks[:2])
    print(f"{fast / whole:.2f} x fp32, largest difference of y {off:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a name or directory instead of the default model")
    parser.add_argument("--suite", default="occupations")
    parser.add_argument("--masks", type=int, default=8)
    parser.add_argument("--walk", type=int, default=24, help="steps; many, as each begins at a layer of its own")
    parser.add_argument("--naive", type=int, default=2, help="random masks measured naively; one of the walk is, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--brief", action="store_true", help="the engine against the naive way alone")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    bench = Bench.load(options.suite, source=options.model)
    model, engine = bench.model, bench.engine()
    steps, random = walk(model, options.walk, rng), unrelated(model, options.masks, rng)
    rows = {(*prompt.context, *answer[:-1]) for prompt in bench.prompts.prompts for answer in prompt.answers}
    print(
        f"{torch.get_num_threads()} threads, {model.dtype}; {len(bench.prompts)} prompts in "
        f"{sum(batch.tokens for batch in engine.batches):,} tokens ({sum(map(len, rows)):,} as rows without padding), "
        f"{sum(len(window.tokens) for window in bench.text.windows):,} of text"
    )
    memory(bench, steps, random)
    bench.measure_naively([*random[: options.naive], steps[-1]])
    if options.brief:
        bench.report("engine, unrelated random masks", random)
        bench.report("engine, a walk of single flips", steps, keep_bytes=KEPT)
        return
    plain = unrelated_masks(bench, random)
    walked_masks(bench, steps)
    racing(bench, unrelated(model, 2 * options.masks, rng), options.seed)
    share_of_ceiling(bench, plain)
    in_bfloat16(options.suite, options.model, random, engine, plain)


if __name__ == "__main__":
    main()
