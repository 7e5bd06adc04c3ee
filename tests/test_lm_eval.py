"""lm-evaluation-harness runs on what is exported, with a task file of one's own, and finds the masked model in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_export import some_mask
from tiny import tiny_model

import secateur
from secateur.units import masked

QUESTIONS = [f"Is {number} even?" for number in range(6)]
CHOICES = (" yes", " no")
TASK = {
    "task": "even",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": [choice.strip() for choice in CHOICES],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("kind", ["hf", "hf-uniform"])
def test_the_harness_measures_the_masked_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    mask = some_mask(model)
    directory = secateur.export(model, secateur.Plan(mask, {}), tmp_path / "export", format=kind)
    items = [{"question": question, "answer": number % 2} for number, question in enumerate(QUESTIONS)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.json")}}}
    (tmp_path / "even.yaml").write_text(yaml.safe_dump(task))
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={directory}"),
        *("--tasks", "even", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "4"),
        *("--output_path", tmp_path / "results", "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **offline})
    assert result.returncode == 0, result.stderr
    (samples,) = (tmp_path / "results").rglob("samples_even_*.jsonl")
    found = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc_id"]] = [float(answer[0][0]) for answer in sample["resps"]]
    with masked(model, mask):
        for number, question in enumerate(QUESTIONS):
            expected = [log_likelihood(model, question, choice) for choice in CHOICES]
            np.testing.assert_allclose(found[number], expected, atol=1e-3)


@torch.no_grad()
def log_likelihood(model: secateur.LanguageModel, context: str, answer: str) -> float:
    """Log-probability of an answer's tokens after a context."""
    before, after = (model.tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, answer))
    ids = torch.cat([before, after], dim=1)
    log_probabilities = model.model(input_ids=ids).logits[0].log_softmax(-1)
    rows = torch.arange(before.shape[1] - 1, ids.shape[1] - 1)
    return float(log_probabilities[rows, ids[0, before.shape[1] :]].sum())
