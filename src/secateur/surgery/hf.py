"""``hf``: a plain Hugging Face directory with the same shapes, removed units or weights zeroed.

A unit contributes to the residual stream only through its columns of an output projection, so
zeroing those columns removes it exactly. With mean ablation its constant contribution moves into the
projection's bias. Single weights are zeroed where they stand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.attenuation import Attenuation
from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.units import Mask
from secateur.weights import AnyMask, WeightMask


def write_checkpoint(model: LanguageModel, mask: AnyMask, directory: str | Path) -> None:
    """Write the masked model so that transformers loads it without Secateur.

    The live model is left as it is.

    Raises
    ------
    MaskError: the mask is for another model, uses mean ablation in a family whose checkpoints have no bias
        to carry the means, or turns units down instead of removing them.
    """
    if isinstance(mask, Attenuation):
        raise MaskError("Units that are turned down leave as an adapter; a checkpoint holds removed units alone.")
    if isinstance(mask, WeightMask):
        with mask.applied(model):
            _save(model, dict(model.model.state_dict()), set(), directory)
        return
    mask.check(model)
    state = dict(model.model.state_dict())
    switches: set[str] = set()
    for layer in range(mask.space.n_layers):
        for width, names, off, means in _projections(model, mask, layer):
            if off.any():
                switches |= _remove(model, state, names, np.repeat(off, width), means)
    _save(model, state, switches, directory)


def _projections(
    model: LanguageModel, mask: Mask, layer: int
) -> list[tuple[int, tuple[str, int], np.ndarray, np.ndarray | None]]:
    """The two output projections of a layer: unit width, (name, bias switch), units off, means."""
    prefix = f"{model.family.blocks}.{layer}."
    heads = ~mask.keep[mask.space.head_slice(layer)]
    neurons = ~mask.keep[mask.space.neuron_slice(layer)]
    head_means = None if mask.means is None else mask.means.heads[layer].reshape(-1)
    neuron_means = None if mask.means is None else mask.means.neurons[layer]
    return [
        (mask.space.head_dim, (prefix + model.family.attention_out, 0), heads, head_means),
        (1, (prefix + model.family.mlp_out, 1), neurons, neuron_means),
    ]


def check_ablation_fits(model: LanguageModel, ablation: str) -> None:
    """Refuse mean ablation where the family's plain checkpoints have no bias to carry the means.

    Raises
    ------
    MaskError: says to use zero ablation.
    """
    outputs = [*model.attention_outputs, *model.mlp_outputs]
    if ablation == "mean" and model.family.bias_switches is None and any(module.bias is None for module in outputs):
        raise _no_bias(model)


def _no_bias(model: LanguageModel) -> MaskError:
    return MaskError(
        f"Checkpoints of type '{model.model.config.model_type}' have no bias that could carry the means "
        "of removed units; use zero ablation."
    )


def _remove(
    model: LanguageModel, state: dict[str, Tensor], name: tuple[str, int], off: np.ndarray, means: np.ndarray | None
) -> set[str]:
    """Zero the input columns of one projection in ``state``; return the config flags that it needs."""
    module, position = name
    weight = state[f"{module}.weight"].clone()
    columns = torch.from_numpy(off).to(weight.device)
    inputs_last = weight.T if model.family.transposed else weight  # (out, in), a view either way
    switches: set[str] = set()
    if means is not None:
        constant = inputs_last[:, columns].float() @ torch.from_numpy(means[off]).to(weight.device)
        bias = state.get(f"{module}.bias")
        if bias is None:
            if model.family.bias_switches is None:
                raise _no_bias(model)
            switches.add(model.family.bias_switches[position])
            bias = torch.zeros(inputs_last.shape[0], dtype=weight.dtype, device=weight.device)
        state[f"{module}.bias"] = (bias.float() + constant).to(weight.dtype)
    inputs_last[:, columns] = 0
    state[f"{module}.weight"] = weight
    return switches


def _save(model: LanguageModel, state: dict[str, Tensor], switches: set[str], directory: str | Path) -> None:
    plain = model.model
    if switches:
        config = type(plain.config).from_dict({**plain.config.to_dict(), **dict.fromkeys(switches, True)})
        with torch.device("meta"):
            plain = type(plain)(config)
        for key, parameter in plain.state_dict().items():
            if key not in state:  # the other biases that the flag brings
                state[key] = torch.zeros(parameter.shape, dtype=model.dtype)
        plain.load_state_dict(state, assign=True)
        plain.tie_weights()
        plain.generation_config = model.model.generation_config
        plain.save_pretrained(directory)
    else:
        plain.save_pretrained(directory, state_dict=state)
    model.tokenizer.save_pretrained(directory)
