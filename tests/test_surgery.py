"""Checkpoints: what plain transformers loads equals the live masked model, in every family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import NAMES, all_logits, prompts, tiny_config, tiny_model, tiny_tokenizer, tiny_transformer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.surgery import check_ablation_fits, write_checkpoint
from secateur.units import ActivationMeans, Mask, Unit, UnitSpace, masked

UNITS = (Unit("head", 0, 1), Unit("head", 1, 3), Unit("neuron", 0, 5), Unit("neuron", 0, 40), Unit("neuron", 1, 0))
HEAD, NEURON = UNITS[0], UNITS[2]
BIASED = ("llama", "llama-mqa", "llama-tied", "llama-biased", "granite", "smollm3", "falcon-multihead")
CARRIES_MEANS = tuple(n for n in NAMES if n in BIASED or n.split("-")[0] in ("gpt2", "gpt_neo", "gpt_neox", "opt"))
PLAIN_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(sys.argv[1])).logits, directory + "/logits.pt")
assert "secateur" not in sys.modules
"""


def random_means(model: LanguageModel) -> ActivationMeans:
    space, random = UnitSpace.of(model), np.random.default_rng(0)
    heads = tuple(random.normal(size=(n, space.head_dim)).astype(np.float32) for n in space.heads)
    neurons = tuple(random.normal(size=n).astype(np.float32) for n in space.neurons)
    return ActivationMeans(heads, neurons)


def masked_logits(model: LanguageModel, mask: Mask) -> Tensor:
    with masked(model, mask):
        return all_logits(model)


def reloaded(model: LanguageModel, directory: Path) -> LanguageModel:
    """The checkpoint, loaded by transformers alone, wrapped for ``all_logits`` only."""
    transformer, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected or of another shape
    return LanguageModel(transformer, model.tokenizer, "reloaded")


def assert_equivalent(model: LanguageModel, mask: Mask, directory: Path) -> LanguageModel:
    write_checkpoint(model, mask, directory)
    other = reloaded(model, directory)
    expected = masked_logits(model, mask)
    torch.testing.assert_close(all_logits(other), expected, rtol=0, atol=1e-4)
    assert float((expected - all_logits(model)).abs().max()) > 1e-2
    return other


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_equals_the_masked_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    other = assert_equivalent(model, Mask.removing(model, UNITS), tmp_path)
    assert other.model.config.model_type == model.model.config.model_type
    assert other.model.num_parameters() == model.model.num_parameters()
    assert UnitSpace.of(other) == UnitSpace.of(model)
    assert other.model.config.tie_word_embeddings == tiny_config(name).tie_word_embeddings


@pytest.mark.parametrize("name", CARRIES_MEANS)
@pytest.mark.parametrize("units", [(HEAD,), (NEURON,), UNITS], ids=["head", "neuron", "both"])
def test_mean_ablation_moves_into_the_bias(name: str, units: tuple[Unit, ...], tmp_path: Path) -> None:
    model = tiny_model(name)
    other = assert_equivalent(model, Mask.removing(model, units, random_means(model)), tmp_path)
    assert UnitSpace.of(other) == UnitSpace.of(model)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CARRIES_MEANS)))
@pytest.mark.parametrize("unit", [HEAD, NEURON], ids=["head", "neuron"])
def test_mean_ablation_is_refused_without_a_bias(name: str, unit: Unit, tmp_path: Path) -> None:
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    with pytest.raises(MaskError, match=rf"type '{name.split('-')[0]}' have no bias .* use zero ablation\."):
        write_checkpoint(model, Mask.removing(model, [unit], random_means(model)), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "granite", "smollm3"])
def test_a_switched_bias_is_zero_where_nothing_is_removed(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    write_checkpoint(model, Mask.removing(model, [HEAD], random_means(model)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    biases = {key: bool(value.any()) for key, value in weights.items() if key.endswith("bias")}
    assert {key for key, used in biases.items() if used} == {"model.layers.0.self_attn.o_proj.bias"}
    assert len(biases) == 8  # q, k, v and o of both layers; the MLP has none
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.attention_bias is True
    assert config.mlp_bias is False


@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt2-untied", "smollm3"])
def test_the_live_model_is_left_as_it_was(name: str, mean: bool, tmp_path: Path) -> None:
    model = tiny_model(name)
    before, logits = {k: v.clone() for k, v in model.model.state_dict().items()}, all_logits(model)
    config = model.model.config.to_dict()
    write_checkpoint(model, Mask.removing(model, UNITS, random_means(model) if mean else None), tmp_path)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(all_logits(model), logits)
    assert model.fingerprint == tiny_model(name).fingerprint
    changed = {key for key, value in model.model.config.to_dict().items() if config.get(key) != value}
    assert changed <= {"architectures"}  # transformers fills this one in on every save


@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
@pytest.mark.parametrize("name", ["llama-tied", "llama", "smollm3"])
def test_tied_embeddings_stay_tied(name: str, mean: bool, tmp_path: Path) -> None:
    model = tiny_model(name)
    write_checkpoint(model, Mask.removing(model, UNITS, random_means(model) if mean else None), tmp_path)
    tied = bool(model.model.config.tie_word_embeddings)
    assert tied == (name != "llama")
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
def test_tokenizer_and_generation_config_come_along(mean: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", chat=True)
    write_checkpoint(model, Mask.removing(model, UNITS, random_means(model) if mean else None), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "How  are you, Zoë?\n"}]
    expected = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True) == expected
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    generation = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert generation.temperature == 0.625
    assert generation.do_sample is True
    assert generation.eos_token_id == model.model.generation_config.eos_token_id


@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
def test_precision_is_kept(mean: bool, tmp_path: Path) -> None:
    model = LanguageModel(tiny_transformer("llama").bfloat16(), tiny_tokenizer(), "tiny")
    mask = Mask.removing(model, UNITS, random_means(model) if mean else None)
    write_checkpoint(model, mask, tmp_path)
    other = reloaded(model, tmp_path)
    assert {weight.dtype for weight in other.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(all_logits(other), masked_logits(model, mask), rtol=0, atol=0.1)


def test_an_empty_mask_writes_the_model_itself(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_checkpoint(model, Mask.removing(model, [], random_means(model)), tmp_path)
    assert secateur.load(tmp_path, device="cpu").fingerprint == model.fingerprint


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    mask = Mask.removing(tiny_model("llama", seed=1), UNITS)
    with pytest.raises(MaskError, match="another model"):
        write_checkpoint(tiny_model("llama"), mask, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_checkpoint_loads_without_secateur(tmp_path: Path) -> None:
    model = tiny_model("llama")
    masks = [Mask.removing(model, UNITS), Mask.removing(model, UNITS, random_means(model))]
    directories = [tmp_path / mask.ablation for mask in masks]
    for mask, directory in zip(masks, directories, strict=True):
        write_checkpoint(model, mask, directory)
    torch.save(prompts(model), tmp_path / "ids.pt")
    command = [sys.executable, "-c", PLAIN_LOAD, str(tmp_path / "ids.pt"), *map(str, directories)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for mask, directory in zip(masks, directories, strict=True):
        logits = torch.load(directory / "logits.pt")
        torch.testing.assert_close(logits, masked_logits(model, mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_means_are_refused_at_the_door_exactly_where_no_checkpoint_could_carry_them(name: str) -> None:
    model = tiny_model(name)
    check_ablation_fits(model, "zero")
    if name in CARRIES_MEANS:
        check_ablation_fits(model, "mean")
    else:
        with pytest.raises(MaskError, match="no bias that could carry the means of removed units; use zero ablation"):
            check_ablation_fits(model, "mean")
