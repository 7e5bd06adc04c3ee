"""The architecture table: where each supported family keeps its heads and neurons.

A *head* is a slice of the input of the attention output projection; a *neuron* is one channel of
the input of the MLP output projection. Both can be switched off by scaling that input, so two
module paths per block are all that masking needs; the other columns serve scorers and surgery.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from secateur.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One row of the table. Paths are relative to the causal LM (``blocks``) or to a block.

    Attributes
    ----------
    blocks: path of the list of decoder blocks.
    attention_out, mlp_out: the projections whose *inputs* are the heads and the neurons.
    attention_in: query, key and value projections (one path where they are fused).
    mlp_in: projections into the neurons (gate and up for a GLU; one path where fused or plain).
    transposed: weights are stored as (in, out), as in ``Conv1D``.
    bias_switches: config flags that give attention_out and mlp_out a bias where they have none.
    width: config key of the number of neurons per layer.
    heads_shrink: whether heads can leave the projections: the width of a head is a config key of its own
        (``head_dim``), and nothing is normalised over all heads of a layer.
    tree: whether attention depends only on the mask and the position ids that are passed in, so
        that many prompts can share one row (see ``measures.packing``).
    """

    blocks: str = "model.layers"
    attention_out: str = "self_attn.o_proj"
    mlp_out: str = "mlp.down_proj"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    transposed: bool = False
    bias_switches: tuple[str, str] | None = None
    width: str = "intermediate_size"
    heads_shrink: bool = True
    tree: bool = True

    @property
    def attention(self) -> str:
        """The attention module, which holds the output projection, relative to a block."""
        return self.attention_out.rpartition(".")[0]


LLAMA_LIKE = Family()
GPT_NEOX_LIKE = Family(
    blocks="gpt_neox.layers",
    attention_out="attention.dense",
    mlp_out="mlp.dense_4h_to_h",
    attention_in=("attention.query_key_value",),
    mlp_in=("mlp.dense_h_to_4h",),
    heads_shrink=False,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(bias_switches=("attention_bias", "mlp_bias")),
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE,
    "phi3": Family(attention_in=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
    "olmo2": Family(heads_shrink=False),
    "granite": Family(bias_switches=("attention_bias", "mlp_bias")),
    "smollm3": Family(bias_switches=("attention_bias", "mlp_bias")),
    "gpt2": Family(
        blocks="transformer.h",
        attention_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        attention_in=("attn.c_attn",),
        mlp_in=("mlp.c_fc",),
        transposed=True,
        width="n_inner",
        heads_shrink=False,
    ),
    "gpt_neo": Family(
        blocks="transformer.h",
        attention_out="attn.attention.out_proj",
        mlp_out="mlp.c_proj",
        attention_in=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        mlp_in=("mlp.c_fc",),
        heads_shrink=False,
        tree=False,  # its local layers look back a number of columns, not of positions
    ),
    "gpt_neox": GPT_NEOX_LIKE,
    "opt": Family(
        blocks="model.decoder.layers",
        attention_out="self_attn.out_proj",
        mlp_out="fc2",
        mlp_in=("fc1",),
        width="ffn_dim",
        heads_shrink=False,
    ),
    "falcon": Family(
        blocks="transformer.h",
        attention_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        attention_in=("self_attention.query_key_value",),
        mlp_in=("mlp.dense_h_to_4h",),
        width="ffn_hidden_size",
        heads_shrink=False,
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the table row for a configuration.

    Raises
    ------
    ModelError: the family has no row; the message lists those that have one.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        hint = " (load its text-only checkpoint, model type 'gemma3_text')" if model_type == "gemma3" else ""
        raise ModelError(f"Models of type '{model_type}' are not supported{hint}; supported types are: {supported}.")
    return FAMILIES[model_type]


def query_heads(config: PretrainedConfig) -> int:
    """Number of attention (query) heads per layer."""
    return int(config.num_attention_heads)


def kv_heads(config: PretrainedConfig) -> int:
    """Number of key/value heads per layer: below the query heads for GQA, one for MQA."""
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return int(config.num_kv_heads)
        return 1 if config.multi_query else query_heads(config)
    return int(getattr(config, "num_key_value_heads", None) or query_heads(config))


def supports_tree(config: PretrainedConfig) -> bool:
    """Whether packed prompts are exact for this model: not with ALiBi, whose bias counts columns."""
    return family_of(config).tree and not getattr(config, "alibi", False)


def attention_window(config: PretrainedConfig) -> int | None:
    """Length of the sliding attention window in tokens, or None for full attention."""
    window = getattr(config, "sliding_window", None)
    return int(window) if window and getattr(config, "use_sliding_window", True) else None
