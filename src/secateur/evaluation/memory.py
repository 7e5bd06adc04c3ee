"""What measuring a mask takes beside the weights, in bytes; sums from shapes, for one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.measures.answers import DEFAULT_BATCH_SIZE, ROW_PROMPTS, ROW_TOKENS
from secateur.measures.utility import WINDOW
from secateur.models import LanguageModel
from secateur.models.language_model import VOCABULARY_CHUNK

# What Python, torch, transformers and Ray take in a process before there is a model in it.
PROCESS = 500_000_000
# Of prompts as trees: as many rows as the default batch size allows, filled.
PASS_TOKENS = ROW_TOKENS * DEFAULT_BATCH_SIZE // ROW_PROMPTS
KL_COPIES = 5  # two log-probabilities, their difference, one probability and the product
FULL = 4  # bytes of a number in fp32, which the output head is computed in


@dataclass(frozen=True)
class Shape:
    """Of a model, what the memory of a forward pass depends on.

    Attributes
    ----------
    width: of a hidden state. neurons: of the widest layer. vocabulary: tokens.
    itemsize: bytes of a number outside of the output head.
    """

    width: int
    neurons: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, model: LanguageModel) -> Shape:
        config = model.model.config.get_text_config()
        return cls(config.hidden_size, max(model.neurons_per_layer), config.vocab_size, model.dtype.itemsize)

    def activations(self, tokens: int) -> int:
        """In one layer: a few states as wide as the model, and three as wide as its neurons, for every token."""
        return tokens * (4 * self.width + 3 * self.neurons) * self.itemsize

    @property
    def head_copy(self) -> int:
        """The fp32 copy of a part of the output head, where the model is not in fp32."""
        return 0 if self.itemsize == FULL else min(VOCABULARY_CHUNK, self.vocabulary) * self.width * FULL

    def logits(self, reads: int, copies: int = 2) -> int:
        """Numbers in fp32 for every token of the vocabulary, where answers are read or text is scored.

        Parameters
        ----------
        copies: such numbers at once: logits and log-probabilities, or for a KL divergence :data:`KL_COPIES`.
        """
        return copies * reads * self.vocabulary * FULL

    def passes(self, tokens: int, reads: int, scored: int) -> int:
        """At most, for passes over prompts and text: what a layer holds, and what the output head takes.

        Parameters
        ----------
        tokens: of the largest pass. reads: next-token distributions of one over prompts. scored: of a window of text.
        """
        return self.activations(tokens) + self.head_copy + max(self.logits(reads), self.logits(scored, KL_COPIES))


def actor_bytes(model: LanguageModel) -> int:
    """What a process takes that measures masks of a model: the model, and a pass that is read at every token."""
    return PROCESS + model.weight_bytes + Shape.of(model).passes(PASS_TOKENS, PASS_TOKENS, WINDOW)
