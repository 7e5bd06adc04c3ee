"""``compact``: exactly the plan's units removed, every layer of its own size.

Removed neurons leave all three projections. A removed query head leaves the query and output projections; a KV head
leaves with the last of the query heads that share it. In families whose heads cannot leave (see
:mod:`secateur.models.families`) they stay, zeroed. :func:`secateur.load` loads the directory without running any code
in it; transformers does so with the code that lies beside the weights, a copy of :mod:`secateur.models.compact`, once
its user says ``trust_remote_code=True``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from secateur.errors import MaskError
from secateur.files import write_text
from secateur.models import LanguageModel, compact
from secateur.surgery.pruned import changed_config, check_units, pruned_state, save
from secateur.surgery.sizes import exactly, shrink
from secateur.units import UnitSpace
from secateur.weights import AnyMask

CODE = "modeling_compact"


def write_compact(model: LanguageModel, mask: AnyMask, directory: str | Path, shard: str | None = None) -> None:
    """Write the masked model without the units that it removes.

    Parameters
    ----------
    shard: largest size of a file, such as "5GB"; None for the library's own.

    Raises
    ------
    MaskError: the mask does not remove units, is for another model, or the family cannot carry its means; the model
        is compact already.
    """
    check_compact(model, mask)
    keep = check_units(model, mask).keep
    state, switches = pruned_state(model, mask)
    space, family = UnitSpace.of(model), model.family
    layers = exactly(space, keep, family.heads_shrink)
    shrink(model, state, layers)
    sizes = {
        "blocks": family.blocks,
        "attention": family.attention,
        "width": family.width,
        "head_dim": space.head_dim,
        "layers": [
            {
                "neurons": len(kept.neurons),
                **({"heads": kept.heads_by_group(heads // groups)} if family.heads_shrink else {}),
            }
            for kept, heads, groups in zip(layers, space.heads, space.kv_heads, strict=True)
        ],
    }
    config = changed_config(model, {**switches, compact.COMPACT: sizes})
    config.auto_map = {"AutoModelForCausalLM": f"{CODE}.{compact.CompactForCausalLM.__name__}"}
    save(model, state, config, directory, compact.compact_class(config), shard)
    write_code(directory)


def write_code(directory: str | Path) -> None:
    """Write the code that transformers loads a compact checkpoint with."""
    write_text(Path(directory) / f"{CODE}.py", inspect.getsource(compact))


def check_compact(model: LanguageModel, mask: AnyMask, **_: Any) -> None:
    """Refuse what :func:`write_compact` would, before anything is written."""
    keep, space = check_units(model, mask).keep, UnitSpace.of(model)
    layers = exactly(space, keep, model.family.heads_shrink)
    sizes = [(len(kept.heads), len(kept.neurons)) for kept in layers]
    if sizes == list(zip(space.heads, space.neurons, strict=True)):
        raise MaskError(
            "Nothing that this plan removes can leave a layer of this family, so nothing gets smaller; use hf."
        )
