"""Measure masks: the disparity of a set of prompts and the likelihood of a neutral text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from secateur.errors import NumericalError
from secateur.evaluation.store import Store
from secateur.evaluation.walk import Walk, walking_order
from secateur.measures.answers import DEFAULT_BATCH_SIZE, Batch, measure_y, measure_y_of_each, pack
from secateur.measures.disparity import Interval, Table, statistics
from secateur.measures.prompts import PromptSet
from secateur.measures.utility import (
    NeutralText,
    hidden_states,
    hidden_states_of_each,
    kl_divergence,
    negative_log_likelihood,
    perplexity,
    perplexity_increase,
)
from secateur.models import LanguageModel
from secateur.models.restart import Run, plainly
from secateur.progress import Advance
from secateur.suites import suite_hash
from secateur.units import Mask, masked, masked_each
from secateur.weights import AnyMask

FINITE = "finite"  # a figure that says, as 0, that a mask's other figures cannot be had


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a mask does to one part of the data.

    Attributes
    ----------
    table: y by scenario and marker.
    nll, scored: (windows,) negative log-likelihood of the neutral text, and tokens that it is of. kl: of the unpruned
        model's predictions there and the pruned one's, nats per token; see ``divergence``. None where it was not asked
        for.
    """

    table: Table
    nll: np.ndarray | None = None
    scored: np.ndarray | None = None
    kl: float | None = None

    @property
    def smd(self) -> np.ndarray:
        """Bias by scenario, (scenarios,): see :mod:`secateur.measures.disparity`."""
        return statistics(self.table)["smd"]

    @property
    def counts(self) -> np.ndarray:
        """Markers that gave a y, (scenarios, groups)."""
        there, groups = ~np.isnan(self.table.y), self.table.groups
        return np.stack([there[:, groups == group].sum(axis=1) for group in range(self.table.n_groups)], axis=1)

    @property
    def log_perplexity(self) -> float | None:
        """Mean negative log-likelihood of the text, nats per token; None where it was not asked for."""
        return None if self.nll is None or self.scored is None else float(self.nll.sum() / self.scored.sum())


class Pool(Protocol):
    """Measures many masks elsewhere; see :class:`secateur.evaluation.cluster.Cluster`."""

    def measure(
        self, evaluator: Evaluator, masks: Sequence[Mask], utility: bool
    ) -> Iterator[tuple[Mask, dict[str, np.ndarray]]]:
        """Figures by mask, in any order, as :meth:`Evaluator.figures` has them."""
        ...


@dataclass(eq=False)
class Evaluator:
    """Measures masks on one part of the data; a mask measured before costs nothing.

    Attributes
    ----------
    model: the model, unpruned.
    prompts: what is asked.
    text: neutral text for the utility, or None.
    batch_size: prompts in one forward pass.
    divergence: also measure KL(unpruned || masked) with the utility; keeps the unpruned model's
        hidden states, (tokens, hidden).
    store: keeps every figure for other processes and later runs, or None.
    keep_bytes: memory for what entered the layers under the mask before, so that the next mask begins
        where it differs (see :class:`secateur.evaluation.walk.Walk`); 0 for none.
    walk_bytes: memory for the same in evaluators that are made from this one to walk, see :meth:`on`.
    masks_at_once: masks in one forward pass, each with its own rows, where many are measured. Worth it where a pass
        is too small to keep the device busy; begun anew for every mask, so not together with ``keep_bytes``. Of masks
        that are measured together all are forwarded if one is not known.
    share_prefixes: compute prompts that begin alike, and the answers to one prompt, in one tree of tokens.
    logits_where_read: compute the output head only where an answer is read. This and ``share_prefixes`` are switched
        off to see what they save; figures stay the same.
    cluster: Ray actors that measure many masks at once, or None.
    """

    model: LanguageModel
    prompts: PromptSet
    text: NeutralText | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    divergence: bool = False
    store: Store | None = None
    keep_bytes: int = 0
    walk_bytes: int = 0
    masks_at_once: int = 1
    share_prefixes: bool = True
    logits_where_read: bool = True
    cluster: Pool | None = None
    _known: dict[bytes, dict[str, np.ndarray]] = field(init=False, default_factory=dict)
    _unpruned: list[Tensor] = field(init=False, default_factory=list)

    def on(self, prompts: PromptSet, text: NeutralText | None, *, walk: bool = False) -> Evaluator:
        """An evaluator that measures in the same way on other data.

        Parameters
        ----------
        walk: keep states between masks, as far as ``walk_bytes`` go.
        """
        kept = self.walk_bytes if walk else 0
        return replace(self, prompts=prompts, text=text, divergence=False, keep_bytes=kept)

    @cached_property
    def part(self) -> str:
        """A hash of what a figure depends on besides weights and mask: what is asked, how, and the arithmetic."""
        model, digest = self.model, hashlib.sha256()
        shapes = (self.batch_size,) if model.is_exact else (self.batch_size, self.masks_at_once)
        digest.update(repr((str(model.dtype), model.matmul_precision, *shapes)).encode())
        digest.update(suite_hash(self.prompts.suite).encode())
        for prompt in self.prompts.prompts:
            digest.update(repr((prompt.scenario, prompt.marker, prompt.context, prompt.answers)).encode())
        for window in () if self.text is None else self.text.windows:
            digest.update(repr((window.start, window.tokens.tolist())).encode())
        return digest.hexdigest()[:32]

    @cached_property
    def batches(self) -> list[Batch]:
        """The prompts, packed for the model; packed when they are first needed."""
        return pack(self.model, self.prompts, self.batch_size, self.share_prefixes)

    @property
    def tokens(self) -> int:
        """Tokens that one whole evaluation forwards, text included."""
        read = 0 if self.text is None else sum(len(window.tokens) for window in self.text.windows)
        return sum(batch.tokens for batch in self.batches) + read

    @cached_property
    def _walk(self) -> Walk | None:
        return Walk.within(self.model, self.tokens, self.keep_bytes)

    def _run(self, mask: AnyMask | None, part: str) -> Run:
        """How a pass is made under a mask; ``part`` keeps batches of prompts and of text apart."""
        walk = self._walk if self.keep_bytes else None
        return plainly if walk is None else lambda number, forward: walk.run((part, number), mask, forward)

    def work(self, utility: bool = False) -> int:
        """Steps that one evaluation reports to ``advance``."""
        return len(self.prompts) + (len(self.text.windows) if utility and self.text else 0)

    def evaluate(
        self, mask: AnyMask | None = None, advance: Advance = lambda _: None, *, utility: bool = False
    ) -> Measurement:
        """Measure a mask; None is the unpruned model.

        Parameters
        ----------
        utility: also the likelihood of the neutral text.

        Raises
        ------
        NumericalError: the answers are not finite, now or when the mask was measured before.
        """
        key = _key(mask)
        known = self._recall(key)
        if FINITE in known and not self._wanted(utility) <= known.keys():
            raise NumericalError(f"The model '{self.model.source}' gives no finite answers under a mask.")
        if utility and self.divergence and "kl" not in known and not self._unpruned:
            self._unpruned = hidden_states(self.model, self._text)
        try:
            with masked(self.model, mask):
                self._measure(mask, advance, utility)
        except NumericalError:
            if key:
                self._remember(key, {FINITE: np.array(0)})
            raise
        table = Table(self.prompts.table(known["y"]), self.prompts.groups)
        if not utility:
            return Measurement(table)
        kl = float(known["kl"]) if self.divergence else None
        return Measurement(table, known["nll"], self._text.scored, kl)

    def evaluate_each(
        self, masks: Sequence[AnyMask], advance: Advance = lambda _: None, *, utility: bool = False
    ) -> Iterator[Measurement | None]:
        """Measure masks, on the cluster if there is one; None where answers are not finite.

        They come in their order, each as soon as it and those before it are there.

        Parameters
        ----------
        utility: also the likelihood of the neutral text.
        """
        if self.cluster is not None:
            yield from self._each_on(self.cluster, masks, advance, utility)
            return
        for start in range(0, len(masks), self.masks_at_once):
            group = masks[start : start + self.masks_at_once]
            self._measure_together(group, utility)
            for mask in group:
                yield self._finite(mask, advance, utility)

    def evaluate_walking(
        self, masks: Sequence[AnyMask], advance: Advance = lambda _: None, *, utility: bool = False
    ) -> Iterator[tuple[int, Measurement | None]]:
        """Measure masks in an order in which neighbours begin alike, each with its position; see ``keep_bytes``."""
        order = walking_order(masks)
        found = self.evaluate_each([masks[number] for number in order], advance, utility=utility)
        return zip(order, found, strict=True)

    def _finite(self, mask: AnyMask, advance: Advance, utility: bool) -> Measurement | None:
        """Measure a mask and tell of all its work; None where answers are not finite."""
        left = self.work(utility)

        def tell(done: int) -> None:
            nonlocal left
            left -= done
            advance(done)

        try:
            return self.evaluate(mask, tell, utility=utility)
        except NumericalError:
            advance(left)
            return None

    def _measure(self, mask: AnyMask | None, advance: Advance, utility: bool) -> None:
        """Measure what is not known yet, of the model with the mask applied."""
        key = _key(mask)
        if "y" not in self._known[key]:
            run, everywhere = self._run(mask, "prompts"), not self.logits_where_read
            y = measure_y(self.model, self.prompts, self.batches, advance, run, everywhere)
            self._remember(key, {"y": y.numpy().astype(float)})
        else:
            advance(len(self.prompts))
        if utility:
            self._read(mask, advance)

    def _measure_together(self, masks: Sequence[AnyMask], utility: bool) -> None:
        """Measure masks in common passes; if one has no finite answers, leave them all.

        All of them, as soon as one is not known: last digits depend on the shape of a pass, and a run that is carried
        on must find what it would have found.
        """
        group = {_key(mask): mask for mask in masks if isinstance(mask, Mask) and not mask.is_empty}
        kept = list(group.values())
        if len(kept) < 2 or not self._unknown(kept, utility) or any(mask.means is not kept[0].means for mask in kept):
            return
        try:
            if utility and self.divergence and not self._unpruned:
                self._unpruned = hidden_states(self.model, self._text)
            with masked_each(self.model, kept):
                y = measure_y_of_each(self.model, self.prompts, self.batches, len(kept)).numpy().astype(float)
                states = hidden_states_of_each(self.model, self._text, len(kept)) if utility else [[]] * len(kept)
            read = [self._likelihoods(one) if utility else {} for one in states]
        except NumericalError:
            return
        for key, row, figures in zip(group, y, read, strict=True):
            self._remember(key, {"y": row, **figures})

    def _unknown(self, masks: Sequence[AnyMask], utility: bool) -> dict[bytes, Mask]:
        """The masks of units, by key, of which some figure is not known and can be had."""
        new = {_key(mask): mask for mask in masks if isinstance(mask, Mask) and not mask.is_empty}
        return {key: mask for key, mask in new.items() if not self._is_known(key, utility)}

    def _is_known(self, key: bytes, utility: bool) -> bool:
        """Whether all figures of an evaluation are known, or that they cannot be had."""
        known = self._recall(key).keys()
        return FINITE in known or self._wanted(utility) <= known

    def _wanted(self, utility: bool) -> set[str]:
        """The names of the figures of one evaluation."""
        return {"y", *(("nll",) if utility else ()), *(("kl",) if utility and self.divergence else ())}

    def _each_on(
        self, cluster: Pool, masks: Sequence[AnyMask], advance: Advance, utility: bool
    ) -> Iterator[Measurement | None]:
        """Have the cluster measure what is not known; every figure is kept as it comes, whatever comes before it.

        A mask that only this process can measure waits for the cluster: meanwhile nothing would be kept.
        """
        missing = self._unknown(masks, utility)
        advance(self.work(utility) * (len(masks) - len(missing)))
        arriving = cluster.measure(self, list(missing.values()), utility)
        for mask in masks:
            while missing and not self._is_known(_key(mask), utility):
                found, figures = next(arriving)
                del missing[found.key]
                self._remember(found.key, figures)
                advance(self.work(utility))
            yield self._finite(mask, lambda _: None, utility)

    def figures(self, mask: AnyMask | None) -> dict[str, np.ndarray]:
        """All that has been measured of a mask, by name."""
        return dict(self._recall(_key(mask)))

    def _read(self, mask: AnyMask | None, advance: Advance) -> None:
        """Measure the likelihood of the text, and KL where it is wanted, of the model with the mask applied."""
        key = _key(mask)
        known = self._known[key]
        if "nll" in known and ("kl" in known or not self.divergence):
            advance(len(self._text.windows))
            return
        if self._unpruned and not key:
            states = self._unpruned
            advance(len(self._text.windows))
        else:
            states = hidden_states(self.model, self._text, advance, self._run(mask, "text"))
        self._remember(key, self._likelihoods(states, unpruned=not key))

    def _likelihoods(self, states: list[Tensor], unpruned: bool = False) -> dict[str, np.ndarray]:
        """What the last hidden states on the text say."""
        figures = {"nll": negative_log_likelihood(self.model, self._text, states)}
        if self.divergence:
            figures["kl"] = np.array(0.0 if unpruned else kl_divergence(self.model, self._unpruned, states))
        return figures

    def _recall(self, key: bytes) -> dict[str, np.ndarray]:
        """All that is known of a mask."""
        if key not in self._known:
            self._known[key] = {} if self.store is None else self.store.get(self.part, key)
        return self._known[key]

    def _remember(self, key: bytes, figures: dict[str, np.ndarray]) -> None:
        """Keep what is new of a mask; as in the store, the first figure stays."""
        self._known[key].update({name: value for name, value in figures.items() if name not in self._known[key]})
        if self.store is not None:
            self.store.put(self.part, key, figures)

    def y(self, mask: AnyMask | None = None) -> np.ndarray:
        """y of every prompt under a mask, (prompts,)."""
        self.evaluate(mask)
        return self._known[_key(mask)]["y"]

    def perplexity(self, mask: AnyMask | None = None) -> float:
        """Perplexity of the neutral text under a mask."""
        return perplexity(self._likelihood(mask), self._text)

    def perplexity_increase(self, mask: AnyMask, seed: int = 0) -> Interval:
        """Relative increase over the unpruned model, with its interval over windows."""
        return perplexity_increase(self._likelihood(None), self._likelihood(mask), self._text, seed)

    def kl_divergence(self, mask: AnyMask) -> float:
        """KL(unpruned || masked) on the neutral text, nats per token; see ``divergence``."""
        self.evaluate(None, utility=True)
        kl = self.evaluate(mask, utility=True).kl
        assert kl is not None, "this evaluator does not measure KL"
        return kl

    @property
    def _text(self) -> NeutralText:
        assert self.text is not None, "this evaluator has no neutral text"
        return self.text

    def _likelihood(self, mask: AnyMask | None) -> np.ndarray:
        nll = self.evaluate(mask, utility=True).nll
        assert nll is not None
        return nll


def _key(mask: AnyMask | None) -> bytes:
    return b"" if mask is None or mask.is_empty else mask.key
