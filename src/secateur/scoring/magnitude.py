"""``magnitude``: small weights first, from the weights alone.

The measures of a neuron follow Martra (2025), "Fragile Knowledge, Robust Instruction-Following: The Width
Pruning Dichotomy in Llama-3.2" (arXiv 2512.22671), and the library OptiPFair; they are also the static
importance in :mod:`secateur.scoring.fairness_pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.evaluation.evaluator import Evaluator
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.base import Ranking, Settings
from secateur.suites import Suite
from secateur.units import ActivationMeans, Mask

StaticImportance = Literal["ppm", "vow", "pon", "l2"]
# Families whose fused projection holds, per KV group, its query heads, then its key, then its value.
# All others hold all queries, then all keys, then all values, be they fused or not.
GROUPED_PROJECTIONS = ("gpt_neox", "falcon")


class Magnitude(Settings):
    """Remove the units with the smallest weights first: rank = -magnitude.

    Heads: the L2 norm of all weights of the head's query, key, value and output projections, biases left
    out. Key and value are those of the head's KV group, so that heads of one group share them.

    Neurons, with G and U the neuron's gate and up rows, (hidden,) each:

    ======  =====================================================================
    ppm     (max G + |min G|) + (max U + |min U|), the peak-to-peak magnitude
    vow     Var G + Var U, the variance of weights (n - 1 in the denominator)
    pon     ||G||_1 * ||U||_1, the product of norms
    l2      the L2 norm of G and U together
    ======  =====================================================================

    Attributes
    ----------
    importance: the measure of a neuron. The paper recommends ppm; the default l2 (ours) matches the measure of
        heads and works for every family: a neuron without a gate has one row, and l2 is its norm.

    Values: ``magnitude``, (units,). The units are those of the weights and differ between heads and neurons, so
    the two are to be compared among themselves only. Prompts, text, mask and means do not matter.
    """

    importance: StaticImportance = "l2"

    def check(self, model: LanguageModel, suite: Suite) -> None:
        """Refuse a measure that needs a gate for a model that has none.

        Raises
        ------
        SettingError: says to use l2.
        """
        check_importance(model, self.importance)

    def work(self, fit: Evaluator) -> int:
        """Steps that :meth:`score` reports: one per layer."""
        return len(fit.model.blocks)

    def score(
        self,
        fit: Evaluator,
        mask: Mask | None = None,
        means: ActivationMeans | None = None,
        advance: Advance = lambda _: None,
    ) -> Ranking:
        """Measure the weights of all units."""
        heads, neurons = [], []
        for layer in range(len(fit.model.blocks)):
            heads.append(head_norms(fit.model, layer))
            neurons.append(neuron_importance(fit.model, layer, self.importance))
            advance(1)
        magnitude = torch.cat([*heads, *neurons]).numpy().astype(float)
        return Ranking(-magnitude, {"magnitude": magnitude})


def head_norms(model: LanguageModel, layer: int) -> Tensor:
    """L2 norm of each head's query, key, value and output weights, fp32 (heads,)."""
    rows = torch.cat([weight(model, layer, path) for path in model.family.attention_in])
    # Every projection into the heads is a stack of blocks of head_dim rows.
    blocks = rows.square().sum(dim=1).view(-1, model.head_dim).sum(dim=1)
    out = weight(model, layer, model.family.attention_out).square().sum(dim=0)  # (heads * head_dim,)
    total = out.view(-1, model.head_dim).sum(dim=1)
    for projection in head_blocks(model, layer):
        total = total + blocks[projection]
    return total.sqrt().cpu()


def head_blocks(model: LanguageModel, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which blocks of ``head_dim`` rows of the joined projections hold each head's query, key and value, (heads,)."""
    heads, groups = model.heads_per_layer[layer], model.kv_heads_per_layer[layer]
    shared = heads // groups
    head = torch.arange(heads)
    group = head // shared
    attention = model.blocks[layer].get_submodule(model.family.attention)
    if hasattr(attention, "kv_head_of"):  # a compact checkpoint's groups may differ in size
        group = torch.tensor(attention.kv_head_of)
    if model.model.config.model_type in GROUPED_PROJECTIONS:
        start = group * (shared + 2)
        return start + head % shared, start + shared, start + shared + 1
    return head, heads + group, heads + groups + group


def _peaks(rows: Tensor) -> Tensor:
    return rows.amax(dim=1) + rows.amin(dim=1).abs()


def _ppm(rows: Sequence[Tensor]) -> Tensor:
    return _peaks(rows[0]) + _peaks(rows[1])


def _vow(rows: Sequence[Tensor]) -> Tensor:
    return rows[0].var(dim=1) + rows[1].var(dim=1)


def _pon(rows: Sequence[Tensor]) -> Tensor:
    return rows[0].abs().sum(dim=1) * rows[1].abs().sum(dim=1)


def _l2(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(rows), dim=1).square().sum(dim=1).sqrt()


STATIC: dict[StaticImportance, Callable[[Sequence[Tensor]], Tensor]] = {
    "ppm": _ppm,
    "vow": _vow,
    "pon": _pon,
    "l2": _l2,
}


def neuron_importance(model: LanguageModel, layer: int, kind: StaticImportance) -> Tensor:
    """Static importance of each neuron of a layer, fp32 (neurons,); see :class:`Magnitude`."""
    return STATIC[kind](neuron_rows(model, layer)).cpu()


def peak_share(model: LanguageModel, layer: int) -> Tensor:
    """ppm_G / max + ppm_U / max + ppm_down / max, fp32 (neurons,), each maximum taken over the layer."""
    down = weight(model, layer, model.family.mlp_out).T  # (neurons, hidden)
    peaks = [_peaks(rows) for rows in (*neuron_rows(model, layer), down)]
    return torch.stack([peak / peak.max() for peak in peaks]).sum(dim=0).cpu()


def neuron_rows(model: LanguageModel, layer: int) -> list[Tensor]:
    """The weights into each neuron, fp32 (neurons, hidden): gate and up for a GLU, one matrix otherwise."""
    joined = torch.cat([weight(model, layer, path) for path in model.family.mlp_in])
    # Where gate and up are one projection, the gate comes first, as it does in the architecture table.
    return list(joined.split(model.neurons_per_layer[layer]))


def weight(model: LanguageModel, layer: int, path: str) -> Tensor:
    """A projection's weights in fp32, (out, in) also where the family stores them transposed."""
    stored = _stored(model.blocks[layer].get_submodule(path)).float()
    return stored.T if model.family.transposed else stored


def _stored(module: nn.Module) -> Tensor:
    stored: Tensor = module.weight  # type: ignore[assignment]
    return stored.detach()


def check_importance(model: LanguageModel, importance: str) -> None:
    """Refuse an importance that is made of gate and up rows for a model without a gate.

    Raises
    ------
    SettingError: says to use l2.
    """
    modules = [model.blocks[0].get_submodule(path) for path in model.family.mlp_in]
    rows = sum(_stored(module).shape[1 if model.family.transposed else 0] for module in modules)
    if importance != "l2" and rows == model.neurons_per_layer[0]:
        raise SettingError(
            f"the importance '{importance}' needs the gate of a gated MLP, which models of type "
            f"'{model.model.config.model_type}' do not have; set its importance to l2."
        )
