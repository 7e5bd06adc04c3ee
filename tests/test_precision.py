"""The precision of matrix products is chosen by what is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import save_model
from tiny import tiny_model

import secateur
from secateur.models import precision
from secateur.models.language_model import LanguageModel
from secateur.models.precision import choose_precision


def clock_of(monkeypatch: pytest.MonkeyPatch, plain: float, lower: float, shift: float = 0.0) -> Callable[[], float]:
    """A clock by which passes take so many seconds; those in the lower precision are off by a shift."""
    now = 0.0
    hidden, log_probabilities = LanguageModel.hidden, LanguageModel.log_probabilities

    def slow(self: LanguageModel, *arguments: torch.Tensor | None) -> torch.Tensor:
        nonlocal now
        now += lower if self.matmul_precision == "medium" else plain
        return hidden(self, *arguments)  # type: ignore[arg-type]

    def shifted(self: LanguageModel, states: torch.Tensor) -> torch.Tensor:
        found = log_probabilities(self, states)
        if self.matmul_precision == "medium":
            found[:, ::2] += shift
        return found

    monkeypatch.setattr(LanguageModel, "hidden", slow)
    monkeypatch.setattr(LanguageModel, "log_probabilities", shifted)
    return lambda: now


@pytest.mark.parametrize(
    ("lower", "shift", "chosen"),
    [(0.5, 0.0, "medium"), (0.9, 0.0, "highest"), (2.0, 0.0, "highest"), (0.5, 0.5, "highest"), (0.5, 0.02, "medium")],
)
def test_bf16_is_taken_where_it_is_much_faster_and_close(
    monkeypatch: pytest.MonkeyPatch, lower: float, shift: float, chosen: str
) -> None:
    trial = choose_precision(tiny_model(), clock_of(monkeypatch, 1.0, lower, shift))
    assert trial.chosen == chosen
    assert trial.speed == pytest.approx(1 / lower)
    assert trial.error == pytest.approx(shift, abs=1e-2)
    assert f"{1 / lower:.2f} times as fast" in str(trial)


def test_what_is_no_fp32_model_is_not_tried() -> None:
    model = tiny_model()
    model.model.to(torch.bfloat16)
    assert choose_precision(model).chosen == "highest"
    assert model.usage.forward == 0


def test_the_choice_is_noted_and_loads_again_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "model")
    assert secateur.load(source, device="cpu").precision_trial is None
    monkeypatch.setattr(precision, "FASTER", 0.0)
    monkeypatch.setattr(precision, "CLOSE", 100.0)
    model = secateur.load(source, device="cpu", matmul_precision="auto")
    assert model.matmul_precision == "medium"
    assert model.precision_trial is not None
    assert model.loaded_with is not None
    assert model.loaded_with["matmul_precision"] == "medium"
    assert "--matmul-precision medium repeats this choice" in str(model.precision_trial)
    assert model.usage.forward == 0  # a trial is no part of any study's cost
