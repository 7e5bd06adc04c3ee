"""Units, masks, mask files and plans, fingerprints."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import tiny_model, tiny_tokenizer, tiny_transformer

import secateur
from secateur.errors import MaskError, SettingError
from secateur.models import LanguageModel
from secateur.studies.plan import Plan, load_plan
from secateur.units import ActivationMeans, Mask, Unit, UnitSpace, check_ablation, masked

HEAD_DIM = 3


@st.composite
def spaces(draw: st.DrawFn) -> UnitSpace:
    layers = draw(st.integers(1, 4))
    counts = st.lists(st.integers(0, 6), min_size=layers, max_size=layers)  # layers without attention exist
    heads, neurons = tuple(draw(counts)), tuple(draw(counts))
    assume(sum(heads) + sum(neurons) > 0)
    return UnitSpace(heads, heads, neurons, HEAD_DIM)


@st.composite
def masks(draw: st.DrawFn, count: int = 1) -> list[Mask]:
    """Masks of one model: of one space, one fingerprint, one ablation, one set of means."""
    space = draw(spaces())
    means = means_of(space, draw(st.integers(0, 3))) if draw(st.booleans()) else None
    keep = st.lists(st.booleans(), min_size=len(space), max_size=len(space))
    return [Mask(space, np.array(draw(keep)), "f", means) for _ in range(count)]


def means_of(space: UnitSpace, seed: int) -> ActivationMeans:
    random = np.random.default_rng(seed)
    heads = tuple(random.normal(size=(n, space.head_dim)).astype(np.float32) for n in space.heads)
    neurons = tuple(random.normal(size=n).astype(np.float32) for n in space.neurons)
    return ActivationMeans(heads, neurons)


def constants(mask: Mask) -> list[Any]:
    """The mean of every removed unit, in the flat order."""
    assert mask.means is not None
    kinds = {"head": mask.means.heads, "neuron": mask.means.neurons}
    return [kinds[unit.kind][unit.layer][unit.index].tolist() for unit in mask.units]


def round_trip(mask: Mask) -> Mask:
    with tempfile.TemporaryDirectory() as directory:
        mask.save(Path(directory) / "mask.safetensors")
        return Mask.load(Path(directory) / "mask.safetensors")


@given(spaces())
def test_flat_and_unit_are_inverse(space: UnitSpace) -> None:
    units = [space.unit(flat) for flat in range(len(space))]
    assert [space.flat(unit) for unit in units] == list(range(len(space)))
    assert units == sorted(units)  # heads before neurons, layer by layer
    assert len(set(units)) == len(space) == space.n_heads + space.n_neurons


@given(spaces())
def test_slices_cover_the_flat_order(space: UnitSpace) -> None:
    slices = [*map(space.head_slice, range(space.n_layers)), *map(space.neuron_slice, range(space.n_layers))]
    flat = [position for part in slices for position in range(len(space))[part]]
    assert flat == list(range(len(space)))
    for layer in range(space.n_layers):
        assert {space.unit(f).layer for f in range(len(space))[space.head_slice(layer)]} <= {layer}


@given(spaces(), st.sampled_from(["head", "neuron"]), st.integers(-2, 8), st.integers(-2, 8))
def test_flat_refuses_units_that_do_not_exist(space: UnitSpace, kind: Any, layer: int, index: int) -> None:
    counts = space.heads if kind == "head" else space.neurons
    assume(not (0 <= layer < len(counts) and 0 <= index < counts[layer]))
    with pytest.raises(MaskError, match=f"no {kind} {index} in layer {layer}"):
        space.flat(Unit(kind, layer, index))


@given(masks())
def test_mask_file_round_trip(drawn: list[Mask]) -> None:
    mask = drawn[0]
    loaded = round_trip(mask)
    assert loaded == mask
    assert loaded.space == mask.space
    assert loaded.key == mask.key
    assert loaded.fingerprint == "f"
    assert loaded.keep.tolist() == mask.keep.tolist()
    assert loaded.ablation == mask.ablation
    if mask.means is not None:
        assert constants(loaded) == constants(mask)


@given(masks(count=3))
def test_and_is_a_union_of_what_is_removed(drawn: list[Mask]) -> None:
    one, two, three = drawn
    assert one & two == two & one
    assert one & one == one
    assert (one & two) & three == one & (two & three)
    assert set((one & two).units) == set(one.units) | set(two.units)
    assert (one & two).ablation == one.ablation


@given(masks(count=2))
def test_and_keeps_the_means_of_both_after_reading_files(drawn: list[Mask]) -> None:
    one, two = drawn
    joined = round_trip(one) & round_trip(two)
    assert joined == one & two
    if one.means is not None:
        assert constants(joined) == constants(one & two)


@given(masks(count=2))
def test_keys_are_equal_for_equal_masks_only(drawn: list[Mask]) -> None:
    one, two = drawn
    same = one.keep.tolist() == two.keep.tolist()
    assert (one.key == two.key) == same
    assert (one == two) == same
    assert hash(one) == hash(replace(one))


@given(masks(), st.integers(10, 12))
def test_keys_tell_ablations_apart(drawn: list[Mask], seed: int) -> None:
    mask = drawn[0]
    assume(len(mask.removed) > 0)
    zero, mean = replace(mask, means=None), replace(mask, means=means_of(mask.space, seed))
    other = replace(mask, means=means_of(mask.space, seed + 10))
    assert len({zero.key, mean.key, other.key}) == 3
    assert len({zero, mean, other}) == 3


def test_masks_of_different_kinds_do_not_combine() -> None:
    space = UnitSpace((2,), (2,), (3,), HEAD_DIM)
    keep = np.array([False, True, True, True, True])
    mask = Mask(space, keep, "f")
    mean = replace(mask, means=means_of(space, 0))
    with pytest.raises(MaskError, match="different models"):
        mask & replace(mask, fingerprint="g")
    with pytest.raises(MaskError, match="different models"):
        mask & Mask(UnitSpace((3,), (3,), (2,), HEAD_DIM), keep, "f")
    with pytest.raises(MaskError, match="zero ablation and one with mean"):
        mask & mean
    with pytest.raises(MaskError, match="different means"):
        mean & replace(mask, means=means_of(space, 1))


def test_mask_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(MaskError, match="5 entries"):
        Mask(UnitSpace((2,), (2,), (3,), HEAD_DIM), np.ones(4, dtype=bool), "f")


def test_mask_cannot_be_changed_from_outside() -> None:
    keep = np.ones(5, dtype=bool)
    mask = Mask(UnitSpace((2,), (2,), (3,), HEAD_DIM), keep, "f")
    keep[:] = False
    assert mask.keep.all()
    with pytest.raises(ValueError, match="read-only"):
        mask.keep[0] = False


def test_removing_takes_units_and_positions() -> None:
    model = tiny_model("llama")
    units = [Unit("head", 1, 3), Unit("neuron", 0, 0), Unit("neuron", 1, 5)]
    mask = Mask.removing(model, units)
    assert mask.units == units
    assert mask.removed.tolist() == [7, 8, 61]
    assert (mask.heads_removed, mask.neurons_removed) == (1, 2)
    assert Mask.removing(model, [7, 8, 61]) == mask
    assert Mask.none(model).units == []
    with pytest.raises(MaskError, match="no head 4 in layer 0"):
        Mask.removing(model, [Unit("head", 0, 4)])


@pytest.mark.parametrize("position", [-1, 104])
def test_removing_refuses_positions_that_do_not_exist(position: int) -> None:
    with pytest.raises(MaskError, match=str(position)):
        Mask.removing(tiny_model("llama"), [position])


@pytest.mark.parametrize("other", [tiny_model("llama", seed=1), tiny_model("gpt2")], ids=["seed", "family"])
def test_mask_of_another_model_is_refused(other: LanguageModel) -> None:
    model = tiny_model("llama")
    mask = Mask.removing(model, [0])
    with pytest.raises(MaskError) as refusal, masked(other, mask):
        pass
    message = str(refusal.value)
    assert model.fingerprint in message
    assert other.fingerprint in message
    assert other.source in message


def saved_mask(directory: Path, mean: bool = True) -> Path:
    space = UnitSpace((2, 2), (2, 2), (3, 3), HEAD_DIM)
    keep = np.array([False, True] * 5)
    path = directory / "mask.safetensors"
    Mask(space, keep, "f", means_of(space, 0) if mean else None).save(path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_mask_file(share: float, tmp_path: Path) -> None:
    path = saved_mask(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(MaskError, match=r"mask\.safetensors"):
        Mask.load(path)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=300)
def test_damaged_mask_file_gives_a_mask_or_a_mask_error(position: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = saved_mask(Path(directory))
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= change
        path.write_bytes(content)
        try:
            loaded = Mask.load(path)
        except MaskError:
            return
        assert isinstance(loaded, Mask)
        assert all(loaded.space.flat(unit) >= 0 for unit in loaded.units)


def write_foreign(path: Path) -> None:
    save_file({"removed": np.arange(3)}, str(path))


def write_json(path: Path) -> None:
    path.write_text(json.dumps({"format": "secateur-mask-1", "removed": [1, 2]}))


@pytest.mark.parametrize("write", [write_foreign, write_json, Path.mkdir, lambda path: None])
def test_what_is_not_a_mask_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write(path)
    with pytest.raises(MaskError, match=r"other\.safetensors"):
        Mask.load(path)


HEADER_CHANGES: dict[str, dict[str, object]] = {
    "later format": {"format": "secateur-mask-2"},
    "no fingerprint": {"fingerprint": None},
    "no space": {"space": None},
    "space is a list": {"space": [1]},
    "space is text": {"space": "{"},
    "space is negative": {"space": {"heads": [-9], "kv_heads": [2], "neurons": [3], "head_dim": 3}},
    "space is huge": {"space": {"heads": [4000000000000000], "kv_heads": [2], "neurons": [3], "head_dim": 3}},
    "space is too large for Python": {"space": {"heads": [2**70], "kv_heads": [1], "neurons": [1]}},
    "space is small": {"space": {"heads": [1], "kv_heads": [1], "neurons": [1], "head_dim": 3}},
    "no ablation": {"ablation": None},
    "unknown ablation": {"ablation": "median"},
}


@pytest.mark.parametrize("change", HEADER_CHANGES.values(), ids=HEADER_CHANGES)
def test_mask_file_with_wrong_header(change: dict[str, object], tmp_path: Path) -> None:
    path = saved_mask(tmp_path, mean=False)
    with safe_open(str(path), framework="numpy") as file:
        header = {**json.loads(file.metadata()["secateur"]), **change}
    text = json.dumps({key: value for key, value in header.items() if value is not None})
    save_file({"removed": np.array([0, 3], np.int32)}, str(path), {"secateur": text})
    with pytest.raises(MaskError, match=r"mask\.safetensors"):
        Mask.load(path)


@pytest.mark.parametrize("text", ["{", "[1]", "null", "1"])
def test_mask_file_with_no_header(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    save_file({"removed": np.array([0], np.int32)}, str(path), {"secateur": text})
    with pytest.raises(MaskError, match=r"mask\.safetensors"):
        Mask.load(path)


@pytest.mark.parametrize("mean", [False, True])
def test_equal_masks_give_equal_files(mean: bool, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = saved_mask(tmp_path / "a", mean=mean), saved_mask(tmp_path / "b", mean=mean)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("removed", [[-1], [10], [0.5]])
def test_mask_file_with_wrong_units(removed: list[float], tmp_path: Path) -> None:
    path = saved_mask(tmp_path, mean=False)
    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata()
    save_file({"removed": np.array(removed)}, str(path), metadata)
    with pytest.raises(MaskError, match=r"mask\.safetensors"):
        Mask.load(path)


def test_ablation_names() -> None:
    assert check_ablation("zero") == "zero"
    assert check_ablation("mean") == "mean"
    with pytest.raises(SettingError, match="'median'"):
        check_ablation("median")


def test_plan_round_trip(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = Plan(Mask.removing(model, [Unit("head", 0, 1), Unit("neuron", 1, 2)]), {"method": "random", "seed": 3})
    plan.save(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "plan.json"):
        loaded = load_plan(path)
        assert loaded.mask == plan.mask
        assert loaded.record == plan.record
    content = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert content["units"] == ["head 0.1", "neuron 1.2"]
    with loaded.applied(model):
        pass
    with pytest.raises(MaskError, match="another model"), loaded.applied(tiny_model("llama", seed=1)):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "secateur-plan-1"}',
        '{"format": "secateur-plan-1", "mask": "gone.safetensors"}',
        '{"format": "secateur-plan-1", "mask": "../mask.safetensors"}',
        '{"format": "secateur-plan-1", "mask": 3}',
        "\udcff",
    ],
)
def test_broken_plan(text: str, tmp_path: Path) -> None:
    saved_mask(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MaskError, match="run"):
        load_plan(tmp_path / "run")


def test_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="There is no plan"):
        load_plan(tmp_path)


def language_model(transformer: Any) -> LanguageModel:
    return LanguageModel(transformer, tiny_tokenizer(), "tiny")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_fingerprint_does_not_depend_on_precision(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    model = language_model(tiny_transformer(name).to(stored))
    model.save_pretrained(tmp_path)
    fingerprints = {secateur.load(tmp_path, dtype=d, device="cpu").fingerprint for d in ("float32", "bfloat16", "auto")}
    assert fingerprints == {model.fingerprint}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_fingerprint_sees_every_parameter(name: str) -> None:
    original = language_model(tiny_transformer(name)).fingerprint
    names = [key for key, _ in tiny_transformer(name).named_parameters()]
    changed = []
    for key in names:
        transformer = tiny_transformer(name)
        transformer.get_parameter(key).data *= 1.05
        changed.append(language_model(transformer).fingerprint)
    assert len({original, *changed}) == len(names) + 1


def test_fingerprint_sees_the_configuration() -> None:
    assert tiny_model("llama").fingerprint == tiny_model("llama").fingerprint
    assert tiny_model("llama").fingerprint != tiny_model("mistral").fingerprint  # equal weights
