"""``gguf``: one file for llama.cpp, in f16 or q8_0, or a GGUF file with the same quantisation as the one loaded.

llama.cpp's ``llama`` architecture has one feed-forward length and one head count for all layers. Where a plan leaves
layers of different sizes the file says ``deci``, which is Llama-like with an array of each. Other architectures keep
their shapes, the removed units zeroed.

A plan made on a model that came from a GGUF file is applied to that file: rows of gate and up (and of query, key and
value) are copied as they are; the output projections lose columns, which do not keep to the blocks of a
quantisation, and are quantised again. Layers that lose nothing are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor

from secateur.errors import MaskError, SettingError
from secateur.models import LanguageModel
from secateur.models.loading import gguf_source
from secateur.surgery.pruned import State, check_units, pruned_state
from secateur.surgery.sizes import Kept, exactly, shrink, spread
from secateur.surgery.vocabulary import add_vocabulary, check_vocabulary
from secateur.units import Mask, UnitSpace
from secateur.weights import AnyMask

Quantisation = Literal["f16", "q8_0", "keep"]
TYPES: dict[str, Type] = {"f16": Type.F16, "q8_0": Type.Q8_0}
# Numbers of llama.cpp's general.file_type.
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
SHRINKS = ("llama", "deci")
CONVERTED = ("llama", "mistral")
FILE = "model.gguf"
FILE_TYPE = "general.file_type"
ATTENTION_SIZES = ("head_count", "head_count_kv", "key_length", "value_length")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: numbers of fp32, or bytes of a quantised type as they are."""

    name: str
    data: np.ndarray
    kind: Type


def write_gguf(model: LanguageModel, mask: AnyMask, directory: str | Path, quantisation: Quantisation = "f16") -> None:
    """Write ``model.gguf`` without the units that the mask removes.

    Parameters
    ----------
    quantisation: "f16", "q8_0", or "keep" for that of the GGUF file that the model came from.

    Raises
    ------
    MaskError: the mask does not remove units or is for another model; the family cannot be written.
    SettingError: unknown quantisation, or nothing to keep.
    """
    check_gguf(model, mask, quantisation)
    assert isinstance(mask, Mask)
    source = gguf_source(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state, _ = pruned_state(model, mask)
    reader = None if source is None else GGUFReader(source)
    architecture = "llama" if reader is None else str(reader.fields["general.architecture"].contents())
    layers = _layers(model, mask, architecture, quantisation, reader)
    even = len({(len(k.heads), len(k.kv_heads), len(k.neurons)) for k in layers}) == 1
    written = architecture if even or architecture not in SHRINKS else "deci"
    writer = GGUFWriter(directory / FILE, written)
    if reader is None:
        _describe(writer, model)
        entries = _from_weights(model, state, layers, TYPES[quantisation])
    else:
        _copy_fields(writer, reader, architecture, written, same_type=quantisation == "keep")
        entries = _from_file(model, state, layers, reader, TYPES.get(quantisation))
    if quantisation in FILE_TYPES:
        writer.add_file_type(FILE_TYPES[quantisation])
    _add_sizes(writer, UnitSpace.of(model), layers, even)
    for entry in entries:
        writer.add_tensor(entry.name, entry.data, raw_dtype=entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf(model: LanguageModel, mask: AnyMask, quantisation: str = "f16") -> None:
    """Refuse what cannot be written as GGUF, before anything is.

    Raises
    ------
    MaskError, SettingError: see :func:`write_gguf`.
    """
    check_quantisation(quantisation)
    means = check_units(model, mask).means
    source = gguf_source(model)
    if source is None:
        kind = model.model.config.model_type
        if quantisation == "keep":
            raise SettingError("The model did not come from a GGUF file, so there is no quantisation to keep.")
        if kind not in CONVERTED or model.compact is not None:
            raise MaskError(
                f"Models of type '{kind}' that did not come from a GGUF file are not written as one; export hf or "
                "hf-uniform and convert the directory with llama.cpp's convert_hf_to_gguf.py."
            )
        if model.model.config.rope_parameters.get("rope_type", "default") != "default":
            raise MaskError(
                "Scaled rotary positions are not written as GGUF; export hf or hf-uniform and convert the directory "
                "with llama.cpp's convert_hf_to_gguf.py."
            )
        check_vocabulary(model)
    elif means is not None and not _shrinks(source):
        raise MaskError("This GGUF file's architecture has no bias that could carry means; use zero ablation.")


def check_quantisation(name: str) -> None:
    """Refuse a quantisation of an unknown name."""
    if name not in get_args(Quantisation):
        raise SettingError(f"Unknown quantisation '{name}'; choose one of: {', '.join(get_args(Quantisation))}.")


def _shrinks(source: Path) -> bool:
    return GGUFReader(source).fields["general.architecture"].contents() in SHRINKS


def _layers(
    model: LanguageModel, mask: Mask, architecture: str, quantisation: str, reader: GGUFReader | None
) -> list[Kept]:
    """What stays: as little as the architecture and the blocks of the quantisation allow."""
    space = UnitSpace.of(model)
    if architecture not in SHRINKS:
        return exactly(space, np.ones(len(space), dtype=bool), heads_shrink=False)
    kind = TYPES.get(quantisation) or _requantised(_down_type(reader))
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return exactly(space, mask.keep, model.family.heads_shrink, multiple=block, even_groups=True)


def _down_type(reader: GGUFReader | None) -> Type:
    assert reader is not None
    return next(tensor.tensor_type for tensor in reader.tensors if tensor.name.endswith("ffn_down.weight"))


def _requantised(kind: Type) -> Type:
    """The type in which numbers of a type are written again: its own, or q8_0 where only llama.cpp can write it."""
    try:
        gguf.quants.quantize(np.zeros((1, 256), dtype=np.float32), kind)
    except NotImplementedError:
        return Type.Q8_0
    return kind


def _add_sizes(writer: GGUFWriter, space: UnitSpace, layers: list[Kept], even: bool) -> None:
    sizes = [[len(kept.neurons), len(kept.heads), len(kept.kv_heads)] for kept in layers]
    neurons, heads, groups = (list(column) for column in zip(*sizes, strict=True))
    writer.add_feed_forward_length(neurons[0] if even else neurons)
    writer.add_head_count(heads[0] if even else heads)
    writer.add_head_count_kv(groups[0] if even else groups)
    writer.add_key_length(space.head_dim)
    writer.add_value_length(space.head_dim)


def _copy_fields(writer: GGUFWriter, reader: GGUFReader, architecture: str, written: str, *, same_type: bool) -> None:
    """Copy the metadata of a file, but for what is written anew."""
    sizes = ("feed_forward_length", *(f"attention.{size}" for size in ATTENTION_SIZES))
    anew = {"general.architecture", "general.alignment", *(f"{architecture}.{size}" for size in sizes)}
    anew |= set() if same_type else {FILE_TYPE}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in anew:
            continue
        own = f"{written}{name.removeprefix(architecture)}" if name.startswith(f"{architecture}.") else name
        kind, *rest = field.types
        writer.add_key_value(own, field.contents(), kind, rest[-1] if kind == GGUFValueType.ARRAY else None)


def _from_file(
    model: LanguageModel, state: State, layers: list[Kept], reader: GGUFReader, kind: Type | None
) -> Iterator[Entry]:
    """The tensors of a GGUF file without what does not stay; ``kind`` None keeps their types."""
    space = UnitSpace.of(model)
    biases = _output_biases(model, state)
    for tensor in reader.tensors:
        if tensor.name in biases:
            yield Entry(tensor.name, biases.pop(tensor.name), Type.F32)
            continue
        layer, part = _placed(tensor.name)
        data = np.asarray(tensor.data)
        if part in ("attn_output", "ffn_down") and tensor.name.endswith(".weight"):
            yield _output_projection(model, state, tensor, layers[layer], layer, part, kind)
            continue
        rows = None if layer < 0 else _rows(part, layers[layer], space, layer)
        if rows is not None:
            data = data[rows]
        yield _retyped(tensor.name, data, tensor.tensor_type, kind)
    for name, value in biases.items():
        yield Entry(name, value, Type.F32)


def _placed(name: str) -> tuple[int, str]:
    """Layer and part of ``blk.3.ffn_down.weight``; layer -1 outside the blocks."""
    pieces = name.split(".")
    return (int(pieces[1]), pieces[2]) if pieces[0] == "blk" else (-1, pieces[0])


def _rows(part: str, kept: Kept, space: UnitSpace, layer: int) -> np.ndarray | None:
    """Output rows of a projection that stay; None for all."""
    index, width, whole = {
        "attn_q": (kept.heads, space.head_dim, space.heads[layer]),
        "attn_k": (kept.kv_heads, space.head_dim, space.kv_heads[layer]),
        "attn_v": (kept.kv_heads, space.head_dim, space.kv_heads[layer]),
        "ffn_gate": (kept.neurons, 1, space.neurons[layer]),
        "ffn_up": (kept.neurons, 1, space.neurons[layer]),
    }.get(part, (None, 1, 0))
    return None if index is None or len(index) == whole else spread(index, width)


def _output_projection(
    model: LanguageModel, state: State, tensor: Any, kept: Kept, layer: int, part: str, kind: Type | None
) -> Entry:
    """An output projection without its removed columns, copied where it loses none."""
    family, space = model.family, UnitSpace.of(model)
    path, index, width = (
        (family.attention_out, kept.heads, space.head_dim)
        if part == "attn_output"
        else (family.mlp_out, kept.neurons, 1)
    )
    before: Tensor = model.model.get_submodule(f"{family.blocks}.{layer}.{path}").weight  # type: ignore[assignment]
    after = state[f"{family.blocks}.{layer}.{path}.weight"]
    columns = spread(index, width)
    if after.data_ptr() == before.data_ptr():  # removing columns would have made a copy
        return _retyped(tensor.name, np.asarray(tensor.data), tensor.tensor_type, kind)
    numbers = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).copy()
    removed = (after == 0).all(dim=1 if family.transposed else 0).cpu().numpy()
    numbers[:, removed] = 0
    return _typed(tensor.name, numbers[:, columns], kind or _requantised(tensor.tensor_type))


def _retyped(name: str, data: np.ndarray, own: Type, kind: Type | None) -> Entry:
    if kind is None or own in (Type.F32, kind):
        return Entry(name, np.ascontiguousarray(data), own)
    return _typed(name, gguf.quants.dequantize(data, own), kind)


def _typed(name: str, numbers: np.ndarray, kind: Type) -> Entry:
    """Numbers in a type; vectors stay fp32, and rows that no block divides become f16."""
    if numbers.ndim == 1:
        kind = Type.F32
    elif numbers.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Type.F16
    return Entry(name, gguf.quants.quantize(np.ascontiguousarray(numbers, dtype=np.float32), kind), kind)


def _output_biases(model: LanguageModel, state: State) -> dict[str, np.ndarray]:
    """Biases of output projections that are not all zero, by their name in the file."""
    found = {}
    for layer in range(len(model.blocks)):
        for path, part in ((model.family.attention_out, "attn_output"), (model.family.mlp_out, "ffn_down")):
            bias = state.get(f"{model.family.blocks}.{layer}.{path}.bias")
            if bias is not None and bool(bias.any()):
                found[f"blk.{layer}.{part}.bias"] = bias.float().cpu().numpy()
    return found


def _describe(writer: GGUFWriter, model: LanguageModel) -> None:
    """Metadata of a Llama-like model, from its configuration and tokenizer."""
    config: Any = model.model.config
    writer.add_name(model.source)
    writer.add_block_count(len(model.blocks))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, model)


def _from_weights(model: LanguageModel, state: State, layers: list[Kept], kind: Type) -> Iterator[Entry]:
    """The tensors of a Llama-like model under llama.cpp's names."""
    shrink(model, state, layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(layers))
    for path, value in state.items():
        if path == "lm_head.weight" and model.model.config.tie_word_embeddings:
            continue
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise MaskError(f"The weight '{path}' has no name in GGUF; export hf instead.")
        numbers = value.float().cpu().numpy()
        part = _placed(name)[1]
        if part in ("attn_q", "attn_k"):
            numbers = _interleaved(numbers, model.head_dim)
        yield _typed(name, numbers, kind)


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of query or key heads in llama.cpp's order, which puts the two numbers of a rotation side by side."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])  # (heads, half, pair, ...)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
