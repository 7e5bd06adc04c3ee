"""``hf-uniform``: a smaller plain Hugging Face directory, every layer with as many neurons and KV groups as the others.

A configuration has one number of neurons and one of heads for all layers. So every layer keeps as many as the layer
that keeps most; where a mask removes more of a layer than that, the first of its removed units stay, zeroed. The result
equals the masked model exactly, and is as small as that allows; ``secateur slim`` removes further units until all
layers are equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from secateur.errors import MaskError, SettingError
from secateur.models import LanguageModel
from secateur.surgery.pruned import State, changed_config, check_units, pruned_state, save
from secateur.surgery.sizes import evenly, shrink, widest
from secateur.units import UnitSpace
from secateur.weights import AnyMask


def write_uniform(
    model: LanguageModel,
    mask: AnyMask,
    directory: str | Path,
    multiple: int = 8,
    shard: str | None = None,
    weights: State | None = None,
) -> None:
    """Write the masked model with fewer neurons and KV groups in every layer.

    Parameters
    ----------
    multiple: the number of neurons per layer is one of it.
    shard: largest size of a file, such as "5GB"; None for the library's own.
    weights: in place of the model's own, by name.

    Raises
    ------
    MaskError: the mask does not remove units, is for another model, or leaves no layer smaller; the family cannot
        carry its means.
    SettingError: the multiple does not divide the number of neurons.
    """
    space, (groups, neurons) = UnitSpace.of(model), uniform_size(model, mask, multiple)
    state, switches = pruned_state(model, mask)
    state.update(weights or {})
    shrink(model, state, evenly(space, check_units(model, mask).keep, groups, neurons))
    config = changed_config(model, {**switches, model.family.width: neurons, **_head_sizes(model, groups)})
    save(model, state, config, directory, shard=shard)


def check_uniform(model: LanguageModel, mask: AnyMask, multiple: int = 8, **_: Any) -> None:
    """Refuse what :func:`write_uniform` would, before anything is written."""
    uniform_size(model, mask, multiple)


def uniform_size(model: LanguageModel, mask: AnyMask, multiple: int) -> tuple[int, int]:
    """KV groups and neurons that every layer keeps.

    Raises
    ------
    MaskError, SettingError: see :func:`write_uniform`.
    """
    keep, space = check_units(model, mask).keep, UnitSpace.of(model)
    check_multiple(space, multiple)
    groups, neurons = widest(space, keep)
    size = fewest_groups(model, groups), -(-neurons // multiple) * multiple
    if size == (space.kv_heads[0], space.neurons[0]):
        raise MaskError(
            "The plan leaves at least one layer whole, so no layer can be smaller in this format; "
            "make all layers equal with secateur slim, or use compact or gguf."
        )
    return size


def check_multiple(space: UnitSpace, multiple: int) -> None:
    """Refuse a multiple that does not divide the number of neurons per layer."""
    if multiple < 1 or space.neurons[0] % multiple:
        raise SettingError(f"The multiple {multiple} does not divide the {space.neurons[0]} neurons of a layer.")


def fewest_groups(model: LanguageModel, groups: int) -> int:
    """The least number of KV groups, from ``groups`` up, that the family's configuration takes."""
    most = model.kv_heads_per_layer[0]
    if not model.family.heads_shrink:
        return most
    for number in range(groups, most):
        try:
            changed_config(model, _head_sizes(model, number))
        except StrictDataclassError:  # Llama's hidden size must be a multiple of the heads
            continue
        return number
    return most


def _head_sizes(model: LanguageModel, groups: int) -> dict[str, int]:
    """Config entries for a smaller number of KV groups; none for all."""
    heads, kv_heads = model.heads_per_layer[0], model.kv_heads_per_layer[0]
    if groups == kv_heads:
        return {}
    return {
        "num_attention_heads": groups * (heads // kv_heads),
        "num_key_value_heads": groups,
        "head_dim": model.head_dim,
    }
