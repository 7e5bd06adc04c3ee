"""Units turned down: equal to scaled weights, kept exactly, leaving as an adapter that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.numpy import save_file
from test_scoring import fit_of, means_of, model_of
from tiny import NAMES

import secateur
from secateur.attenuation import Attenuation
from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.surgery import write_adapter, write_checkpoint
from secateur.units import Mask, UnitSpace
from secateur.weights import WeightMask, linear_layers, load_mask

TOKENS = torch.arange(12)[None] + 40


def attenuation_of(model: LanguageModel, seed: int = 0) -> Attenuation:
    rng, space = np.random.default_rng(seed), UnitSpace.of(model)
    gates = np.where(rng.random(len(space)) < 0.3, rng.random(len(space)), 1.0)
    return Attenuation(space, gates, model.fingerprint)


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    return model.logits(model.hidden(TOKENS, None, None)[0])


@pytest.mark.parametrize("name", NAMES)
def test_gates_of_0_and_1_are_a_mask(name: str) -> None:
    fit = fit_of(name)
    mask = Mask.removing(fit.model, range(0, len(UnitSpace.of(fit.model)), 3))
    gates = Attenuation(mask.space, mask.keep.astype(float), mask.fingerprint)
    found, expected = fit.evaluate(gates, utility=True), fit.evaluate(mask, utility=True)
    np.testing.assert_allclose(found.table.y, expected.table.y, atol=1e-6)
    assert (gates.heads_removed, gates.neurons_removed) == (mask.heads_removed, mask.neurons_removed)
    assert [str(unit) for unit in gates.units] == [str(unit) for unit in mask.units]


@pytest.mark.parametrize("name", NAMES)
def test_turning_down_is_scaling_the_columns_of_the_output_projections(name: str) -> None:
    model = model_of(name)
    gates = attenuation_of(model)
    with gates.applied(model):
        found = logits(model)
    space, kept = gates.space, []
    for layer in range(space.n_layers):
        for module, scale in (
            (model.attention_outputs[layer], np.repeat(gates.gates[space.head_slice(layer)], space.head_dim)),
            (model.mlp_outputs[layer], gates.gates[space.neuron_slice(layer)]),
        ):
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            kept.append((weight, weight.clone()))
            columns = torch.from_numpy(scale.copy())
            weight.mul_(columns[:, None] if model.family.transposed else columns)
    try:
        expected = logits(model)
    finally:
        for weight, before in kept:
            weight.copy_(before)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, logits(model), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_peft_equals_the_live_model_and_leaves_the_base_as_it_was(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    for number, mask in enumerate((attenuation_of(model), Mask.removing(model, [0, 5, 30, 31, 90]))):
        before = logits(model)
        with mask.applied(model):
            expected = logits(model)
        write_adapter(model, mask, tmp_path / str(number))
        adapted = PeftModel.from_pretrained(model.model, tmp_path / str(number))
        try:
            with torch.no_grad():
                found = adapted(input_ids=TOKENS).logits[0]
        finally:
            adapted.unload()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(model), before)


def test_an_adapter_names_only_what_it_changes_and_is_small(tmp_path: Path) -> None:
    model = model_of("llama")
    write_adapter(model, Mask.removing(model, [0]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == config["feedforward_modules"] == ["model.layers.0.self_attn.o_proj"]
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1000


def test_what_an_adapter_cannot_carry_is_refused_with_nothing_written(tmp_path: Path) -> None:
    model = model_of("llama")
    name, module = next(iter(linear_layers(model).items()))
    off = np.zeros(tuple(module.weight.shape), dtype=bool)  # type: ignore[arg-type]
    off[0, 0] = True
    target = tmp_path / "adapter"
    with pytest.raises(MaskError, match="write a checkpoint"):
        write_adapter(model, WeightMask.removing(model, {name: off}), target)
    with pytest.raises(MaskError, match="zero ablation"):
        write_adapter(model, Mask.removing(model, [0], means_of("llama")), target)
    with pytest.raises(MaskError, match="another model"):
        write_adapter(model_of("gpt2"), attenuation_of(model), target)
    assert not target.exists()


def test_a_checkpoint_of_units_that_are_turned_down_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    with pytest.raises(MaskError, match="leave as an adapter"):
        write_checkpoint(model, attenuation_of(model), tmp_path / "checkpoint")


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_a_file_gives_the_same_gates_back(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    gates = attenuation_of(model_of("llama"), seed)
    folder = tmp_path_factory.mktemp("gates")
    gates.save(folder / "one")
    Attenuation.load(folder / "one").save(folder / "two")
    again = load_mask(folder / "two")
    assert isinstance(again, Attenuation)
    assert again == gates
    assert hash(again) == hash(gates)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "garbage", "other", "range", "short"])
def test_a_file_that_is_no_attenuation_is_refused(damage: str, tmp_path: Path) -> None:
    model, path = model_of("llama"), tmp_path / "gates"
    if damage == "garbage":
        path.write_bytes(b"\0" * 100)
    elif damage == "other":
        Mask.removing(model, [1]).save(path)
    elif damage in ("range", "short"):
        attenuation_of(model).save(path)
        from safetensors import safe_open

        with safe_open(str(path), framework="numpy") as file:
            header, gates = file.metadata(), file.get_tensor("gates")
        save_file({"gates": gates[1:] if damage == "short" else gates + 1}, str(path), metadata=header)
    with pytest.raises(MaskError):
        Attenuation.load(path)


def test_random_gates_are_the_same_on_other_units() -> None:
    gates = attenuation_of(model_of("llama"))
    drawn = gates.random_like(np.random.default_rng(0))
    heads = gates.space.n_heads
    assert drawn != gates
    for part in (slice(0, heads), slice(heads, None)):
        np.testing.assert_array_equal(np.sort(drawn.gates[part]), np.sort(gates.gates[part]))


def test_the_python_api_loads_a_plan_with_gates(tmp_path: Path) -> None:
    model = model_of("llama")
    gates = attenuation_of(model)
    secateur.Plan(gates, {"suite": "x"}).save(tmp_path)
    plan = secateur.load_plan(tmp_path)
    assert plan.mask == gates
    assert plan.record == {"suite": "x"}
    assert len(json.loads((tmp_path / "plan.json").read_text())["gates"]) == len(gates.changed)
    written = secateur.apply(model, plan, tmp_path / "applied")
    names = {path.name for path in written.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "secateur"}
