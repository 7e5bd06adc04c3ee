"""The sampled form of a quantity: the parser, and samples against the model's own distribution."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command, save_model, write_suite
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from secateur.errors import SettingError
from secateur.measures.prompts import build_prompts
from secateur.measures.sampling import SampledAmounts, check_sampling, parse_amount, quantity_prompts, sample_amounts
from secateur.measures.splits import whole
from secateur.suites import Suite, load_suite


def small() -> Suite:
    with tempfile.TemporaryDirectory() as directory:
        return load_suite(write_suite(Path(directory)))


SUITE = small()


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("65,000 a year", 65_000),
        ("$1.5 million, at most", 1.5e6),
        ("about 70k", 70_000),
        ("between 40 and 50", 40),
        (".5 points", 0.5),
        ("1,234,567.25", 1_234_567.25),
        ("12 months", 12),
        ("3 kittens", 3),
        ("7,5", 7),
        ("none at all", None),
        ("0", None),
        ("", None),
        ("A4 paper, 20 sheets", 20),
    ],
)
def test_first_amount(text: str, amount: float | None) -> None:
    assert parse_amount(text) == amount


@given(st.integers(1, 10**12), st.sampled_from(["", " dollars", ", I think", "."]))
def test_written_amounts_are_read_back(amount: int, after: str) -> None:
    assert parse_amount(f"I offer ${amount:,}{after}") == amount
    assert parse_amount(f"I offer {amount}{after}") == amount


@given(st.text())
def test_any_text_can_be_parsed(text: str) -> None:
    amount = parse_amount(text)
    assert amount is None or amount > 0


def test_only_quantities_are_sampled_and_seeds_repeat() -> None:
    model = tiny_model()
    prompts = build_prompts(model, SUITE, whole(SUITE))
    one = sample_amounts(model, prompts, runs=3, new_tokens=4, seed=1)
    assert {SUITE.scenarios[p.scenario].id for p in one.prompts.prompts} == {"price"}
    assert one.amounts.shape == (len(one.prompts), 3) == (48, 3)
    again = sample_amounts(model, prompts, runs=3, new_tokens=4, seed=1)
    np.testing.assert_array_equal(one.amounts, again.amounts)
    other = sample_amounts(model, prompts, runs=3, new_tokens=4, seed=2)
    assert not np.array_equal(one.amounts, other.amounts, equal_nan=True)


def test_samples_follow_the_model_distribution() -> None:
    """The first digit of one-token answers against the softmax of plain logits at the same temperature."""
    model = tiny_model()
    prompts = quantity_prompts(build_prompts(model, SUITE, whole(SUITE)))
    runs, temperature = 3000, 2.0
    single = type(prompts)(prompts.suite, prompts.prompts[:1], prompts.markers, prompts.groups)
    amounts = sample_amounts(model, single, runs=runs, temperature=temperature, new_tokens=1).amounts[0]
    with torch.no_grad():
        logits = model.model(torch.tensor([single.prompts[0].context])).logits[0, -1]
    probability = (logits / temperature).softmax(-1)
    digits = [model.tokenizer(str(d), add_special_tokens=False)["input_ids"][0] for d in range(1, 10)]
    expected = float(probability[digits].sum())
    error = 4 * (expected * (1 - expected) / runs) ** 0.5
    assert abs(np.isfinite(amounts).mean() - expected) < error


def amounts_of(values: list[list[float]]) -> SampledAmounts:
    model = tiny_model()
    prompts = quantity_prompts(build_prompts(model, SUITE, whole(SUITE)))
    kept = type(prompts)(prompts.suite, prompts.prompts[: len(values)], prompts.markers, prompts.groups)
    return SampledAmounts(np.array(values), kept)


def test_inlier_ratio_counts_what_lies_in_the_unpruned_range() -> None:
    unpruned = amounts_of([[10.0, 20.0, 30.0], [np.nan, np.nan, np.nan]])
    pruned = amounts_of([[20.0, 29.0, np.nan], [5.0, 5.0, 5.0]])
    assert pruned.inlier_ratio(unpruned) == pytest.approx(2 / 6)
    assert pruned.parsed == pytest.approx(5 / 6)


def test_y_is_the_mean_logarithm_of_what_was_read() -> None:
    y = amounts_of([[1.0, np.e**2, np.nan], [np.nan, np.nan, np.nan]]).y()
    assert y[0] == pytest.approx(1.0)
    assert np.isnan(y[1])


def test_agreement_is_spearmans_correlation_within_scenarios() -> None:
    sampled = amounts_of([[1.0], [2.0], [4.0], [np.nan]])
    assert sampled.agreement(np.array([0.1, 0.2, 0.3, 9.0])) == pytest.approx(1)
    assert sampled.agreement(np.array([0.3, 0.2, 0.1, 9.0])) == pytest.approx(-1)
    assert np.isnan(amounts_of([[np.nan], [1.0]]).agreement(np.zeros(2)))


def test_bad_settings_and_suites_without_quantities_are_refused() -> None:
    model = tiny_model()
    prompts = build_prompts(model, SUITE, whole(SUITE))
    for bad in ({"runs": 0}, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(SettingError, match="Sampling needs"):
            sample_amounts(model, prompts, **bad)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="asks for a quantity"):
        check_sampling(load_suite("occupations"), 5, 1.0)


def test_audit_compares_samples_with_what_was_measured(tmp_path: Path, output: Path, call: Command) -> None:
    inputs = ("-m", save_model(tmp_path / "model"), "-s", write_suite(tmp_path), "--device", "cpu")
    outcome = call("audit", *inputs, "-o", output, "--sampled-runs", "2", "--temperature", "0.5")
    assert (outcome.status, outcome.err) == (0, "")
    found = json.loads((output / "audit.json").read_text())["sampled"]
    assert (found["runs"], found["temperature"]) == (2, 0.5)
    assert f"{found['parsed']:.0%} hold an amount" in outcome.out
    assert "Sampled answers (2 a prompt, temperature 0.5)" in (output / "report.html").read_text()
    assert "a temperature above 0" in call("audit", *inputs, "--sampled-runs", "2", "--temperature", "0").refusal
