"""The precision of fp32 products: the model's inside it, the highest in its head, the process's own elsewhere.

And the model's is chosen by what is measured, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from command import save_model
from test_scoring import fit_of
from tiny import prompts, tiny_model

import secateur
from secateur.models import precision
from secateur.models.language_model import LanguageModel
from secateur.models.precision import PASSAGE, TOKENS, PrecisionTrial, choose_precision, try_precision
from secateur.scoring.attribution import Attribution
from secateur.studies.record import Recorder
from secateur.units import Mask


@pytest.fixture
def reset() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_blocks_take_the_models_precision_and_the_head_the_highest() -> None:
    model, seen = tiny_model(), []
    model.matmul_precision = "medium"
    model.mlp_outputs[0].register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    hidden = model.hidden(prompts(model), None, None)
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == before
    head = model.model.get_output_embeddings().weight
    with model.arithmetic():
        logits = model.logits(hidden[0])
        assert torch.get_float32_matmul_precision() == "medium"
    torch.testing.assert_close(logits, hidden[0] @ head.T, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("reset")
def test_the_process_keeps_its_own_precision_after_an_error() -> None:
    model = tiny_model()
    torch.set_float32_matmul_precision("high")
    with model.arithmetic():
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError), model.arithmetic():
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "high"


def test_backward_passes_take_the_models_precision() -> None:
    fit, seen = fit_of(), []
    fit.model.matmul_precision = "medium"
    handle = fit.model.mlp_outputs[0].register_full_backward_pre_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    try:
        Attribution().score(fit, Mask.none(fit.model))
    finally:
        handle.remove()
        fit.model.matmul_precision = "highest"
    assert seen
    assert set(seen) == {"medium"}


def clock_of(monkeypatch: pytest.MonkeyPatch, plain: float, lower: float, shift: float = 0.0) -> Callable[[], float]:
    """A clock by which passes take so many seconds; those in the lower precision are off by a shift."""
    now = 0.0
    hidden, logits = LanguageModel.hidden, LanguageModel.logits

    def slow(self: LanguageModel, *arguments: torch.Tensor | None) -> torch.Tensor:
        nonlocal now
        now += lower if self.matmul_precision == "medium" else plain
        return hidden(self, *arguments)  # type: ignore[arg-type]

    def shifted(self: LanguageModel, states: torch.Tensor) -> torch.Tensor:
        found = logits(self, states)
        if self.matmul_precision == "medium":
            found[:, ::2] += shift
        return found

    monkeypatch.setattr(LanguageModel, "hidden", slow)
    monkeypatch.setattr(LanguageModel, "logits", shifted)
    return lambda: now


@pytest.mark.parametrize(
    ("lower", "shift", "chosen"),
    [(0.5, 0.0, "medium"), (0.9, 0.0, "highest"), (2.0, 0.0, "highest"), (0.5, 0.5, "highest"), (0.5, 0.02, "medium")],
)
def test_lower_precision_is_taken_where_it_is_much_faster_and_close(
    monkeypatch: pytest.MonkeyPatch, lower: float, shift: float, chosen: str
) -> None:
    trial = try_precision(tiny_model(), clock_of(monkeypatch, 1.0, lower, shift))
    assert trial.chosen == chosen
    assert trial.speed == pytest.approx(1 / lower)
    assert trial.error == pytest.approx(shift, abs=1e-2)
    assert f"{1 / lower:.2f} times as fast" in str(trial)


def test_values_that_are_not_finite_keep_the_highest_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = try_precision(tiny_model(), clock_of(monkeypatch, 1.0, 0.5, float("nan")))
    assert trial == PrecisionTrial("highest", 2.0, None)
    assert "not finite" in str(trial)


def test_the_passage_repeats_no_sentence() -> None:
    sentences = PASSAGE.split(". ")
    assert len(set(sentences)) == len(sentences) > 10
    assert len(PASSAGE.split()) > TOKENS / 2


def test_what_is_no_fp32_model_is_not_tried(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.to(torch.bfloat16)
    assert choose_precision(model, tmp_path) is None
    assert model.usage.forward == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trials are kept in a test; lower precision is as good as any in it."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "FASTER", 0.0)
    monkeypatch.setattr(precision, "CLOSE", 100.0)
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_the_choice_is_said_and_noted_and_loads_again_as_it_is(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    assert secateur.load(source, device="cpu").precision_trial is None
    with pytest.warns(UserWarning, match="--matmul-precision medium repeats this choice"):
        model = secateur.load(source, device="cpu", matmul_precision="auto")
    assert model.matmul_precision == "medium"
    assert model.precision_trial is not None
    assert model.loaded_with is not None
    assert model.loaded_with["matmul_precision"] == "medium"
    assert model.usage.forward == 0  # a trial is no part of any study's cost
    told = Recorder(model).describe({})["model"]
    assert told["precision_trial"] == asdict(model.precision_trial)


def test_a_trial_is_made_once_for_a_model_and_a_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    first = choose_precision(model, cache)
    assert first is not None
    assert first.chosen == "medium"
    monkeypatch.setattr(precision, "FASTER", 1e9)  # a trial would come out otherwise now
    assert choose_precision(model, cache) == first
    assert choose_precision(tiny_model(), cache) == first
    found = choose_precision(other, cache)
    assert found is not None
    assert found.chosen == "highest"
    monkeypatch.setattr(precision.platform, "node", lambda: "elsewhere")
    assert choose_precision(model, cache) != first


@pytest.mark.parametrize("damaged", ["", "[]", "{}", '{"chosen": "medium"}'])
def test_a_damaged_trial_is_made_again(cache: Path, damaged: str) -> None:
    model = tiny_model()
    choose_precision(model, cache)
    (kept,) = cache.iterdir()
    kept.write_text(damaged)
    found = choose_precision(model, cache)
    assert found is not None
    assert json.loads(kept.read_text()) == asdict(found)


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert choose_precision(tiny_model(), tmp_path / "file" / "precision") is not None
