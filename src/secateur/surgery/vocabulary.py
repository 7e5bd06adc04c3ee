"""The tokenizer's part of a GGUF file, for byte-level BPE."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from secateur.errors import MaskError
from secateur.models import LanguageModel

# llama.cpp splits text by a rule of its own for every known way to split; the patterns are the tokenizers'.
GPT2_PATTERN = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
LLAMA3_PATTERN = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def check_vocabulary(model: LanguageModel) -> None:
    """Refuse a tokenizer that llama.cpp would read differently.

    Raises
    ------
    MaskError: names the way out.
    """
    splitting_rule(_parts(model))


def add_vocabulary(writer: GGUFWriter, model: LanguageModel) -> None:
    """Write tokens, merges, special tokens and the chat template of a byte-level BPE tokenizer."""
    parts, tokenizer = _parts(model), model.tokenizer
    added = {entry["id"]: entry for entry in parts["added_tokens"]}
    by_id = {number: token for token, number in parts["model"]["vocab"].items()}
    by_id.update({number: entry["content"] for number, entry in added.items()})
    tokens, kinds = [], []
    for number in range(int(model.model.config.vocab_size)):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            kinds.append(TokenType.UNUSED)
        elif number in added:
            kinds.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting_rule(parts))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in parts["model"]["merges"]])
    for add, value in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if value is not None:
            add(value)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def splitting_rule(parts: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text before merging.

    Raises
    ------
    MaskError: it is not byte-level BPE, or splits in a way that is not known here.
    """
    steps = _steps(parts.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    pattern = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    spaced = any(step.get("add_prefix_space") for step in steps)
    if parts["model"]["type"] == "BPE" and kinds[-1:] == ["ByteLevel"] and not spaced and not parts.get("normalizer"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and pattern in (GPT2_PATTERN, LLAMA3_PATTERN):
            return "gpt-2" if pattern == GPT2_PATTERN else "llama-bpe"
    raise MaskError(
        "The tokenizer splits text in a way that is not written as GGUF; export hf or hf-uniform and convert the "
        "directory with llama.cpp's convert_hf_to_gguf.py."
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


def _parts(model: LanguageModel) -> dict[str, Any]:
    """The content of ``tokenizer.json``."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MaskError("The tokenizer has no fast form, so it is not written as GGUF; export hf instead.")
    return dict(json.loads(backend.to_str()))
