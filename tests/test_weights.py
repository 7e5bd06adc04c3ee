"""Weight masks: files, application, composition, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import NAMES, all_logits, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.studies.plan import Plan, load_plan
from secateur.surgery import write_checkpoint
from secateur.units import HEADER, Mask, masked
from secateur.weights import WEIGHT_MASK_FORMAT, WeightMask, linear_layers, load_mask, weight_matrix


def some_weights(model: LanguageModel, share: float = 0.1, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.random(tuple(weight_matrix(m).shape)) < share for n, m in linear_layers(model).items()}


def some_mask(model: LanguageModel, share: float = 0.1, seed: int = 0) -> WeightMask:
    return WeightMask.removing(model, some_weights(model, share, seed))


def snapshot(model: LanguageModel) -> dict[str, bytes]:
    """Every parameter, bit for bit, NaN included."""
    return {name: value.numpy().tobytes() for name, value in model.model.state_dict().items()}


def zeroed_by_hand(model: LanguageModel, removed: dict[str, np.ndarray]) -> None:
    """Set weights to zero for good, one by one, through the modules' own parameters."""
    for name, off in removed.items():
        module = model.model.get_submodule(name)
        for out, column in zip(*np.nonzero(off), strict=True):
            at = (out, column) if isinstance(module, nn.Linear) else (column, out)
            module.weight.data[at] = 0  # type: ignore[union-attr, index]


@pytest.mark.parametrize("name", NAMES)
def test_scope_is_every_matrix_of_the_blocks(name: str) -> None:
    model = tiny_model(name)
    matrices = {n for n, p in model.model.named_parameters() if p.dim() == 2 and n.startswith(model.family.blocks)}
    assert {f"{n}.weight" for n in linear_layers(model)} == matrices
    width = model.model.get_submodule(f"{model.family.blocks}.0.{model.family.mlp_out}")
    assert weight_matrix(width).shape == (model.model.config.hidden_size, model.neurons_per_layer[0])


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi3", "opt", "falcon"])
def test_applied_equals_weights_set_to_zero(name: str) -> None:
    model, other = tiny_model(name), tiny_model(name)
    before, plain = snapshot(model), all_logits(model)
    removed = some_weights(model)
    mask = WeightMask.removing(model, removed)
    zeroed_by_hand(other, removed)
    with masked(model, mask):
        assert snapshot(model) == snapshot(other)
        assert torch.equal(all_logits(model), all_logits(other))
    assert snapshot(model) == before
    assert torch.equal(all_logits(model), plain)
    assert float((plain - all_logits(other)).abs().max()) > 1e-2
    assert mask.weights_removed == sum(int(off.sum()) for off in removed.values()) == sum(mask.counts.values())


def test_weights_are_restored_bit_for_bit_after_an_exception() -> None:
    model = tiny_model("gpt2")
    weight = linear_layers(model)["transformer.h.0.mlp.c_fc"].weight
    weight.data[:4, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])  # type: ignore[index]
    before = snapshot(model)

    def fail() -> None:
        assert snapshot(model) != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), some_mask(model, share=0.5).applied(model):
        fail()
    assert snapshot(model) == before


def test_a_failure_half_way_leaves_no_weight_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("llama"), []
    before, mask, plain = snapshot(model), some_mask(model), WeightMask.of

    def failing(self: WeightMask, name: str) -> np.ndarray:
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        return plain(self, name)

    monkeypatch.setattr(WeightMask, "of", failing)
    with pytest.raises(MemoryError), mask.applied(model):
        pytest.fail("the context must not open")
    assert len(calls) == 5  # two were set to zero, and restored
    assert snapshot(model) == before


def test_contexts_nest_with_masks_of_both_kinds() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    one, other, units = some_mask(model, seed=1), some_mask(model, seed=2), Mask.removing(model, [1, 9, 20])
    with masked(model, one & other), masked(model, units):
        expected = all_logits(model)
    with masked(model, one), masked(model, units), masked(model, other):
        assert torch.equal(all_logits(model), expected)
    assert snapshot(model) == before


def test_modules_that_share_one_weight_are_restored() -> None:
    model = tiny_model("llama")
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    model.model.get_submodule(second).weight = model.model.get_submodule(first).weight
    before, removed = snapshot(model), some_weights(model, 0.5)
    with masked(model, WeightMask.removing(model, {name: removed[name] for name in (first, second)})):
        shared = model.model.get_submodule(first).weight == 0
        assert np.array_equal(shared.numpy(), removed[first] | removed[second])  # type: ignore[union-attr]
    assert snapshot(model) == before


def test_composition_removes_what_either_removes() -> None:
    model = tiny_model("llama")
    names = list(linear_layers(model))
    one, other = some_weights(model, seed=1), some_weights(model, seed=2)
    one.pop(names[0]), other.pop(names[1])
    both = WeightMask.removing(model, one) & WeightMask.removing(model, other)
    for name in names:
        expected = one.get(name, np.False_) | other.get(name, np.False_)
        assert np.array_equal(both.of(name), expected)
    with pytest.raises(MaskError, match="different models"):
        _ = both & some_mask(tiny_model("llama", seed=1))


def test_modules_without_removed_weights_make_no_difference(tmp_path: Path) -> None:
    model = tiny_model("llama")
    removed = some_weights(model)
    name = min(removed)
    removed[name][:] = False
    mask = WeightMask.removing(model, removed)
    fewer = WeightMask.removing(model, {n: off for n, off in reversed(removed.items()) if n != name})
    assert mask == fewer
    assert mask.key == fewer.key
    mask.save(tmp_path / "one")
    fewer.save(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert WeightMask.removing(model, {name: removed[name]}).is_empty
    assert not mask.is_empty


def test_key_tells_masks_apart() -> None:
    model = tiny_model("llama")
    removed = some_weights(model)
    mask = WeightMask.removing(model, removed)
    removed[min(removed)][0, 0] ^= True
    assert WeightMask.removing(model, removed).key != mask.key
    # As many bits in the same places of another module of the same shape.
    q, o = (f"model.layers.0.self_attn.{p}_proj" for p in "qo")
    assert WeightMask.removing(model, {q: removed[q]}) != WeightMask.removing(model, {o: removed[q]})


def test_random_masks_remove_as_many_weights_of_every_module() -> None:
    model = tiny_model("llama")
    mask = some_mask(model, share=0.3)
    draws = [mask.random_like(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert all(draw.counts == mask.counts for draw in draws)
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != mask
    hits = np.mean([mask.random_like(np.random.default_rng(s)).of(min(mask.shapes)) for s in range(200)], axis=0)
    assert 0.1 < hits.min() < hits.max() < 0.5  # no weight is always or never drawn


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_file_round_trip(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    removed = some_weights(model)
    mask = WeightMask.removing(model, removed)
    mask.save(tmp_path / "mask")
    loaded = load_mask(tmp_path / "mask")
    assert isinstance(loaded, WeightMask)
    assert loaded == mask == WeightMask.load(tmp_path / "mask")
    assert all(np.array_equal(loaded.of(n), off) for n, off in removed.items())
    weights = sum(off.size for off in removed.values())
    assert (tmp_path / "mask").stat().st_size < weights / 8 + 5000


def test_either_kind_is_told_by_its_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    units = Mask.removing(model, [1, 40])
    units.save(tmp_path / "units")
    assert load_mask(tmp_path / "units") == units
    with pytest.raises(MaskError, match="not a Secateur weight mask"):
        WeightMask.load(tmp_path / "units")
    some_mask(model).save(tmp_path / "weights")
    with pytest.raises(MaskError, match="not a Secateur mask"):
        Mask.load(tmp_path / "weights")
    (tmp_path / "text").write_text(WEIGHT_MASK_FORMAT)
    for path in (tmp_path / "text", tmp_path / "none"):
        with pytest.raises(MaskError, match="cannot be read"):
            load_mask(path)


@given(position=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_damaged_file_gives_a_mask_error(
    position: float, change: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-weights"
    content = bytearray(WHOLE_FILE)
    content[int(position * len(content))] ^= change
    path.write_bytes(content)
    try:
        loaded = load_mask(path)
    except MaskError:
        return
    # What passes differs in the fingerprint alone, or in nothing but the JSON's form.
    assert isinstance(loaded, WeightMask)
    assert loaded.key == WHOLE.key


def _whole() -> tuple[WeightMask, bytes]:
    from tempfile import TemporaryDirectory

    mask = some_mask(tiny_model("llama"))
    with TemporaryDirectory() as directory:
        mask.save(Path(directory) / "mask")
        return mask, (Path(directory) / "mask").read_bytes()


WHOLE, WHOLE_FILE = _whole()


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_cut_file_gives_a_mask_error(length: int, tmp_path: Path) -> None:
    (tmp_path / "mask").write_bytes(WHOLE_FILE[:length])
    with pytest.raises(MaskError, match="cannot be read"):
        load_mask(tmp_path / "mask")


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"format": "secateur-weight-mask-2"},
        {"format": WEIGHT_MASK_FORMAT},
        {"format": WEIGHT_MASK_FORMAT, "shapes": [1], "fingerprint": "x", "digest": "y"},
        {"format": WEIGHT_MASK_FORMAT, "shapes": {"a": [3, 3]}, "fingerprint": "x", "digest": "y"},
        {"format": WEIGHT_MASK_FORMAT, "shapes": {"a": [1e300, 2]}, "fingerprint": "x", "digest": "y"},
        {"format": WEIGHT_MASK_FORMAT, "shapes": {"a": [-1, -8]}, "fingerprint": "x", "digest": "y"},
        {"format": WEIGHT_MASK_FORMAT, "shapes": {"a": [1, 7]}, "fingerprint": "x", "digest": "y"},
        {"format": WEIGHT_MASK_FORMAT, "shapes": {"a": [1, 8]}, "fingerprint": "x", "digest": "y"},
    ],
)
def test_other_content_gives_a_mask_error(header: object, tmp_path: Path) -> None:
    save_file({"a": np.array([1], dtype=np.uint8)}, tmp_path / "mask", metadata={HEADER: json.dumps(header)})
    with pytest.raises(MaskError):
        WeightMask.load(tmp_path / "mask")
    assert load_file(tmp_path / "mask")


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    mask = some_mask(other)
    before = snapshot(model)
    with pytest.raises(MaskError, match="another model"), masked(model, mask):
        pytest.fail("the context must not open")
    with pytest.raises(MaskError, match="another model"):
        write_checkpoint(model, mask, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("lm_head", (300, 32), "no linear layer"), ("model.layers.0.mlp.up_proj", (32, 48), r"shape \(48, 32\)")],
)
def test_what_the_model_does_not_have_is_refused(name: str, shape: tuple[int, int], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(MaskError, match=message):
        WeightMask.removing(model, {name: np.ones(shape, dtype=bool)})
    bits = {name: np.packbits(np.ones(shape, dtype=bool))}
    with pytest.raises(MaskError, match=message):
        WeightMask({name: shape}, bits, model.fingerprint).check(model)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_equals_the_masked_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    before, mask = snapshot(model), some_mask(model)
    write_checkpoint(model, mask, tmp_path)
    assert snapshot(model) == before
    with masked(model, mask):
        expected = all_logits(model)
    transformer, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    logits = all_logits(LanguageModel(transformer, model.tokenizer, "reloaded"))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert float((expected - all_logits(model)).abs().max()) > 1e-2


def test_a_plan_holds_either_kind(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for number, mask in enumerate((some_mask(model), Mask.removing(model, [1, 40]))):
        Plan(mask, {"suite": "small"}).save(tmp_path / str(number))
        plan = load_plan(tmp_path / str(number))
        assert plan.mask == mask
        assert plan.record == {"suite": "small"}
        with masked(model, mask):
            expected = all_logits(model)
        with plan.applied(model):
            assert torch.equal(all_logits(model), expected)
    content = json.loads((tmp_path / "0" / "plan.json").read_text())
    assert content["weights"] == some_mask(model).counts
    assert content["ablation"] == "zero"
