"""The precision of fp32 products: the model's inside it, the highest in its head, the process's own elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_scoring import fit_of
from tiny import prompts, tiny_model

from secateur.scoring.attribution import Attribution
from secateur.units import Mask


@pytest.fixture
def reset() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_blocks_take_the_models_precision_and_the_head_the_highest() -> None:
    model, seen = tiny_model(), []
    model.matmul_precision = "medium"
    model.mlp_outputs[0].register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    hidden = model.hidden(prompts(model), None, None)
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == before
    head = model.model.get_output_embeddings().weight
    with model.arithmetic():
        logits = model.logits(hidden[0])
        assert torch.get_float32_matmul_precision() == "medium"
    torch.testing.assert_close(logits, hidden[0] @ head.T, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("reset")
def test_the_process_keeps_its_own_precision_after_an_error() -> None:
    model = tiny_model()
    torch.set_float32_matmul_precision("high")
    with model.arithmetic():
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError), model.arithmetic():
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "high"


def test_backward_passes_take_the_models_precision() -> None:
    fit, seen = fit_of(), []
    fit.model.matmul_precision = "medium"
    handle = fit.model.mlp_outputs[0].register_full_backward_pre_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    try:
        Attribution().score(fit, Mask.none(fit.model))
    finally:
        handle.remove()
        fit.model.matmul_precision = "highest"
    assert seen
    assert set(seen) == {"medium"}
