"""What a model writes, against a plain loop over plain logits; seeds and batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import NAMES, tiny_model
from transformers import GenerationConfig

from secateur.errors import NumericalError
from secateur.measures.generation import Request, write
from secateur.models import LanguageModel
from secateur.units import Mask

TEXTS = ("The nurse ", "Mary said:", "A much longer beginning than the others", "B", "The cook ")
NEW = 6
SPECIAL: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def contexts(model: LanguageModel) -> list[tuple[int, ...]]:
    return [tuple(model.tokenizer(text)["input_ids"]) for text in TEXTS]


@torch.no_grad()
def plainly(model: LanguageModel, context: tuple[int, ...]) -> str:
    """Greedy, one token after the other, without a cache and without a batch."""
    tokens = list(context)
    for _ in range(NEW):
        tokens.append(int(model.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == model.tokenizer.eos_token_id:
            break
    return str(model.tokenizer.decode(tokens[len(context) :], skip_special_tokens=True))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuations_are_those_of_a_plain_loop(name: str) -> None:
    model = tiny_model(name)
    asked = contexts(model)
    expected = [plainly(model, context) for context in asked]
    assert write(model, [Request(context) for context in asked], NEW) == expected
    # What is asked for twice is read once.
    assert write(model, [Request(context) for context in (asked[2], *asked, *asked)], NEW) == [
        expected[2],
        *expected,
        *expected,
    ]
    with Mask.removing(model, [0, 9, 20]).applied(model):
        expected = [plainly(model, context) for context in asked]
        assert write(model, [Request(context) for context in asked], NEW, batch_size=2) == expected


@pytest.mark.parametrize(
    "setting",
    [
        {"num_return_sequences": 2, "num_beams": 2},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["a"]},
        {"forced_eos_token_id": 257},
        {"suppress_tokens": list(range(200))},
        {"repetition_penalty": 3.0, "do_sample": True, "top_k": 3, "temperature": 0.3},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_a_checkpoint_do_not_count(setting: dict[str, Any]) -> None:
    model = tiny_model()
    model.model.generation_config = settings = GenerationConfig(**{**SPECIAL, **setting})
    asked = contexts(model)[:2] * 2
    assert write(model, [Request(context) for context in asked], NEW) == [plainly(model, context) for context in asked]
    assert model.model.generation_config is settings


def test_special_tokens_of_a_checkpoint_end_a_text() -> None:
    model = tiny_model()
    (context,) = contexts(model)[:1]
    first = int(model.model(torch.tensor([context])).logits[0, -1].argmax())
    model.model.generation_config = GenerationConfig(**{**SPECIAL, "eos_token_id": [257, first]})
    assert write(model, [Request(context)], NEW) == [model.tokenizer.decode([first])]


def test_a_sampled_text_depends_on_its_seed_alone() -> None:
    model = tiny_model()
    requests = [Request(context, seed) for seed in range(5) for context in contexts(model)]
    together = write(model, requests, NEW)
    assert write(model, requests, NEW, batch_size=3) == together
    assert [write(model, [request], NEW)[0] for request in requests] == together
    assert len(set(together[:: len(TEXTS)])) > 1
    greedy = write(model, [Request(requests[0].context), requests[0]], NEW)
    assert greedy == [plainly(model, requests[0].context), together[0]]


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = tiny_model()
    write(model, [Request((5, 6), 1)], NEW)
    assert torch.equal(torch.rand(2), expected)


def test_low_temperatures_come_close_to_greedy() -> None:
    model = tiny_model()
    asked = contexts(model)
    cold = write(model, [Request(context, seed) for seed, context in enumerate(asked)], NEW, temperature=1e-4)
    assert cold == [plainly(model, context) for context in asked]


def test_tokens_and_progress_are_counted() -> None:
    model = tiny_model()
    done: list[int] = []
    requests = [Request((5, 6, 7), seed) for seed in range(4)] + [Request((5, 6, 8))]
    write(model, requests, 1, batch_size=2, advance=done.append)
    assert model.usage.forward == 2 + 2 + 2 + 5  # three readings of two tokens, and five last tokens
    assert done == [2, 2, 1]


def test_bfloat16_models_write_too() -> None:
    model = tiny_model()
    model.model.to(torch.bfloat16)
    texts = write(model, [Request(context, 1) for context in contexts(model)], NEW)
    assert len(texts) == len(TEXTS)


def test_a_damaged_model_is_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.get_output_embeddings().weight[7] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(NumericalError, match="not finite"):
        write(model, [Request((5, 6))], NEW)


def test_noise_follows_the_softmax() -> None:
    model = tiny_model()
    runs, temperature = 4000, 1.5
    texts = write(model, [Request((70, 71), seed) for seed in range(runs)], 1, temperature=temperature)
    with torch.no_grad():
        probability = (model.model(torch.tensor([[70, 71]])).logits[0, -1] / temperature).softmax(-1)
    for token in probability[:256].topk(3).indices.tolist():
        text, expected = model.tokenizer.decode([token]), float(probability[token])
        if "\ufffd" not in text:
            assert (
                abs(np.mean([one == text for one in texts]) - expected) < 4 * (expected * (1 - expected) / runs) ** 0.5
            )
