"""What a model writes: greedy continuations, and sampled ones that a seed repeats.

A sampled token is the largest of logit / temperature + Gumbel noise, which follows the softmax exactly
(the Gumbel-max trick; Maddison, Tarlow & Minka, 2014). The noise of a text comes from its own seed, so a text
depends neither on what else is in the batch nor on its size, and a model before and after a change meets the
same noise: where their texts differ, the change made them differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from secateur.models import LanguageModel
from secateur.models.linear import fast_linear
from secateur.progress import Advance


@dataclass(frozen=True)
class Request:
    """One text to write.

    Attributes
    ----------
    context: token ids that it continues.
    seed: of its noise; None for the greedy continuation.
    """

    context: tuple[int, ...]
    seed: int | None = None


@torch.no_grad()
def write(
    model: LanguageModel,
    requests: Sequence[Request],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    batch_size: int = 128,
    advance: Advance = lambda _: None,
) -> list[str]:
    """Continue every context by up to ``new_tokens`` tokens; the texts alone, in order, special tokens left out.

    Contexts of one length run together, so that nothing is padded; what continues the same context more than once is
    read once. The checkpoint's own settings for generation (penalties, top-k, forced tokens) are not used, but
    for its special tokens.

    Parameters
    ----------
    temperature: of texts with a seed. batch_size: texts in one forward pass. advance: told the texts done.

    Raises
    ------
    NumericalError: the model's output is not finite.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        by_length[len(request.context)].append(number)
    texts = [""] * len(requests)
    for numbers in by_length.values():
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            found = _continue(model, [requests[number] for number in batch], new_tokens, temperature)
            for number, text in zip(batch, found, strict=True):
                texts[number] = text
            advance(len(batch))
    return texts


def _continue(model: LanguageModel, requests: list[Request], new_tokens: int, temperature: float) -> list[str]:
    """Continuations of contexts of one length."""
    context = torch.tensor([request.context for request in requests], device=model.input_device)
    generate: Any = model.model.generate
    with model.arithmetic(), fast_linear(model.onednn), _own_settings(model, new_tokens):
        tokens = generate(
            input_ids=context,
            attention_mask=torch.ones_like(context),
            past_key_values=_read(model, context),
            logits_processor=LogitsProcessorList([_Noise(model, requests, temperature)]),
        )  # (requests, context + new)
    new = tokens[:, context.shape[1] :]
    model.usage.forward += new.numel()  # the last token of every context, and all new ones but the last
    return list(model.tokenizer.batch_decode(new, skip_special_tokens=True))


@contextmanager
def _own_settings(model: LanguageModel, new_tokens: int) -> Iterator[None]:
    """The likeliest token each time, for ``new_tokens``; of a checkpoint's settings only its special tokens count.

    What a call of ``generate`` leaves open is taken from the checkpoint, so its settings are swapped as a whole.
    """
    plain: Any = model.model
    checkpoint, tokenizer = plain.generation_config, model.tokenizer
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    plain.generation_config = GenerationConfig(
        bos_token_id=checkpoint.bos_token_id,
        eos_token_id=checkpoint.eos_token_id,
        pad_token_id=next(token for token in ends if token is not None),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    try:
        yield
    finally:
        plain.generation_config = checkpoint


def _read(model: LanguageModel, context: Tensor) -> Any:
    """Keys and values of all but the last tokens of contexts (requests, tokens), each different one computed once."""
    different, row = torch.unique(context, dim=0, return_inverse=True)
    if len(different) == len(context) or context.shape[1] == 1:
        model.usage.forward += context[:, :-1].numel()
        return None
    begun = different[:, :-1]
    model.usage.forward += begun.numel()
    output = model.model.base_model(input_ids=begun, attention_mask=torch.ones_like(begun), use_cache=True)
    output.past_key_values.batch_select_indices(row.cpu())  # from the CPU, rows of tensors on any device are taken
    return output.past_key_values


class _Noise(LogitsProcessor):
    """Logits over temperature plus Gumbel noise for the rows with a seed; the others stay as they are."""

    def __init__(self, model: LanguageModel, requests: list[Request], temperature: float) -> None:
        self.model = model
        self.seeds = [request.seed for request in requests]
        self.temperature = temperature
        self.generators: list[torch.Generator | None] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.model.check_finite(scores)
        if not self.generators:
            self.generators = [
                None if seed is None else torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds
            ]
        noisy = scores.float().clone()
        for row, generator in zip(noisy, self.generators, strict=True):
            if generator is not None:
                exponential = torch.empty_like(row).exponential_(generator=generator)
                row.div_(self.temperature).sub_(exponential.clamp_min_(torch.finfo(row.dtype).tiny).log_())
        return noisy
