"""``peft``: an IA3 adapter of PEFT, a vector of factors on the inputs of the output projections.

IA3 (Liu et al., 2022) multiplies the input of a feed-forward projection by a learned vector; a unit's gate is an entry
of such a vector, or for a head as many as its width. The adapter is exact, small, and leaves the base model as it is.
Only projections with a gate below 1 are named.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from secateur.attenuation import Attenuation
from secateur.errors import MaskError
from secateur.files import to_json, write_text
from secateur.models import LanguageModel
from secateur.models.loading import hub_name
from secateur.units import Mask, UnitSpace
from secateur.weights import AnyMask

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def write_adapter(model: LanguageModel, mask: AnyMask, directory: str | Path) -> None:
    """Write a mask or an attenuation so that ``PeftModel.from_pretrained`` loads it on the base model.

    Raises
    ------
    MaskError: it is for another model, uses mean ablation, or removes single weights: factors on activations cannot
        carry those.
    """
    check_adapter(model, mask)
    assert isinstance(mask, Mask | Attenuation)
    vectors = factors(model, mask.gates if isinstance(mask, Attenuation) else mask.keep.astype(np.float32))
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_name(model),
        "target_modules": sorted(vectors),
        "feedforward_modules": sorted(vectors),
        "fan_in_fan_out": model.family.transposed,
        "init_ia3_weights": True,
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.ia3_l": vector[None] for name, vector in vectors.items()}  # (1, inputs)
    if isinstance(mask, Mask):  # 0 and 1 are exact in half the space
        tensors = {name: vector.astype(np.float16) for name, vector in tensors.items()}
    save_file(tensors, str(directory / WEIGHTS_FILE), metadata={"format": "pt"})
    write_text(directory / CONFIG_FILE, to_json(config))


def check_adapter(model: LanguageModel, mask: AnyMask) -> None:
    """Refuse what :func:`write_adapter` would, before anything is written."""
    mask.check(model)
    if not isinstance(mask, Mask | Attenuation):
        raise MaskError("An adapter cannot carry single weights that are removed; write a checkpoint (hf) instead.")
    if mask.is_empty:
        raise MaskError("The plan changes no unit, so there is nothing to adapt.")
    if mask.ablation == "mean":
        raise MaskError("An IA3 adapter cannot carry the means of removed units; use zero ablation.")


def factors(model: LanguageModel, gates: np.ndarray) -> dict[str, np.ndarray]:
    """Factors on the inputs of every output projection with a gate below 1, (inputs,), by its path in the causal LM.

    Parameters
    ----------
    gates: fp32 (units,).
    """
    space, family = UnitSpace.of(model), model.family
    found = {}
    for layer in range(space.n_layers):
        heads, neurons = gates[space.head_slice(layer)], gates[space.neuron_slice(layer)]
        prefix = f"{family.blocks}.{layer}"
        found[f"{prefix}.{family.attention_out}"] = np.repeat(heads, space.head_dim)
        found[f"{prefix}.{family.mlp_out}"] = neurons
    return {name: np.ascontiguousarray(vector) for name, vector in found.items() if (vector < 1).any()}
