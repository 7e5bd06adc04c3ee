"""Tiny random models of every supported family, with a byte-level tokenizer: milliseconds to build, no network."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from secateur.models import LanguageModel

VOCABULARY = 300
HIDDEN, HEADS, NEURONS, LAYERS = 32, 4, 48, 2
WINDOW, LONG_WINDOW = 4, 64  # below and above the length of the prompts used in tests
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
BOS, EOS, PAD = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
GLU: dict[str, Any] = {"intermediate_size": NEURONS, "num_key_value_heads": 2}
BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
ALTERNATING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
# GELU in place of ReLU, whose kinks spoil finite differences.
OPT: dict[str, Any] = {"ffn_dim": NEURONS, "init_std": 0.2, "activation_function": "gelu"}

# Name, up to the first hyphen the model type, to what its configuration has besides COMMON.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": GLU,
    "llama-mqa": {**GLU, "num_key_value_heads": 1},
    "llama-tied": {**GLU, "tie_word_embeddings": True},
    "llama-biased": {**GLU, **BIASED},
    "mistral": {**GLU, "sliding_window": LONG_WINDOW},
    "mistral-windowed": {**GLU, "sliding_window": WINDOW},
    "qwen2": GLU,
    "qwen3": {**GLU, "head_dim": 16},
    "gemma": {**GLU, "head_dim": 16},
    "gemma2": {**GLU, **ALTERNATING, "sliding_window": LONG_WINDOW, "query_pre_attn_scalar": 16},
    "gemma2-windowed": {**GLU, **ALTERNATING, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**GLU, **ALTERNATING, "sliding_window": LONG_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text-windowed": {**GLU, **ALTERNATING, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "phi3": GLU,
    "olmo2": GLU,
    "granite": {**GLU, "logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "smollm3": {**GLU, "no_rope_layers": [1, 0]},
    "gpt2": {"n_inner": NEURONS},
    "gpt2-untied": {"n_inner": NEURONS, "tie_word_embeddings": False},
    "gpt_neo": {
        "intermediate_size": NEURONS,
        "attention_types": [[["global", "local"], LAYERS // 2]],
        "window_size": WINDOW,
    },
    "gpt_neox": {"intermediate_size": NEURONS},
    "gpt_neox-sequential": {"intermediate_size": NEURONS, "use_parallel_residual": False},
    "opt": OPT,
    "opt-projected": {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "falcon": {"ffn_hidden_size": NEURONS, "multi_query": True},
    "falcon-multihead": {"ffn_hidden_size": NEURONS, "multi_query": False, "bias": True, "parallel_attn": False},
    "falcon-alibi": {"ffn_hidden_size": NEURONS, "multi_query": False, "alibi": True},
    "falcon-new": {"ffn_hidden_size": NEURONS, "new_decoder_architecture": True, "num_kv_heads": 2},
}
NAMES = tuple(VARIANTS)


def tiny_config(name: str) -> PretrainedConfig:
    """The configuration of one variant."""
    return AutoConfig.for_model(name.split("-")[0], **{**COMMON, **VARIANTS[name]})


def tiny_transformer(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model with large random weights, biases and norms, equal for equal seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
        for parameter in model.parameters():
            noise = 0.2 * torch.randn_like(parameter)
            parameter.data = noise + parameter.data if parameter.dim() == 1 else noise
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=0.625
    )
    return model.eval()


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, so that every text tokenises; ``chat`` adds a chat template."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos, eos, pad = SPECIAL_TOKENS
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_model(name: str = "llama", chat: bool = False, seed: int = 0) -> LanguageModel:
    """A fresh model of one variant; tests may change it."""
    return LanguageModel(model=tiny_transformer(name, seed), tokenizer=tiny_tokenizer(chat), source=f"tiny-{name}")


def prompts(model: LanguageModel) -> torch.Tensor:
    """Two prompts of ten tokens, (2, 10)."""
    texts = ["The nurse ", "Mary said:"]
    ids: torch.Tensor = model.tokenizer(texts, return_tensors="pt")["input_ids"]
    return ids


@torch.no_grad()
def all_logits(model: LanguageModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The transformers model's own logits on the prompts, (batch, tokens, vocabulary)."""
    logits: torch.Tensor = model.model(input_ids=prompts(model) if ids is None else ids, use_cache=False).logits
    return logits
