"""A loaded causal language model and the few operations the rest of Secateur needs from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import ModelError, NumericalError
from secateur.models.compact import COMPACT
from secateur.models.families import Family, family_of, kv_heads, query_heads
from secateur.models.linear import fast_linear

if TYPE_CHECKING:
    from secateur.models.precision import PrecisionTrial

VOCABULARY_CHUNK = 16_384
MatmulPrecision = Literal["highest", "high", "medium"]


@dataclass
class TokenUsage:
    """Tokens that went through the model, forwards and backwards: the currency of every cost."""

    forward: int = 0
    backward: int = 0

    def since(self, earlier: TokenUsage) -> TokenUsage:
        return TokenUsage(self.forward - earlier.forward, self.backward - earlier.backward)

    def copy(self) -> TokenUsage:
        return TokenUsage(self.forward, self.backward)


@dataclass(eq=False)
class LanguageModel:
    """A causal LM with its tokenizer, as plain transformers objects, and the map of its units.

    Attributes
    ----------
    model: the transformers model, in evaluation mode, parameters frozen.
    tokenizer: its tokenizer.
    source: where it came from, as the user named it.
    matmul_precision: of products of fp32 matrices inside the model, see :func:`torch.set_float32_matmul_precision`.
        The output head keeps the highest.
    loaded_with: what to call :func:`secateur.load` with to get it again, from any directory; None for a model made
        otherwise.
    precision_trial: what ``matmul_precision`` was chosen by, where it was measured.
    onednn: multiply through oneDNN where that is faster, see :mod:`secateur.models.linear`; switched off to see what
        it saves.
    usage: tokens forwarded and backwarded so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    matmul_precision: MatmulPrecision = "highest"
    loaded_with: dict[str, Any] | None = None
    precision_trial: PrecisionTrial | None = None
    onednn: bool = True
    usage: TokenUsage = field(default_factory=TokenUsage)

    def __post_init__(self) -> None:
        family_of(self.model.config)
        self.model.eval()
        self.model.requires_grad_(False)

    @property
    def family(self) -> Family:
        return family_of(self.model.config)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        blocks: nn.ModuleList = self.model.get_submodule(self.family.blocks)  # type: ignore[assignment]
        return list(blocks)

    @cached_property
    def attention_outputs(self) -> list[nn.Module]:
        """Per layer, the projection whose input holds the heads: (batch, tokens, heads * head_dim)."""
        return [block.get_submodule(self.family.attention_out) for block in self.blocks]

    @cached_property
    def mlp_outputs(self) -> list[nn.Module]:
        """Per layer, the projection whose input holds the neurons: (batch, tokens, neurons)."""
        return [block.get_submodule(self.family.mlp_out) for block in self.blocks]

    @property
    def heads_per_layer(self) -> list[int]:
        return [input_width(module, self.family.transposed) // self.head_dim for module in self.attention_outputs]

    @property
    def kv_heads_per_layer(self) -> list[int]:
        own = (
            [None] * len(self.blocks)
            if self.compact is None
            else [size.get("heads") for size in self.compact["layers"]]
        )
        return [kv_heads(self.model.config) if groups is None else len(groups) for groups in own]

    @property
    def neurons_per_layer(self) -> list[int]:
        return [input_width(module, self.family.transposed) for module in self.mlp_outputs]

    @property
    def head_dim(self) -> int:
        if self.compact is not None:
            return int(self.compact["head_dim"])
        return input_width(self.attention_outputs[0], self.family.transposed) // query_heads(self.model.config)

    @property
    def compact(self) -> dict[str, Any] | None:
        """Sizes of a model whose layers differ, see :mod:`secateur.models.compact`; None for any other."""
        return getattr(self.model.config, COMPACT, None)

    @property
    def is_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def input_device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[union-attr, return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[union-attr, return-value]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, in memory and as a checkpoint stores them: tied ones count once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def is_exact(self) -> bool:
        """Whether products are taken in full fp32, so that figures hardly depend on the shapes of passes."""
        return self.dtype in (torch.float32, torch.float64) and self.matmul_precision == "highest"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration and of samples of every weight: equal for equal models.

        Weights are sampled and rounded to bfloat16, so that the same checkpoint loaded in another
        precision or on another device keeps its fingerprint.
        """
        digest = hashlib.sha256()
        config = self.model.config
        digest.update(f"{config.model_type}|{len(self.blocks)}|{config.hidden_size}|{config.vocab_size}".encode())
        for name, weight in sorted(self.model.named_parameters()):
            if weight.is_meta:
                raise ModelError(
                    "Some weights are offloaded to the CPU or the disk; load the model with a device map that keeps "
                    "all of them on devices."
                )
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16).cpu()
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:32]

    def arithmetic(self) -> AbstractContextManager[None]:
        """Within the context, fp32 matrices are multiplied in the model's precision, also in backward passes."""
        return multiplying(self.matmul_precision)

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Last hidden state after the final norm, (batch, tokens, hidden); counts the tokens."""
        self.usage.forward += input_ids.numel()
        with self.arithmetic(), fast_linear(self.onednn):
            output = self.model.base_model(
                input_ids=input_ids.to(self.input_device),
                position_ids=None if position_ids is None else position_ids.to(self.input_device),
                attention_mask=None if attention_mask is None else attention_mask.to(self.input_device),
                use_cache=False,
            )
        return output[0]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in fp32 for rows of hidden states, (rows, hidden) to (rows, vocabulary).

        The head runs in fp32 whatever the model's precision: a difference of two bf16 logits has
        steps of 1/16, too coarse for a preference.
        """
        head = self.model.get_output_embeddings()
        weight: Tensor = head.weight  # type: ignore[union-attr, assignment]
        bias: Tensor | None = getattr(head, "bias", None)
        hidden = hidden.to(weight.device).float()
        if weight.dtype == torch.float32:
            with multiplying("highest"), fast_linear(self.onednn):
                logits = nn.functional.linear(hidden, weight)
        else:  # chunks keep the fp32 copy of the vocabulary small
            chunks = (nn.functional.linear(hidden, part.float()) for part in weight.split(VOCABULARY_CHUNK))
            logits = torch.cat(list(chunks), dim=-1)
        if bias is not None:
            logits = logits + bias.float()
        return _finish_logits(self.model.config, logits)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Next-token log-probabilities in fp32, (rows, hidden) to (rows, vocabulary).

        Raises
        ------
        NumericalError: the model's output is not finite.
        """
        log_probabilities = self.logits(hidden).log_softmax(dim=-1)
        self.check_finite(log_probabilities.detach().sum(dim=-1))
        return log_probabilities

    def check_finite(self, values: Tensor) -> None:
        """Refuse what a damaged checkpoint or too small a precision gives.

        Raises
        ------
        NumericalError: a value is not a number. A logit of minus infinity, a token that cannot come, passes.
        """
        if bool(torch.isnan(values.detach()).any()):
            raise NumericalError(
                f"The model '{self.source}' returned values that are not finite (NaN or infinity); "
                "check the checkpoint, or load it with --dtype float32."
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model, tokenizer and generation config as a plain Hugging Face directory."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


@contextmanager
def multiplying(precision: MatmulPrecision) -> Iterator[None]:
    """Within the context, the process multiplies fp32 matrices in this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def input_width(module: nn.Module, transposed: bool) -> int:
    """Number of input features of a Linear or Conv1D."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return int(weight.shape[0 if transposed else 1])


def _finish_logits(config: object, logits: Tensor) -> Tensor:
    """Apply what some families do after the head: Granite's scaling, Gemma's soft cap."""
    scaling = getattr(config, "logits_scaling", None)
    if scaling:
        logits = logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits
