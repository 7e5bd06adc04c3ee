"""``hf``: a plain Hugging Face directory with the same shapes, removed units or weights zeroed."""

from __future__ import annotations

from pathlib import Path

from secateur.models import LanguageModel
from secateur.surgery.compact import write_code
from secateur.surgery.pruned import changed_config, pruned_state, save, shard_size
from secateur.weights import AnyMask


def write_checkpoint(model: LanguageModel, mask: AnyMask, directory: str | Path, shard: str | None = None) -> None:
    """Write the masked model so that transformers loads it without Secateur.

    The live model is left as it is.

    Parameters
    ----------
    shard: largest size of a file, such as "5GB"; None for the library's own.

    Raises
    ------
    MaskError: the mask is for another model, uses mean ablation in a family whose checkpoints have no bias
        to carry the means, or turns units down instead of removing them.
    """
    state, switches = pruned_state(model, mask)
    if switches:
        save(model, state, changed_config(model, switches), directory, shard=shard)
    else:
        model.model.save_pretrained(directory, state_dict=state, **shard_size(shard))
        model.tokenizer.save_pretrained(directory)
    if model.compact is not None:
        write_code(directory)
