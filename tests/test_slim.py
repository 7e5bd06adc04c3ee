"""Slimmer models: what is kept, what stands in for the rest, and what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Command, save_model, write_suite, write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NAMES, all_logits, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import secateur
from secateur.api import verification_of
from secateur.errors import MaskError, SettingError, SuiteError
from secateur.measures.speed import SpeedComparison, compare_speed
from secateur.measures.splits import NOTHING_SEEN, split
from secateur.measures.utility import cut
from secateur.models import LanguageModel
from secateur.suites import suite_hash
from secateur.surgery import write_uniform
from secateur.surgery.reconstruction import cheapest_first, grams, stand_in
from secateur.surgery.slimming import Size, replaced, slimmings, target_size
from secateur.units import Mask, UnitSpace, masked

TEXT = "The harbour clock struck seven while the ladder stood against the old garden wall. " * 12
FAMILIES = ("llama", "llama-tied", "qwen3", "gemma2", "phi3", "olmo2", "gpt2", "opt", "falcon-multihead")


def some_gram(rng: np.random.Generator, inputs: int, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, (tokens, inputs), that depend on each other, and their Gram matrix."""
    seen = torch.from_numpy(rng.normal(size=(tokens, inputs)) @ rng.normal(size=(inputs, inputs)))
    return seen, seen.T @ seen


def test_stand_in_weights_are_those_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    seen, gram = some_gram(rng, 12)
    weight = torch.from_numpy(rng.normal(size=(5, 12)))
    kept = np.array([0, 2, 3, 7, 8, 11])
    ridge = 0.2
    damping = np.sqrt(ridge * float(gram.diagonal().mean()))
    # Ridge towards the old weights, as more rows of an ordinary least squares problem.
    rows = np.vstack([seen[:, kept].numpy(), damping * np.eye(len(kept))])
    targets = np.vstack([(seen @ weight.T).numpy(), damping * weight[:, kept].T.numpy()])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    np.testing.assert_allclose(stand_in(gram, weight, kept, ridge).numpy(), expected, atol=1e-8)


def test_the_cheapest_goes_first_as_by_trying_each() -> None:
    rng = np.random.default_rng(1)
    _, gram = some_gram(rng, 7)
    weight, ridge = torch.from_numpy(rng.normal(size=(4, 7))), 0.1
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(7)

    def error(kept: list[int]) -> float:
        """What is left of the damped output if the kept inputs do their best."""
        best = weight @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
        whole = torch.zeros_like(weight)
        whole[:, kept] = best
        return float(((weight - whole) @ damped * (weight - whole)).sum())

    left = list(range(7))
    left.remove(5)  # what a plan removes goes first
    while len(left) > 3:
        left.remove(min(left, key=lambda gone: error([i for i in left if i != gone])))
    removed = np.arange(7) == 5
    assert cheapest_first(gram, weight, removed, 3, ridge).tolist() == left


@given(seed=st.integers(0, 1000), size=st.integers(1, 9), lost=st.integers(0, 9))
@settings(max_examples=30)
def test_as_many_stay_as_asked_and_removed_ones_only_to_fill_up(seed: int, size: int, lost: int) -> None:
    rng = np.random.default_rng(seed)
    _, gram = some_gram(rng, 9)
    removed = np.zeros(9, dtype=bool)
    removed[rng.choice(9, lost, replace=False)] = True
    kept = cheapest_first(gram, torch.from_numpy(rng.normal(size=(3, 9))), removed, size)
    assert len(kept) == size
    assert (np.diff(kept) > 0).all()
    assert removed[kept].sum() == max(0, size - (9 - lost))


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_grams_equal_plain_products(memory: int) -> None:
    model = tiny_model("llama")
    text = cut(model, TEXT, 64, 32, 400)
    inputs: list[torch.Tensor] = []
    hook = model.mlp_outputs[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    for window in text.windows:
        model.model(window.tokens[None])
    hook.remove()
    found = list(grams(model, text, model.mlp_outputs, memory=memory))
    joined = torch.cat(inputs)
    torch.testing.assert_close(found[1], joined.T @ joined, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ridge", [None, 0.1])
def test_what_is_written_equals_what_was_chosen(name: str, ridge: float | None, tmp_path: Path) -> None:
    model = tiny_model(name)
    space = UnitSpace.of(model)
    kv_heads = 1 if model.family.heads_shrink else space.kv_heads[0]
    start = Mask.removing(model, [0, space.n_heads, space.n_heads + 1])
    text = cut(model, TEXT, 64, 32, 400)
    before = all_logits(model)
    found = slimmings(model, text, start, Size(kv_heads, 32), ["loss", "data", "output"], [ridge])
    assert [one.importance for one in found] == ["loss", "data", "output"]
    for one in found:
        assert not one.mask.keep[start.removed].any()
        assert one.mask.neurons_removed == 32
        directory = tmp_path / one.importance
        write_uniform(model, one.mask, directory, weights=one.weights)
        other = secateur.load(directory, device="cpu")
        assert UnitSpace.of(other).neurons == (32, 32)
        assert UnitSpace.of(other).kv_heads == (kv_heads,) * 2
        with replaced(model, one.weights), masked(model, one.mask):
            expected = all_logits(model)
        torch.testing.assert_close(all_logits(other), expected, rtol=0, atol=1e-4)
        if ridge is None:
            with masked(model, one.mask):
                torch.testing.assert_close(all_logits(model), expected, rtol=0, atol=1e-4)
    assert torch.equal(all_logits(model), before)


def test_a_plan_that_removes_more_than_the_width_keeps_its_units_off(tmp_path: Path) -> None:
    model = tiny_model("llama")
    space = UnitSpace.of(model)
    gone = [space.n_heads + i for i in range(30)]
    (one,) = slimmings(model, cut(model, TEXT, 64, 32, 400), Mask.removing(model, gone), Size(2, 24), ["output"], [0.1])
    assert one.mask.neurons_removed == 30 + 24
    write_uniform(model, one.mask, tmp_path, weights=one.weights)
    other = secateur.load(tmp_path, device="cpu")
    assert UnitSpace.of(other).neurons == (24, 24)
    with replaced(model, one.weights), masked(model, one.mask):
        torch.testing.assert_close(all_logits(other), all_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_fit(name: str) -> None:
    model = tiny_model(name)
    assert target_size(model, 0.8).neurons == 40
    assert target_size(model, 0.75, 4).neurons == 36
    refused: list[tuple[dict[str, Any], str]] = [
        ({"width": 0.0}, "above 0"),
        ({"width": 1.5}, "above 0"),
        ({"width": 1.0}, "keeps everything"),
        ({"width": 0.01}, "leaves a layer empty"),
        ({"width": 0.5, "multiple": 5}, "does not divide"),
        ({"width": 0.5, "kv_heads": 0}, "keep 1 to"),
        ({"width": 0.5, "kv_heads": 99}, "keep 1 to"),
    ]
    for told, message in refused:
        with pytest.raises(SettingError, match=message):
            target_size(model, **told)
    if not model.family.heads_shrink and model.kv_heads_per_layer[0] > 1:
        with pytest.raises(SettingError, match="or more"):
            target_size(model, 0.8, kv_heads=1)


def test_heads_that_do_not_divide_the_hidden_size_are_refused() -> None:
    config = tiny_config("llama")
    config.num_key_value_heads = 4
    model = LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny")
    with pytest.raises(SettingError, match="keep 4 or more"):
        target_size(model, 0.8, kv_heads=3)
    assert target_size(model, 0.8, kv_heads=2).kv_heads == 2


def test_speed_is_the_median_of_paired_ratios() -> None:
    measured = SpeedComparison(np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.2, 8.0]))
    assert measured.ratio().value == 2.0
    model = tiny_model("llama")
    found = compare_speed(model, model, 5, 3)
    assert found.before.shape == found.after.shape == (3,)
    assert (found.before > 0).all()


def test_the_command(tmp_path: Path, call: Command) -> None:
    save_model(tmp_path / "model")
    told = (
        *("-m", tmp_path / "model", "--suite", write_suite(tmp_path), "--utility-text", write_text(tmp_path, 1200)),
        *("--utility-tokens", "600", "--control-suite", "none", "--device", "cpu"),
    )
    done = call("slim", *told, "-o", tmp_path / "slim")
    assert done.status == 0, done.err
    written = json.loads((tmp_path / "slim" / "slim.json").read_text())
    assert written["size"] == {"neurons": 40, "kv_heads": 2}
    assert written["parameters"][1] < written["parameters"][0]
    assert sum(candidate["chosen"] for candidate in written["candidates"]) == 1
    chosen = min(written["candidates"], key=lambda one: one["perplexity_increase"])
    assert chosen["chosen"]
    stored = sum(file.stat().st_size for file in (tmp_path / "slim" / "checkpoint").glob("*.safetensors"))
    assert written["file_bytes"][1] == stored
    other = secateur.load(tmp_path / "slim" / "checkpoint", device="cpu")
    assert sum(p.numel() for p in other.model.parameters()) == written["parameters"][1]
    model = secateur.load(tmp_path / "model", device="cpu")
    assert secateur.load_plan(tmp_path / "slim" / "checkpoint" / "secateur").mask.neurons_removed == 16
    assert "perplexity" in (tmp_path / "slim" / "checkpoint" / "README.md").read_text()
    assert "fewer parameters" in (tmp_path / "slim" / "report.html").read_text()
    listed, shown = call("runs", tmp_path), call("show", tmp_path / "slim")
    assert f"slim small {tmp_path / 'model'} {written['run']['started'][:16].replace('T', ' ')}" in listed.out
    assert "fewer parameters" in listed.out
    assert shown.status == 0
    for line in ("40 neurons and 2 KV heads in every layer", "Held-out bias B", "Perplexity", "Decoding speed"):
        assert line in shown.out
    before, after = (f"{count / 1e6:,.1f} M" for count in written["parameters"])
    assert f"Parameters {before} -> {after}, -" in shown.out
    secateur.Plan(Mask.removing(model, [20, 21]), {"suite": str(tmp_path / "small.yaml")}).save(tmp_path / "plan")
    again = call(
        *("slim", tmp_path / "plan", *told, "-o", tmp_path / "from-plan", "--no-calibrate", "--importance", "data")
    )
    assert again.status == 0, again.err
    assert not secateur.load_plan(tmp_path / "from-plan" / "checkpoint" / "secateur").mask.keep[[20, 21]].any()
    for extra, message in (
        (("--width", "0.01"), "leaves a layer empty"),
        (("--multiple", "7"), "does not divide"),
        (("--importance", "luck"), "choose one of: loss, data, output, best"),
        (("--kv-groups", "5"), "keep 1 to 2"),
    ):
        assert message in call("slim", *told, *extra, "-o", tmp_path / "new").refusal
    assert not list(tmp_path.glob("new*"))


def test_a_plan_is_tested_on_what_it_has_not_seen() -> None:
    model = tiny_model("llama")
    suite = secateur.load_suite("occupations")
    settings_of = {"seed": 3, "utility_text": None, "suite_hash": suite_hash(suite)}
    record = {"suite": "occupations", "settings": settings_of}
    plan = secateur.Plan(Mask.removing(model, [20]), record)
    found, told = plan.held_out(None, {"seed": None, "width": 0.8})
    assert found == suite
    assert told == {"seed": 3, "dealing": "shuffled", "utility_text": None, "width": 0.8}
    with pytest.raises(SettingError, match="made with seed 3; with 0"):
        plan.held_out(None, {"seed": 0})
    with pytest.raises(SettingError, match="name its file"):
        secateur.Plan(plan.mask, {"suite": "mine"}).held_out(None, {})
    changed = secateur.Plan(plan.mask, {"suite": "occupations", "settings": {"suite_hash": "other"}})
    with pytest.raises(SettingError, match="has changed"):
        changed.held_out(suite, {})
    dealt = secateur.Plan(plan.mask, {"suite": "occupations", "settings": {**settings_of, "dealing": "by text"}})
    with pytest.raises(SettingError, match="made with dealing by text"):
        dealt.held_out(None, {"dealing": "shuffled"})
    assert secateur.Plan(plan.mask, {}).held_out(suite, {})[1]["seed"] == 0
    with pytest.raises(SettingError, match="does not say what suite"):
        secateur.Plan(plan.mask, {}).held_out(None, {})


def test_another_suite_is_tested_on_what_the_plan_has_not_seen() -> None:
    """Two built-in suites share names and wordings, and deal them into other parts."""
    model, race, other = tiny_model("llama"), secateur.load_suite("hiring-race"), secateur.load_suite("lending-race")
    record = {"suite": race.name, "splits": split(race, 0).describe(race)}
    plan = secateur.Plan(Mask.removing(model, [20]), record)
    assert plan.seen(race) == NOTHING_SEEN
    turned = other.model_copy(update={"groups": dict(reversed(other.groups.items()))})
    seen = plan.seen(turned)
    names = [marker for markers in turned.groups.values() for marker in markers]
    tested = {names[marker] for marker in split(turned, 0).test.markers}
    kept = {names[marker] for marker in split(turned, 0).without(turned, seen).test.markers}
    assert tested & seen.markers
    assert kept == tested - seen.markers
    asked, told = verification_of(plan, turned, runs=3)
    assert (asked, told.dealing) == (turned, "shuffled")
    everything = {**record, "splits": {"fit": {"markers": names}}}
    with pytest.raises(SuiteError, match="at least 2 new ones are needed"):
        verification_of(secateur.Plan(plan.mask, everything), turned)


def test_plans_that_cannot_be_slimmed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = secateur.Plan(Mask.removing(tiny_model("llama", seed=1), [20]), {"suite": "occupations"})
    with pytest.raises(MaskError, match="another model"):
        secateur.slim(model, plan, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert isinstance(model, LanguageModel)
