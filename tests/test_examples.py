"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_transformer

import secateur
from secateur.units import Mask, Unit, masked

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPTS = torch.arange(50)[:, None] * 5 % 250 + torch.arange(7)
MASKS = {
    "hiring": (Unit("head", 0, 1), Unit("neuron", 0, 3), Unit("neuron", 0, 9)),
    "lending": (Unit("head", 1, 2), Unit("neuron", 0, 3), Unit("neuron", 1, 30)),
}


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, str]:
    model = tiny_model("llama")
    plans = {use: secateur.Plan(Mask.removing(model, units), {}) for use, units in MASKS.items()}
    return {use: str(secateur.export(model, plan, tmp_path / use, format="peft")) for use, plan in plans.items()}


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_each_request_gets_the_mask_of_its_use_and_the_base_stays(adapters: dict[str, str]) -> None:
    model = tiny_model("llama")
    expected: dict[str | None, torch.Tensor] = {None: model.model(input_ids=PROMPTS).logits}
    for use, units in MASKS.items():
        with masked(model, Mask.removing(model, units)):
            expected[use] = model.model(input_ids=PROMPTS).logits
    base = tiny_transformer("llama")
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    many = example("two_uses").ManyUses(base, adapters)
    for number, use in enumerate(["hiring", "lending", "hiring", None, "lending", None] * 8):
        with many.serving(use) as served:
            found = served(input_ids=PROMPTS[number : number + 1]).logits
        torch.testing.assert_close(found, expected[use][number : number + 1], rtol=0, atol=1e-4)
    with many.serving(None) as served:
        torch.testing.assert_close(served(input_ids=PROMPTS).logits, expected[None], rtol=0, atol=0)
    after = {name.replace("base_layer.", ""): value for name, value in many.model.base_model.model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    with pytest.raises(KeyError, match="known uses: hiring, lending"), many.serving("housing"):
        pass


def test_the_adapters_are_small(adapters: dict[str, str]) -> None:
    for directory in adapters.values():
        assert (Path(directory) / "adapter_model.safetensors").stat().st_size < 2000


def test_two_uses_runs(adapters: dict[str, str], tmp_path: Path) -> None:
    tiny_model("llama", chat=True).save_pretrained(tmp_path / "base")
    told = [option for use, path in adapters.items() for option in ("--adapter", f"{use}={path}")]
    command = [sys.executable, EXAMPLES / "two_uses.py", "--base", tmp_path / "base", *told]
    result = subprocess.run(
        [*command, "hiring", "Hello", "lending", "Hello", "base", "Hello"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if line.endswith("] Hello")]
    assert heads == ["[hiring] Hello", "[lending] Hello", "[base] Hello"]
