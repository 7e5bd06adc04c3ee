"""Masks and gates act on exactly the units they name, in every supported family."""

from __future__ import annotations

import copy
import json
import re
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import HEADS, LAYERS, NAMES, NEURONS, all_logits, prompts, tiny_config, tiny_model, tiny_transformer
from torch import Tensor, nn
from transformers import BloomConfig, MixtralConfig, PretrainedConfig

import secateur
from secateur.errors import ModelError
from secateur.models import FAMILIES, LanguageModel
from secateur.units import ActivationMeans, Gates, Mask, Unit, UnitSpace, gated, masked

KV_HEADS = {"llama-mqa": 1, "falcon": 1, "falcon-new": 2}
WITHOUT_GQA = ("gpt2", "gpt_neo", "gpt_neox", "opt", "falcon")
UNITS = (Unit("head", 0, 2), Unit("head", 1, 0), Unit("neuron", 0, 17), Unit("neuron", 1, 47))
STEP = 2.0**-7  # exact in float32, so that finite differences lose nothing to rounding of the gate


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> LanguageModel:
    return tiny_model(name)


def projection(model: LanguageModel, unit: Unit) -> nn.Module:
    return (model.attention_outputs if unit.kind == "head" else model.mlp_outputs)[unit.layer]


def columns(model: LanguageModel, unit: Unit) -> slice:
    """Where a unit stands in the input of its projection."""
    width = model.head_dim if unit.kind == "head" else 1
    return slice(unit.index * width, (unit.index + 1) * width)


def projection_inputs(model: LanguageModel, context: AbstractContextManager[None]) -> dict[tuple[str, int], Tensor]:
    """What every output projection is given while a context lasts, by kind of unit and layer."""
    seen: dict[tuple[str, int], Tensor] = {}

    def record(key: tuple[str, int]) -> AbstractContextManager[None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[key] = args[0].detach().clone()

        stack = ExitStack()
        stack.callback(projection(model, Unit(key[0], key[1], 0)).register_forward_hook(hook).remove)  # type: ignore[arg-type]
        return stack

    with context, ExitStack() as hooks:
        for layer in range(LAYERS):
            hooks.enter_context(record(("head", layer)))
            hooks.enter_context(record(("neuron", layer)))
        all_logits(model)
    return seen


def without_columns(model: LanguageModel, units: tuple[Unit, ...]) -> LanguageModel:
    """A copy with the units' weights zeroed by hand."""
    other = LanguageModel(copy.deepcopy(model.model), model.tokenizer, "by hand")
    for unit in units:
        weight: Tensor = projection(other, unit).weight.data  # type: ignore[union-attr, assignment]
        if model.family.transposed:
            weight[columns(model, unit), :] = 0
        else:
            weight[:, columns(model, unit)] = 0
    return other


def random_means(space: UnitSpace, seed: int = 0) -> ActivationMeans:
    random = np.random.default_rng(seed)
    heads = tuple(random.normal(size=(n, space.head_dim)).astype(np.float32) for n in space.heads)
    neurons = tuple(random.normal(size=n).astype(np.float32) for n in space.neurons)
    return ActivationMeans(heads, neurons)


def hook_count(model: LanguageModel) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.model.modules())


def test_every_family_has_a_tiny_model() -> None:
    assert {name.split("-")[0] for name in NAMES} == set(FAMILIES)


def test_unit_counts(name: str, model: LanguageModel) -> None:
    space = UnitSpace.of(model)
    kv = KV_HEADS.get(name, 4 if name.split("-")[0] in WITHOUT_GQA else 2)
    assert space.heads == (HEADS,) * LAYERS
    assert space.kv_heads == (kv,) * LAYERS
    assert space.neurons == (NEURONS,) * LAYERS
    assert space.head_dim == (getattr(tiny_config(name), "head_dim", None) or 8)
    assert len(space) == LAYERS * (HEADS + NEURONS)


def test_input_projections_exist(model: LanguageModel) -> None:
    for block in model.blocks:
        for path in (*model.family.attention_in, *model.family.mlp_in):
            assert model.model.config.hidden_size in block.get_submodule(path).weight.shape  # type: ignore[operator]


def test_hidden_and_head_give_the_models_logits(model: LanguageModel) -> None:
    ids = prompts(model)
    hidden = model.hidden(ids, None, None)
    torch.testing.assert_close(model.logits(hidden), all_logits(model), rtol=0, atol=1e-5)
    assert model.usage.forward == ids.numel()


def test_removing_nothing_changes_nothing(model: LanguageModel) -> None:
    before = all_logits(model)
    with masked(model, Mask.none(model)):
        assert torch.equal(all_logits(model), before)
    with masked(model, None):
        assert torch.equal(all_logits(model), before)
    with gated(model, Gates.ones(model)):
        assert torch.equal(all_logits(model), before)


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_removing_one_unit_zeroes_only_its_slice(model: LanguageModel, unit: Unit) -> None:
    before = projection_inputs(model, nullcontext())
    after = projection_inputs(model, masked(model, Mask.removing(model, [unit])))
    key, where = (unit.kind, unit.layer), columns(model, unit)
    assert bool((after[key][..., where] == 0).all())
    assert bool((before[key][..., where] != 0).any())
    others = torch.ones(before[key].shape[-1], dtype=torch.bool)
    others[where] = False
    assert torch.equal(after[key][..., others], before[key][..., others])
    for layer in range(unit.layer):
        assert torch.equal(after["head", layer], before["head", layer])
        assert torch.equal(after["neuron", layer], before["neuron", layer])


@pytest.mark.parametrize("units", [*((unit,) for unit in UNITS), UNITS], ids=len)
def test_mask_equals_zeroed_weights(model: LanguageModel, units: tuple[Unit, ...]) -> None:
    before, expected = all_logits(model), all_logits(without_columns(model, units))
    with masked(model, Mask.removing(model, units)):
        torch.testing.assert_close(all_logits(model), expected, rtol=0, atol=1e-5)
    assert float((expected - before).abs().max()) > 1e-3


@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
def test_nested_masks_compose(model: LanguageModel, mean: bool) -> None:
    means = random_means(UnitSpace.of(model)) if mean else None
    one = Mask.removing(model, UNITS[:3], means)
    other = Mask.removing(model, [*UNITS[2:], Unit("head", 0, 3)], means)
    with masked(model, one & other):
        both = all_logits(model)
    with masked(model, one), masked(model, other):
        torch.testing.assert_close(all_logits(model), both, rtol=0, atol=1e-6)
    with masked(model, one):
        assert not torch.allclose(all_logits(model), both, atol=1e-3)


def test_model_is_restored_after_an_exception(model: LanguageModel) -> None:
    before, hooks = all_logits(model), hook_count(model)

    def fail() -> None:
        with masked(model, Mask.removing(model, UNITS)), gated(model, Gates.ones(model)):
            assert hook_count(model) > hooks
            assert not torch.equal(all_logits(model), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(all_logits(model), before)
    assert hook_count(model) == hooks


def test_mean_ablation_puts_the_mean_in_place(model: LanguageModel) -> None:
    means = random_means(UnitSpace.of(model))
    before = projection_inputs(model, nullcontext())
    after = projection_inputs(model, masked(model, Mask.removing(model, [UNITS[0], UNITS[3]], means)))
    head = after["head", 0][..., columns(model, UNITS[0])]
    neuron = after["neuron", 1][..., UNITS[3].index]
    torch.testing.assert_close(head, torch.from_numpy(means.heads[0][UNITS[0].index]).expand_as(head))
    torch.testing.assert_close(neuron, torch.full_like(neuron, float(means.neurons[1][UNITS[3].index])))
    rest = slice(0, columns(model, UNITS[0]).start)
    assert torch.equal(after["head", 0][..., rest], before["head", 0][..., rest])


def direction(model: LanguageModel) -> Tensor:
    """Fixed weights that turn the logits into one number per prompt and position."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*prompts(model).shape, model.model.config.vocab_size, generator=generator)


def gated_value(model: LanguageModel, gates: Gates) -> Tensor:
    """One number for each prompt, (2,), in float64; differentiable with respect to the gates."""
    with gated(model, gates):
        logits = model.model(input_ids=prompts(model), use_cache=False).logits
    return (logits.double() * direction(model)).sum(dim=(1, 2))


def finite_difference(model: LanguageModel, unit: Unit) -> float:
    values = []
    for step in (STEP, -STEP):
        gates = Gates.ones(model)
        kind = gates.heads if unit.kind == "head" else gates.neurons
        with torch.no_grad():
            kind[unit.layer][unit.index] += step  # type: ignore[index]
            values.append(float(gated_value(model, gates).sum()))
    return (values[0] - values[1]) / (2 * STEP)


def test_gate_gradients_equal_finite_differences(model: LanguageModel) -> None:
    model.model.double()
    gates = Gates.ones(model)
    gated_value(model, gates).sum().backward()
    flat = torch.cat([leaf.grad for leaf in gates.leaves() if leaf.grad is not None])
    space = UnitSpace.of(model)
    assert len(flat) == len(space)
    for unit in UNITS:
        expected = finite_difference(model, unit)
        assert abs(expected) > 1e-2
        assert float(flat[space.flat(unit)]) == pytest.approx(expected, rel=1e-4, abs=4e-3)


def test_gates_of_rows_and_of_positions(model: LanguageModel) -> None:
    rows, positions = prompts(model).shape
    shared, by_row, by_position = Gates.ones(model), Gates.ones(model, (rows, 1)), Gates.ones(model, (rows, positions))
    for gates in (shared, by_row, by_position):
        gated_value(model, gates).sum().backward()
    for one, row, position in zip(shared.leaves(), by_row.leaves(), by_position.leaves(), strict=True):
        assert one.grad is not None
        assert row.grad is not None
        assert position.grad is not None
        torch.testing.assert_close(row.grad.sum((0, 1)), one.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(position.grad.sum((0, 1)), one.grad, rtol=1e-3, atol=1e-3)


def test_gates_of_one_row_leave_the_other_alone(model: LanguageModel) -> None:
    before = all_logits(model)
    gates = Gates.ones(model, (2, 1))
    with torch.no_grad():
        for leaf in gates.leaves():
            leaf[0] = 0
    with gated(model, gates):
        after = all_logits(model)
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0], atol=1e-2)


@pytest.mark.parametrize("config", [MixtralConfig(), BloomConfig()], ids=["mixtral", "bloom"])
def test_load_refuses_other_types(config: PretrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as refusal:
        secateur.load(tmp_path)
    message = str(refusal.value)
    assert f"'{config.model_type}'" in message
    assert set(FAMILIES) <= set(re.findall(r"\w+", message))


def test_gemma3_is_pointed_to_its_text_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(ModelError, match="text-only checkpoint"):
        secateur.load(tmp_path)


def test_a_language_model_of_another_type_is_refused() -> None:
    transformer = tiny_transformer("llama")
    transformer.config.model_type = "mixtral"
    with pytest.raises(ModelError, match="'mixtral' are not supported"):
        LanguageModel(transformer, tiny_model().tokenizer, "other")


def test_load_reads_a_directory(name: str, model: LanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = secateur.load(tmp_path, device="cpu")
    assert torch.equal(all_logits(loaded), all_logits(model))
    assert loaded.fingerprint == model.fingerprint
    assert loaded.source == str(tmp_path)
    text = "<s>Mary  said: é</s>\n"
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)


def test_what_a_model_is_loaded_with_holds_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    loaded = secateur.load("some/model", device="cpu")
    assert loaded.source == "some/model"
    monkeypatch.chdir("/")
    assert secateur.load(**loaded.loaded_with or {}).fingerprint == loaded.fingerprint
