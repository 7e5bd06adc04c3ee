"""Causal language models whose layers differ in their numbers of heads and neurons.

This file needs PyTorch and transformers alone. A compact checkpoint holds a copy of it, so that transformers loads the
checkpoint by ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)``; read it before you consent.
``config.json`` has the sizes of the unpruned model, and under ``secateur_compact`` those of every layer.
"""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

COMPACT = "secateur_compact"
GROUPED = "secateur_grouped"


class CompactForCausalLM(PreTrainedModel):
    """What ``auto_map`` names: :meth:`from_pretrained` gives the causal LM of the checkpoint's own family."""

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """The same arguments as of every transformers model."""
        config = config or AutoConfig.from_pretrained(source)
        return compact_class(config).from_pretrained(source, *args, config=config, **options)


def compact_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """A subclass of the family's causal LM whose blocks have the sizes that the configuration lists."""
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class Compact(family):  # type: ignore[misc, valid-type]
        def __init__(self, config: PretrainedConfig, *args: Any, **options: Any) -> None:
            super().__init__(config, *args, **options)
            _resize_blocks(self)

    Compact.__name__ = Compact.__qualname__ = family.__name__
    return Compact


def _resize_blocks(model: PreTrainedModel) -> None:
    """Replace every block by one of the listed size: a block's own configuration is all that its sizes depend on."""
    sizes = getattr(model.config, COMPACT)
    blocks: Any = model.get_submodule(sizes["blocks"])
    for layer, size in enumerate(sizes["layers"]):
        config = copy.deepcopy(model.config)
        setattr(config, sizes["width"], size["neurons"])
        groups = size.get("heads")  # query heads of every KV head that is kept
        if groups:
            config.head_dim = sizes["head_dim"]
            config.num_attention_heads, config.num_key_value_heads = sum(groups), len(groups)
        block = type(blocks[layer])(config, layer)
        if groups and len(set(groups)) > 1:
            _share_unevenly(block.get_submodule(sizes["attention"]), config, groups)
        blocks[layer] = block


def _share_unevenly(attention: Any, config: Any, groups: list[int]) -> None:
    """Let query heads share KV heads in groups that differ in size."""
    attention.kv_head_of = [group for group, heads in enumerate(groups) for _ in range(heads)]
    attention.num_key_value_groups = 1  # every query head is given its own copy below
    attention.plain_attention = config._attn_implementation
    config._attn_implementation = GROUPED


def _grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Attention to the KV heads that ``module.kv_head_of`` names; key and value are (batch, KV heads, tokens, dim)."""
    index = torch.tensor(module.kv_head_of, device=key.device)
    eager = sys.modules[type(module).__module__].eager_attention_forward  # what "eager" stands for in each family
    plain = AttentionInterface().get(module.plain_attention, eager)
    return plain(module, query, key[:, index], value[:, index], attention_mask, **options)


AttentionInterface.register(GROUPED, _grouped_attention)
