"""Formats in which a plan leaves: what other libraries load equals the live masked model, in every family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import Command, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import NAMES, VOCABULARY, all_logits, tiny_model
from transformers import AutoModelForCausalLM

import secateur
from secateur.attenuation import Attenuation
from secateur.errors import MaskError, OutputError, SettingError
from secateur.models import LanguageModel
from secateur.reports.card import render_card
from secateur.scoring.magnitude import head_norms
from secateur.surgery import FORMATS, check_export, write_compact, write_uniform
from secateur.surgery.sizes import evenly, exactly, widest
from secateur.units import ActivationMeans, Mask, UnitSpace, masked

PROMPTS = torch.from_numpy(np.random.default_rng(3).integers(0, 250, size=(50, 9)))
# Neurons removed of each layer.
LOST_NEURONS = (8, 16)
WITHOUT_SECATEUR = """
import sys
sys.modules["secateur"] = None  # any import of it fails
import json, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for directory, how in json.loads(sys.argv[2]).items():
    if how["format"] == "peft":
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(how["base"]), directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=how["format"] == "compact")
    with torch.no_grad():
        torch.save(model.eval()(input_ids=ids).logits[:, -1].log_softmax(-1), directory + "/log_probabilities.pt")
"""


def some_mask(model: LanguageModel, means: ActivationMeans | None = None) -> Mask:
    """Neurons of both layers and, where there are several KV heads, one with all its query heads and another head."""
    space, rng = UnitSpace.of(model), np.random.default_rng(1)
    keep = np.ones(len(space), dtype=bool)
    for layer, lost in enumerate(LOST_NEURONS):
        keep[space.neuron_slice(layer)][rng.choice(space.neurons[layer], lost, replace=False)] = False
        heads = np.split(keep[space.head_slice(layer)], space.kv_heads[layer])
        if len(heads) > 1:
            heads[layer][:] = False
        heads[layer - 1][0] = False
    return Mask(space, keep, model.fingerprint, means)


def logits(model: LanguageModel, mask: Mask | None = None) -> torch.Tensor:
    with masked(model, mask):
        return all_logits(model, PROMPTS)


def parameters(directory: Path) -> int:
    return sum(tensor.numel() for file in directory.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("name", NAMES)
def test_uniform_equals_the_masked_model_and_is_smaller(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    mask = some_mask(model)
    write_uniform(model, mask, tmp_path)
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    wrapped = LanguageModel(other, model.tokenizer, "reloaded")
    torch.testing.assert_close(logits(wrapped), logits(model, mask), rtol=0, atol=1e-4)
    assert UnitSpace.of(wrapped).neurons == (40, 40)
    assert other.num_parameters() < model.model.num_parameters()
    shrinks = model.family.heads_shrink and model.kv_heads_per_layer[0] > 1
    groups = model.kv_heads_per_layer[0]
    assert UnitSpace.of(wrapped).kv_heads == ((groups // 2 if shrinks else groups,) * 2)


@pytest.mark.parametrize("name", NAMES)
def test_compact_equals_the_masked_model_and_holds_no_removed_neuron(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    mask = some_mask(model)
    write_compact(model, mask, tmp_path)
    other = secateur.load(tmp_path, device="cpu")
    torch.testing.assert_close(logits(other), logits(model, mask), rtol=0, atol=1e-4)
    space = UnitSpace.of(other)
    assert space.neurons == (40, 32)
    if model.family.heads_shrink:
        kept = [int(mask.keep[mask.space.head_slice(layer)].sum()) for layer in range(2)]
        assert list(space.heads) == kept
    assert parameters(tmp_path) < sum(p.numel() for p in model.model.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2"])
@pytest.mark.parametrize("lost", [(0,), (1, 2), (0, 1, 2), (0, 2, 3)], ids=str)
def test_compact_heads_that_share_a_kv_head_may_go_in_any_number(
    name: str, lost: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_model(name)
    space = UnitSpace.of(model)
    keep = np.ones(len(space), dtype=bool)
    keep[list(lost)] = False
    mask = Mask(space, keep, model.fingerprint)
    write_compact(model, mask, tmp_path)
    other = secateur.load(tmp_path, device="cpu")
    torch.testing.assert_close(logits(other), logits(model, mask), rtol=0, atol=1e-4)
    assert UnitSpace.of(other).heads == (4 - len(lost), 4)
    assert UnitSpace.of(other).kv_heads == (len({head // 2 for head in range(4) if head not in lost}), 2)


def test_the_norms_of_heads_are_those_before_where_groups_differ_in_size(tmp_path: Path) -> None:
    model = tiny_model("llama")  # four heads, two KV heads
    write_compact(model, Mask.removing(model, [3]), tmp_path)
    compact = secateur.load(tmp_path, device="cpu")
    assert compact.heads_per_layer[0] == 3
    torch.testing.assert_close(head_norms(compact, 0), head_norms(model, 0)[:3])


def test_a_compact_model_generates_with_its_cache_as_without(tmp_path: Path) -> None:
    model = tiny_model("llama")
    keep = np.ones(len(UnitSpace.of(model)), dtype=bool)
    keep[[0, 5, 6]] = False
    write_compact(model, Mask(UnitSpace.of(model), keep, model.fingerprint), tmp_path)
    plain = secateur.load(tmp_path, device="cpu").model
    with_cache, without = (
        plain.generate(PROMPTS[:4], max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_compact_model_saves_and_loads_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_compact(model, some_mask(model), tmp_path / "one")
    one = secateur.load(tmp_path / "one", device="cpu")
    one.save_pretrained(tmp_path / "two")
    two = secateur.load(tmp_path / "two", device="cpu")
    assert two.fingerprint == one.fingerprint
    assert torch.equal(logits(two), logits(one))


def test_a_compact_model_can_be_pruned_further_in_place(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_compact(model, some_mask(model), tmp_path / "compact")
    compact = secateur.load(tmp_path / "compact", device="cpu")
    mask = Mask.removing(compact, [len(UnitSpace.of(compact)) - 1])
    directory = secateur.export(compact, secateur.Plan(mask, {}), tmp_path / "zeroed")
    other = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    expected = logits(compact, mask)
    torch.testing.assert_close(logits(LanguageModel(other, compact.tokenizer, "reloaded")), expected, rtol=0, atol=1e-4)
    assert "trust_remote_code" in (directory / "README.md").read_text()
    with pytest.raises(MaskError, match="compact already"):
        secateur.export(compact, secateur.Plan(mask, {}), tmp_path / "again", format="compact")


def test_the_default_models_card_names_its_base() -> None:
    model = tiny_model("llama")
    model.source = "SmolLM2-135M-Instruct"
    card = render_card(model, secateur.Plan(some_mask(model), {}), "hf", "transformers", "me/mine")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert metadata["base_model_relation"] == "finetune"


def test_compact_without_consent_is_refused_by_transformers(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_compact(model, some_mask(model), tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("write", [write_uniform, write_compact])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "falcon-multihead", "opt"])
def test_smaller_models_carry_means_and_come_in_parts(name: str, write: Any, tmp_path: Path) -> None:
    model = tiny_model(name)
    space, rng = UnitSpace.of(model), np.random.default_rng(0)
    means = ActivationMeans(
        tuple(rng.normal(size=(n, space.head_dim)).astype(np.float32) for n in space.heads),
        tuple(rng.normal(size=n).astype(np.float32) for n in space.neurons),
    )
    mask = some_mask(model, means)
    write(model, mask, tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other = secateur.load(tmp_path, device="cpu")
    torch.testing.assert_close(logits(other), logits(model, mask), rtol=0, atol=1e-4)
    before = {key: value.clone() for key, value in tiny_model(name).model.state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_every_format_loads_without_secateur(tmp_path: Path) -> None:
    expected, told = {}, {}
    for name in ("llama-tied", "llama-biased", "qwen3", "gpt2"):
        model = tiny_model(name)
        model.save_pretrained(tmp_path / f"{name}-base")
        loaded = secateur.load(tmp_path / f"{name}-base", device="cpu")
        mask = some_mask(loaded)
        for kind in ("hf", "peft", "hf-uniform", "compact"):
            directory = secateur.export(loaded, secateur.Plan(mask, {}), tmp_path / f"{name}-{kind}", format=kind)
            told[str(directory)] = {"format": kind, "base": loaded.source}
            expected[str(directory)] = logits(loaded, mask)[:, -1].log_softmax(-1)
    torch.save(PROMPTS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", WITHOUT_SECATEUR, str(tmp_path / "ids.pt"), json.dumps(told)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for directory, wanted in expected.items():
        found = torch.load(Path(directory) / "log_probabilities.pt")
        assert found.shape == (50, VOCABULARY)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@given(data=st.data())
@settings(max_examples=60)
def test_sizes_keep_what_the_mask_keeps(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 3))
    groups, per_group, neurons = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 9)),
    )
    space = UnitSpace((groups * per_group,) * layers, (groups,) * layers, (neurons,) * layers, 4)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(space), max_size=len(space))))
    multiple, even = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    most_groups, most_neurons = widest(space, keep)
    for number, (own, alike) in enumerate(
        zip(
            exactly(space, keep, True, multiple=multiple, even_groups=even),
            evenly(space, keep, most_groups, most_neurons),
            strict=True,
        )
    ):
        heads = np.flatnonzero(keep[space.head_slice(number)])
        wide = np.flatnonzero(keep[space.neuron_slice(number)])
        for kept in (own, alike):
            assert set(heads) <= set(kept.heads)
            assert set(wide) <= set(kept.neurons)
            assert set(kept.heads // per_group) == set(kept.kv_heads)
            assert (np.diff(kept.heads) > 0).all()
            assert (np.diff(kept.neurons) > 0).all()
        assert (len(alike.kv_heads), len(alike.neurons)) == (most_groups, most_neurons)
        assert len(alike.heads) == most_groups * per_group
        assert len(own.neurons) == min(neurons, -(-max(1, len(wide)) // multiple) * multiple)
        if even:
            assert len(set(own.heads_by_group(per_group))) == 1
        elif len(heads):
            assert list(own.heads) == list(heads)


def test_formats_refuse_what_they_cannot_carry() -> None:
    model = tiny_model("llama")
    space, mask = UnitSpace.of(model), some_mask(model)
    whole = Mask.removing(model, [space.n_heads])  # a neuron of the first layer alone
    turned_down = Attenuation(space, np.full(len(space), 0.5, dtype=np.float32), model.fingerprint)
    means = ActivationMeans(
        tuple(np.zeros((4, 8), dtype=np.float32) for _ in range(2)), tuple(np.zeros(48, dtype=np.float32) for _ in "ab")
    )
    refused: list[tuple[Any, str, dict[str, Any], str]] = [
        (mask, "onnx", {}, "choose one of: hf, peft"),
        (mask, "hf", {"multiple": 8}, "it is one of: hf-uniform"),
        (mask, "hf-uniform", {"multiple": 7}, "The multiple 7 does not divide the 48 neurons"),
        (mask, "hf-uniform", {"multiple": 0}, "at least 1"),
        (mask, "hf", {"shard": "big"}, "write it as 500MB"),
        (Mask.removing(model, []), "peft", {}, "nothing to adapt"),
        (whole, "hf-uniform", {}, "secateur slim"),
        (Mask.removing(model, []), "compact", {}, "nothing gets smaller"),
        (turned_down, "hf", {}, r"as an adapter \(peft\)"),
        (turned_down, "compact", {}, "Only whole units"),
        (Mask.removing(model, [0], means), "peft", {}, "use zero ablation"),
        (mask, "gguf", {"quantisation": "q2"}, "choose one of: f16, q8_0, keep"),
        (mask, "gguf", {"quantisation": "keep"}, "no quantisation to keep"),
        (some_mask(tiny_model("llama", seed=1)), "compact", {}, "another model"),
    ]
    for given_mask, name, options, message in refused:
        with pytest.raises((MaskError, SettingError), match=message):
            check_export(model, given_mask, name, **options)
    gpt2 = tiny_model("gpt2")
    with pytest.raises(MaskError, match="use hf"):  # its heads stay where they are
        check_export(gpt2, Mask.removing(gpt2, [0]), "compact")
    with pytest.raises(MaskError, match=r"'gpt2' .* convert_hf_to_gguf"):
        check_export(tiny_model("gpt2"), some_mask(tiny_model("gpt2")), "gguf")


def test_the_commands_files_and_card(tmp_path: Path, call: Command) -> None:
    model = secateur.load(save_model(tmp_path / "model"), device="cpu")
    mask = some_mask(model)
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    record = {
        "model": model.source,
        "suite": "a <b>suite</b> | of mine",
        "method": "attribution",
        "test": {
            "bias_before": interval,
            "bias_after": interval,
            "reduction": interval,
            "random_reduction": interval,
        },
        "utility": {"perplexity_before": 10.0, "perplexity_after": 10.1, "perplexity_increase": interval},
        "verdict": "verified",
        "explanation": "It fell.",
        "command": ["/usr/bin/secateur", "repair", "--suite", "my suite.yaml"],
        "settings": {"seed": 3},
    }
    secateur.Plan(mask, record).save(tmp_path / "plan")
    for name in FORMATS:
        output = tmp_path / name
        done = call("export", tmp_path / "plan", "-m", tmp_path / "model", "-f", name, "-o", output, "--device", "cpu")
        assert done.status == 0, done.err
        assert secateur.load_plan(output / "secateur").mask == mask
        _, head, body = (output / "README.md").read_text().split("---\n", 2)
        metadata = yaml.safe_load(head)
        assert "base_model" not in metadata  # a path here means nothing to others
        assert metadata["pipeline_tag"] == "text-generation"
        metrics = metadata["model-index"][0]["results"][0]["metrics"]
        assert {metric["type"]: metric["value"] for metric in metrics}["perplexity"] == 10.1
        assert "-50% [-75%, -25%]" in body
        assert "+50.00% [+25.00%, +75.00%]" in body
        assert "<b>" not in body
        assert ("before the weights were rounded" in body) == (name == "gguf")
        assert "secateur repair --suite 'my suite.yaml'" in body
        assert "neuron 1." in body
    again = call("export", tmp_path / "plan", "-m", tmp_path / "model", "-o", tmp_path / "hf", "--device", "cpu")
    assert "exists" in again.refusal


def test_a_refused_export_leaves_nothing(tmp_path: Path, call: Command) -> None:
    model = secateur.load(save_model(tmp_path / "model"), device="cpu")
    secateur.Plan(Mask.removing(model, [20]), {}).save(tmp_path / "plan")
    told = ("export", tmp_path / "plan", "-m", tmp_path / "model", "-o", tmp_path / "new", "--device", "cpu")
    before = sorted(tmp_path.iterdir())
    assert "secateur slim" in call(*told, "-f", "hf-uniform").refusal
    assert "choose one of" in call(*told, "-f", "onnx").refusal
    assert sorted(tmp_path.iterdir()) == before


def test_an_upload_without_a_token_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.surgery.hub.get_token", lambda: None)
    model = secateur.load(save_model(tmp_path / "model"), device="cpu")
    plan = secateur.Plan(some_mask(model), {})
    with pytest.raises(OutputError, match="set HF_TOKEN"):
        secateur.export(model, plan, tmp_path / "new", push_to_hub="me/mine")
    with pytest.raises(OutputError, match="owner/name"):
        secateur.export(model, plan, tmp_path / "new", push_to_hub="mine")
    assert not (tmp_path / "new").exists()


def test_an_upload_sends_the_whole_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
            return f"hub/{repo}"

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            sent[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr("secateur.surgery.hub.get_token", lambda: "token")
    monkeypatch.setattr("secateur.surgery.hub.HfApi", Hub)
    model = tiny_model("llama")
    secateur.export(model, secateur.Plan(some_mask(model), {}), tmp_path / "new", format="peft", push_to_hub="me/mine")
    assert sent == {"me/mine": ["README.md", "adapter_config.json", "adapter_model.safetensors", "secateur"]}
    assert "# me/mine" in (tmp_path / "new" / "README.md").read_text()
