"""Linear layers through oneDNN: the same products and gradients, and only where they fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import prompts, tiny_model
from torch.nn.functional import linear

from secateur.models import linear as module
from secateur.models.linear import fast_linear

available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not available, reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "has_avx512", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    original = module._OneDnnLinear.apply
    monkeypatch.setattr(module._OneDnnLinear, "apply", lambda *args: (seen.append(1), original(*args))[1])
    return seen


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_linear(shape: tuple[int, ...], bias: bool, calls: list[int]) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(7, 24), torch.randn(7) if bias else None
    x = torch.randn(shape, requires_grad=True)
    expected = linear(x, weight, offset)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    with fast_linear():
        y = linear(x, weight, offset)
        (fast_gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-5, atol=1e-4)
    assert calls == [1]


def test_slices_that_are_not_contiguous_are_multiplied_right() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(24, 6).t(), torch.randn(14, 24)[::2]
    expected = linear(x, weight)
    with fast_linear():
        torch.testing.assert_close(linear(x, weight), expected, rtol=1e-5, atol=1e-5)


def test_module_with_frozen_weights_takes_the_fast_path(calls: list[int]) -> None:
    layer = torch.nn.Linear(8, 4)
    layer.requires_grad_(False)
    with fast_linear():
        layer(torch.randn(3, 8))
    assert calls == [1]
    layer(torch.randn(3, 8))
    assert calls == [1]


def test_without_avx512_output_heads_alone_take_it(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(module, "has_avx512", lambda: False)
    with fast_linear():
        linear(torch.randn(3, 8), torch.randn(63, 8))
        assert calls == []
        linear(torch.randn(3, 8), torch.randn(64, 8))
    assert calls == [1]


@pytest.mark.parametrize("onednn", [True, False])
def test_a_model_may_switch_it_off(onednn: bool, calls: list[int]) -> None:
    model = replace(tiny_model(), onednn=onednn)
    hidden = model.hidden(prompts(model), None, None)
    within = len(calls)
    assert (within > 0) is onednn
    model.logits(hidden)
    assert (len(calls) > within) is onednn


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(dtype: torch.dtype, calls: list[int]) -> None:
    with fast_linear():
        linear(torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype))
    assert calls == []


def test_weights_that_are_trained_are_left_alone(calls: list[int]) -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    with fast_linear():
        linear(torch.randn(3, 8), weight).sum().backward()
    assert calls == []
    assert weight.grad is not None


def test_nothing_changes_where_mkl_is_fast(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    with fast_linear():
        linear(torch.randn(3, 8), torch.randn(4, 8))
    assert calls == []
