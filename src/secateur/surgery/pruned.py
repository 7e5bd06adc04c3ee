"""The weights of a model without what a mask removes, and writing them as a checkpoint.

A unit contributes to the residual stream only through its columns of an output projection, so
zeroing those columns removes it exactly. With mean ablation its constant contribution moves into the
projection's bias. Single weights are zeroed where they stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from secateur.attenuation import Attenuation
from secateur.errors import MaskError
from secateur.models import LanguageModel
from secateur.units import Mask
from secateur.weights import AnyMask, WeightMask

State = dict[str, Tensor]


def pruned_state(model: LanguageModel, mask: AnyMask) -> tuple[State, dict[str, Any]]:
    """A state dict with what a mask removes zeroed, and the config flags that it needs; the live model is left alone.

    Raises
    ------
    MaskError: the mask is for another model, uses mean ablation in a family whose checkpoints have no bias
        to carry the means, or turns units down instead of removing them.
    """
    check_removal(model, mask)
    if isinstance(mask, WeightMask):
        with mask.applied(model):
            return {name: weight.clone() for name, weight in model.model.state_dict().items()}, {}
    assert isinstance(mask, Mask)
    state: State = dict(model.model.state_dict())
    switches: set[str] = set()
    for layer in range(mask.space.n_layers):
        for width, names, off, means in _projections(model, mask, layer):
            if off.any():
                switches |= _remove(model, state, names, np.repeat(off, width), means)
    return state, dict.fromkeys(switches, True)


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


def check_removal(model: LanguageModel, mask: AnyMask, **_: Any) -> None:
    """Refuse a mask that no checkpoint can carry.

    Raises
    ------
    MaskError: it is for another model, turns units down instead of removing them, or uses means that the family
        cannot carry.
    """
    mask.check(model)
    if isinstance(mask, Attenuation):
        raise MaskError(
            "Units that are turned down leave as an adapter (peft); a checkpoint holds removed units alone."
        )
    if not mask.is_empty:
        check_ablation_fits(model, mask.ablation)


def check_units(model: LanguageModel, mask: AnyMask) -> Mask:
    """A mask that removes whole units, for formats that get smaller.

    Raises
    ------
    MaskError: it removes single weights or turns units down, or see :func:`check_removal`.
    """
    if not isinstance(mask, Mask):
        raise MaskError("Only whole units that are removed make a model smaller; this plan has none.")
    check_removal(model, mask)
    return mask


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
    model: LanguageModel, state: State, name: tuple[str, int], off: np.ndarray, means: np.ndarray | None
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


def changed_config(model: LanguageModel, changes: dict[str, Any]) -> PretrainedConfig:
    """The model's configuration with other values.

    Raises
    ------
    StrictDataclassError: the configuration's class refuses the values.
    """
    config = model.model.config
    changed: PretrainedConfig = type(config).from_dict({**config.to_dict(), **changes})
    return changed


def save(
    model: LanguageModel,
    state: State,
    config: PretrainedConfig,
    directory: str | Path,
    kind: type[PreTrainedModel] | None = None,
    shard: str | None = None,
) -> None:
    """Write a state dict as a checkpoint of a configuration, with the tokenizer.

    Parameters
    ----------
    kind: class to build; None for the live model's own.
    shard: largest size of a file, such as "5GB"; None for the library's own.
    """
    with torch.device("meta"):
        plain = (kind or type(model.model))(config)
    for key, parameter in plain.state_dict().items():
        if key not in state:  # the other biases that a config flag brings
            state[key] = torch.zeros(parameter.shape, dtype=model.dtype)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.model.generation_config
    plain.save_pretrained(directory, **shard_size(shard))
    model.tokenizer.save_pretrained(directory)


def shard_size(shard: str | None) -> dict[str, Any]:
    """What ``save_pretrained`` is told of the size of files."""
    return {} if shard is None else {"max_shard_size": shard}
