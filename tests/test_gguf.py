"""GGUF files: what they hold, and, where llama-cpp-python is installed, that llama.cpp finds the masked model there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_export import some_mask
from tiny import tiny_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import secateur
from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.surgery import check_export, write_gguf
from secateur.surgery.gguf import FILE
from secateur.surgery.vocabulary import splitting_rule
from secateur.units import ActivationMeans, Mask, UnitSpace, masked

PROMPTS = np.random.default_rng(5).integers(0, 250, size=(50, 9)).tolist()
CONTINUED = 12
WITHOUT_SECATEUR = """
import sys
sys.modules["secateur"] = None
import json, numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, logits_all=True, verbose=False, n_threads=2)
log_probabilities, texts = [], []
for number, tokens in enumerate(json.load(open(sys.argv[2]))):
    model.reset()
    model.eval(tokens)
    logits = np.array(model.scores[len(tokens) - 1], dtype=np.float64)
    log_probabilities.append((logits - np.logaddexp.reduce(logits)).tolist())
    if number < 10:
        model.reset()
        made = model.generate(tokens, temp=0.0, repeat_penalty=1.0)
        texts.append([next(made) for _ in range(int(sys.argv[4]))])
json.dump({"log_probabilities": log_probabilities, "texts": texts}, open(sys.argv[3], "w"))
"""


def a_model(name: str = "llama") -> LanguageModel:
    """A tiny model whose tokenizer merges something, as every BPE tokenizer in a GGUF file must."""
    model = tiny_model(name)
    parts = json.loads(model.tokenizer.backend_tokenizer.to_str())
    parts["model"]["vocab"]["th"] = len(parts["model"]["vocab"])
    parts["model"]["merges"] = [["t", "h"]]
    parts["added_tokens"], parts["post_processor"] = [], None  # special tokens follow after the vocabulary
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return LanguageModel(model.model, merging, model.source)


def read(directory: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(directory / FILE)


def field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


@torch.no_grad()
def expected(model: LanguageModel, mask: Mask, prompts: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
    """Next-token log-probabilities of all prompts, and greedy continuations of the first ten, of the masked model."""
    with masked(model, mask):
        rows, texts = [], []
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            rows.append(model.model(input_ids=ids).logits[0, -1].double().log_softmax(-1).numpy())
            if number < 10:
                for _ in range(CONTINUED):
                    ids = torch.cat([ids, model.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                texts.append(ids[0, len(prompt) :].tolist())
    return np.stack(rows), texts


def by_llama_cpp(directory: Path, prompts: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
    (directory / "prompts.json").write_text(json.dumps(prompts))
    told = [directory / FILE, directory / "prompts.json", directory / "found.json", CONTINUED]
    command = [sys.executable, "-c", WITHOUT_SECATEUR, *map(str, told)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads((directory / "found.json").read_text())
    return np.array(found["log_probabilities"]), found["texts"]


@torch.no_grad()
def assert_near_ties(model: LanguageModel, mask: Mask, texts: list[list[int]], written: list[list[int]]) -> None:
    """Greedy texts are equal, but for a step in which f16 may tip the scales: random weights give many near ties."""
    for prompt, text, other in zip(PROMPTS, texts, written, strict=False):
        same = next((i for i, (one, two) in enumerate(zip(text, other, strict=True)) if one != two), None)
        if same is not None:
            with masked(model, mask):
                logits = model.model(input_ids=torch.tensor([prompt + text[:same]])).logits[0, -1]
            assert float(logits[text[same]] - logits[other[same]]) < 0.02


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """Mean KL of next-token distributions in nats."""
    return float((np.exp(one) * (one - other)).sum(axis=1).mean())


def test_layers_of_different_sizes_are_deci_with_arrays(tmp_path: Path) -> None:
    model = tiny_model("llama")
    mask = some_mask(model)
    write_gguf(model, mask, tmp_path)
    reader = read(tmp_path)
    assert field(reader, "general.architecture") == "deci"
    assert field(reader, "deci.feed_forward_length") == [40, 32]
    assert field(reader, "deci.attention.head_count") == [1, 1]
    assert field(reader, "deci.attention.head_count_kv") == [1, 1]
    assert field(reader, "deci.attention.key_length") == 8
    shapes = {tensor.name: tuple(tensor.shape[::-1]) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight"] == (32, 32)
    assert shapes["blk.0.ffn_up.weight"] == (40, 32)
    assert shapes["blk.0.attn_k.weight"] == (8, 32)
    assert len(shapes) == len(model.model.state_dict())


def test_layers_alike_stay_llama_and_hold_the_weights(tmp_path: Path) -> None:
    model = a_model("llama-tied")
    space = UnitSpace.of(model)
    keep = np.ones(len(space), dtype=bool)
    for layer in range(2):
        keep[space.neuron_slice(layer)][[3, 9 + layer]] = False
    write_gguf(model, Mask(space, keep, model.fingerprint), tmp_path)
    reader = read(tmp_path)
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "llama.feed_forward_length") == 46
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors
    down = model.mlp_outputs[1].weight.detach().numpy()[:, keep[space.neuron_slice(1)]]
    np.testing.assert_array_equal(np.asarray(tensors["blk.1.ffn_down.weight"].data), down.astype(np.float16))
    # transformers puts the rows of query heads back in its own order when it reads them.
    write_gguf(model, Mask.removing(model, []), tmp_path / "whole")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", gguf_file=FILE)
    for name, weight in model.model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantisation", ["keep", "f16", "q8_0"])
def test_a_plan_is_applied_to_the_file_that_was_loaded(
    quantisation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    made = a_model()
    write_gguf(made, Mask.removing(made, []), tmp_path / "source", "q8_0")
    model = secateur.load(tmp_path / "source" / FILE, device="cpu")
    mask = some_mask(model)
    directory = secateur.export(
        model, secateur.Plan(mask, {}), tmp_path / "pruned", format="gguf", quantisation=quantisation
    )
    reader, source = read(directory), read(tmp_path / "source")
    before = {tensor.name: tensor for tensor in source.tensors}
    after = {tensor.name: tensor for tensor in reader.tensors}
    assert list(before) == list(after)
    assert field(reader, "tokenizer.ggml.tokens") == field(source, "tokenizer.ggml.tokens")
    # In q8_0 the down projection keeps a multiple of 32 inputs, or all there are: 48, which is no multiple, is f16.
    widths = [48, 32] if quantisation == "q8_0" else [40, 32]
    assert field(reader, "deci.feed_forward_length") == widths
    if quantisation == "keep":
        kept = np.flatnonzero(mask.keep[mask.space.neuron_slice(1)])
        rows = np.asarray(before["blk.1.ffn_gate.weight"].data)[kept]
        np.testing.assert_array_equal(np.asarray(after["blk.1.ffn_gate.weight"].data), rows)
        np.testing.assert_array_equal(
            np.asarray(after["token_embd.weight"].data), np.asarray(before["token_embd.weight"].data)
        )
    numbers = gguf.quants.dequantize(
        np.asarray(after["blk.1.ffn_down.weight"].data), after["blk.1.ffn_down.weight"].tensor_type
    )
    wanted = model.mlp_outputs[1].weight.detach().numpy()[:, mask.keep[mask.space.neuron_slice(1)]]
    np.testing.assert_allclose(numbers, wanted, atol=5e-3)


def qwen2_file(directory: Path) -> Path:
    """A GGUF file of an architecture whose layers llama.cpp wants alike, put together here."""
    model = a_model("qwen2")
    write_gguf(a_model(), Mask.removing(a_model(), []), directory)  # for its tokenizer
    source = read(directory)
    writer = gguf.GGUFWriter(directory / "qwen2.gguf", "qwen2")
    for name, found in source.fields.items():
        own = name.replace("llama.", "qwen2.") if name.startswith("llama.") else name
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *rest = found.types
            writer.add_key_value(own, found.contents(), kind, rest[-1] if rest else None)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for path, value in model.model.state_dict().items():
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert name is not None
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "qwen2.gguf"


def test_other_architectures_keep_their_shapes_with_units_zeroed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    model = secateur.load(qwen2_file(tmp_path), device="cpu")
    mask = some_mask(model)
    directory = secateur.export(model, secateur.Plan(mask, {}), tmp_path / "pruned", format="gguf", quantisation="keep")
    other = secateur.load(directory / FILE, device="cpu")
    assert other.model.config.model_type == "qwen2"
    assert UnitSpace.of(other) == UnitSpace.of(model)
    ids = torch.tensor(PROMPTS)
    with torch.no_grad(), masked(model, mask):
        wanted = model.model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(other.model(input_ids=ids).logits, wanted, rtol=0, atol=1e-4)
    means = ActivationMeans(
        tuple(np.zeros((4, 8), dtype=np.float32) for _ in range(2)), tuple(np.zeros(48, dtype=np.float32) for _ in "ab")
    )
    with pytest.raises(MaskError, match="use zero ablation"):
        check_export(model, some_mask(model, means), "gguf")


def test_scaled_rotary_positions_are_refused() -> None:
    model = a_model()
    model.model.config.rope_parameters = {**model.model.config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    with pytest.raises(MaskError, match="Scaled rotary"):
        check_export(model, some_mask(model), "gguf")


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused() -> None:
    bpe = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    assert splitting_rule(bpe) == "gpt-2"
    for other in (
        {"model": {"type": "Unigram"}, "pre_tokenizer": bpe["pre_tokenizer"]},
        {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    ):
        with pytest.raises(MaskError, match="convert_hf_to_gguf"):
            splitting_rule(other)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biased", "mistral"])
@pytest.mark.parametrize(("quantisation", "least"), [("f16", 1e-3), ("q8_0", 1e-2)])
@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
def test_llama_cpp_finds_the_masked_model(
    name: str, quantisation: Any, least: float, mean: bool, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    model = a_model(name)
    if mean and model.family.bias_switches is None:
        pytest.skip("this family carries no means")
    space, rng = UnitSpace.of(model), np.random.default_rng(0)
    means = ActivationMeans(
        tuple(rng.normal(size=(n, space.head_dim)).astype(np.float32) for n in space.heads),
        tuple(rng.normal(size=n).astype(np.float32) for n in space.neurons),
    )
    mask = some_mask(model, means if mean else None)
    check_export(model, mask, "gguf", quantisation=quantisation)
    write_gguf(model, mask, tmp_path, quantisation)
    wanted, texts = expected(model, mask, PROMPTS)
    found, written = by_llama_cpp(tmp_path, PROMPTS)
    assert divergence(wanted, found) < least
    if quantisation == "f16":
        assert_near_ties(model, mask, texts, written)


@pytest.mark.real
@pytest.mark.parametrize(("quantisation", "least"), [("f16", 1e-3), ("q8_0", 1e-2), ("keep", 1e-1)])
def test_llama_cpp_finds_the_masked_default_model(quantisation: Any, least: float, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = secateur.load()
    space, rng = UnitSpace.of(model), np.random.default_rng(0)
    keep = np.ones(len(space), dtype=bool)
    keep[rng.choice(space.n_heads, 6, replace=False)] = False
    keep[space.n_heads + rng.choice(space.n_neurons, 300, replace=False)] = False
    mask = Mask(space, keep, model.fingerprint)
    write_gguf(model, mask, tmp_path, quantisation)
    text = "The harbour clock struck seven while the ladder stood against the old garden wall and nobody came. "
    tokens = model.tokenizer(text * 4)["input_ids"]
    prompts = [tokens[: 6 + number] for number in range(50)]
    wanted, texts = expected(model, mask, prompts)
    found, written = by_llama_cpp(tmp_path, prompts)
    print(quantisation, divergence(wanted, found), (tmp_path / FILE).stat().st_size)
    assert divergence(wanted, found) < least
    if quantisation == "f16":
        assert written == texts
