"""The sampled form of a quantity: the parser, and samples against the model's own distribution."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command, save_model, write_suite
from tiny import tiny_model

from secateur.errors import SettingError
from secateur.measures.amounts import parse_amount
from secateur.measures.prompts import build_prompts
from secateur.measures.sampling import SampledAmounts, check_sampling, quantity_prompts, sample_amounts
from secateur.measures.splits import whole
from secateur.suites import Suite, load_suite


def small() -> Suite:
    with tempfile.TemporaryDirectory() as directory:
        return load_suite(write_suite(Path(directory)))


SUITE = small()


def test_only_quantities_are_sampled_and_seeds_repeat() -> None:
    model = tiny_model()
    prompts = build_prompts(model, SUITE, whole(SUITE))
    one = sample_amounts(model, prompts, runs=3, new_tokens=4, seed=1)
    assert {SUITE.scenarios[p.scenario].id for p in one.prompts.prompts} == {"price"}
    assert one.amounts.shape == (len(one.prompts), 3) == (48, 3)
    again = sample_amounts(model, prompts, runs=3, new_tokens=4, seed=1)
    np.testing.assert_array_equal(one.amounts, again.amounts)
    assert one.texts == again.texts
    assert sample_amounts(model, prompts, runs=3, new_tokens=4, seed=2).texts != one.texts
    last = sample_amounts(model, prompts, runs=1, new_tokens=4, seed=1, first_run=2, batch_size=7)
    assert [texts[2:] for texts in one.texts] == list(last.texts)


def test_amounts_are_read_in_the_language_of_the_suite() -> None:
    model = tiny_model()
    spanish = SUITE.model_copy(update={"language": "es"})
    found = [
        sample_amounts(model, build_prompts(model, suite, whole(suite)), runs=40, new_tokens=8)
        for suite in (SUITE, spanish)
    ]
    assert found[0].texts == found[1].texts
    for sampled, language in zip(found, ("en", "es"), strict=True):
        texts = [text for row in sampled.texts for text in row]
        expected = [parse_amount(text, language) or np.nan for text in texts]
        np.testing.assert_array_equal(sampled.amounts.ravel(), expected)


def test_amounts_are_in_the_unit_of_their_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.measures.sampling.write", lambda _, requests, *__, **___: ["2 weeks"] * len(requests))
    model, document = tiny_model(), SUITE.model_dump()
    price = next(scenario for scenario in document["scenarios"] if scenario["id"] == "price")
    document["scenarios"].append({**price, "id": "wait", "measure": {**price["measure"], "unit": "days until then"}})
    suite = Suite.model_validate(document)
    found = sample_amounts(model, build_prompts(model, suite, whole(suite)), runs=2)
    scenarios = [suite.scenarios[prompt.scenario].id for prompt in found.prompts.prompts]
    assert set(scenarios) == {"price", "wait"}
    for scenario, row in zip(scenarios, found.amounts, strict=True):
        assert set(row) == {14.0 if scenario == "wait" else 2.0}


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


def test_audit_compares_samples_with_what_was_measured(
    tmp_path: Path, output: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = ("-m", save_model(tmp_path / "model"), "-s", write_suite(tmp_path), "--device", "cpu")
    outcome = call("audit", *inputs, "-o", output, "--sampled-runs", "2", "--temperature", "0.5")
    assert (outcome.status, outcome.err) == (0, "")
    found = json.loads((output / "audit.json").read_text())["sampled"]
    assert (found["runs"], found["temperature"]) == (2, 0.5)
    assert f"{found['parsed']:.0%} hold an amount" in outcome.out
    assert "Sampled answers (2 a prompt, temperature 0.5)" in (output / "report.html").read_text()
    monkeypatch.setattr("secateur.measures.sampling.write", lambda _, requests, *__, **___: ["none"] * len(requests))
    assert "correlation with the measured quantities cannot be computed" in " ".join(
        call("audit", *inputs, "-o", output.with_name("silent"), "--sampled-runs", "2").out.split()
    )
    assert json.loads((output.with_name("silent") / "audit.json").read_text())["sampled"]["agreement"] is None
    assert "a temperature above 0" in call("audit", *inputs, "--sampled-runs", "2", "--temperature", "0").refusal
