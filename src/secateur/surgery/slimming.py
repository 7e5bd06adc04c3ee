"""Which units a slimmer model keeps, every layer as many, and the weights that stand in for the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.measures.utility import NeutralText
from secateur.models import LanguageModel
from secateur.progress import Advance
from secateur.scoring.attribution import loss_change
from secateur.scoring.magnitude import peak_share
from secateur.surgery.reconstruction import RIDGE, cheapest_first, grams, input_norms, passes, stand_in
from secateur.surgery.sizes import spread
from secateur.surgery.uniform import check_multiple, fewest_groups
from secateur.units import Mask, UnitSpace

Importance = Literal["loss", "data", "output"]


@dataclass(frozen=True)
class Size:
    """What every layer of a slimmer model has."""

    kv_heads: int
    neurons: int


@dataclass(frozen=True, eq=False)
class Slimming:
    """A way to make a model slimmer.

    Attributes
    ----------
    mask: of all units that go, those of the plan first.
    weights: output projections by the name of the weight, in their whole shape, removed inputs zero; on the CPU.
    importance, ridge: how it was made; ridge None for weights left as they were.
    """

    mask: Mask
    weights: dict[str, Tensor]
    importance: Importance
    ridge: float | None


def target_size(model: LanguageModel, width: float, multiple: int = 8, kv_heads: int | None = None) -> Size:
    """The size of a model of a width.

    Parameters
    ----------
    width: share of the neurons of a layer to keep; rounded to a multiple. kv_heads: to keep; None for all.

    Raises
    ------
    SettingError: a share, a multiple or a number that leaves nothing, everything, or does not fit the family.
    """
    space = UnitSpace.of(model)
    if not 0 < width <= 1:
        raise SettingError(f"The width must lie above 0 and up to 1 (0.8 keeps 80 % of the neurons), not {width}.")
    if model.compact is not None:
        raise SettingError("The model is compact already; slim the model it was made from.")
    check_multiple(space, multiple)
    neurons = round(width * space.neurons[0] / multiple) * multiple
    if neurons == 0:
        raise SettingError(f"A width of {width} in multiples of {multiple} leaves a layer empty; raise it.")
    groups = space.kv_heads[0] if kv_heads is None else kv_heads
    if not 1 <= groups <= space.kv_heads[0]:
        raise SettingError(f"The model has {space.kv_heads[0]} KV heads per layer; keep 1 to {space.kv_heads[0]}.")
    if fewest_groups(model, groups) != groups:
        kind, least = model.model.config.model_type, fewest_groups(model, groups)
        raise SettingError(f"Models of type '{kind}' cannot have {groups} KV heads in this size; keep {least} or more.")
    if (groups, neurons) == (space.kv_heads[0], space.neurons[0]):
        raise SettingError("This width keeps everything; lower --width or --kv-groups.")
    return Size(groups, neurons)


def slimmings(
    model: LanguageModel,
    text: NeutralText,
    start: Mask,
    size: Size,
    importances: Sequence[Importance],
    ridges: Sequence[float | None],
    advance: Advance = lambda _: None,
) -> list[Slimming]:
    """Every combination of an importance and a ridge, from a neutral text.

    Importance of a neuron: "loss" is half the sum of squares of the loss' gradient in its gate; "data" the share of its
    weights' peaks times the norm of its activation (the data-driven importance of Fairness Pruning); "output" what its
    removal costs the layer's output when the others make up for it. A KV group is worth the norm of what its heads
    write (see :func:`_group_norms`).

    Parameters
    ----------
    start: of units that go first. ridges: of least squares, see :mod:`secateur.surgery.reconstruction`; None to leave
        the weights as they are.
    """
    space = UnitSpace.of(model)
    losses = loss_change(model, text, None, advance).curvature if "loss" in importances else None
    weights: dict[tuple[Importance, float | None], dict[str, Tensor]] = {
        (importance, ridge): {} for importance in importances for ridge in ridges
    }
    keeps = {importance: np.zeros(len(space), dtype=bool) for importance in importances}
    heads_go = size.kv_heads < space.kv_heads[0]
    modules = [*(model.attention_outputs if heads_go else []), *model.mlp_outputs]
    for number, gram in enumerate(grams(model, text, modules, advance)):
        layer = number % space.n_layers
        is_attention = heads_go and number < space.n_layers
        path = model.family.attention_out if is_attention else model.family.mlp_out
        name = f"{model.family.blocks}.{layer}.{path}.weight"
        weight = _inputs_last(model, modules[number])
        for importance in importances:
            part = space.head_slice(layer) if is_attention else space.neuron_slice(layer)
            if is_attention:
                kept = _kept_heads(gram, weight, start.keep[part], space.kv_heads[layer], size.kv_heads)
            else:
                worth = None if losses is None else losses[part]
                kept = _kept_neurons(model, layer, gram, weight, start.keep[part], importance, worth, size.neurons)
            kept = kept[start.keep[part][kept]]  # the plan's units stay off where too many of a layer are removed
            keeps[importance][part][kept] = True
            inputs = spread(kept, space.head_dim) if is_attention else kept
            for ridge in ridges:
                columns = weight[:, inputs] if ridge is None else stand_in(gram, weight, inputs, ridge)
                weights[importance, ridge][name] = _whole(model, weight, columns, inputs).cpu()
    if not heads_go:
        for keep in keeps.values():
            keep[: space.n_heads] = start.keep[: space.n_heads]
    return [
        Slimming(Mask(space, keeps[importance], model.fingerprint), found, importance, ridge)
        for (importance, ridge), found in weights.items()
    ]


def work(model: LanguageModel, text: NeutralText, size: Size, importances: Sequence[Importance]) -> int:
    """Steps that :func:`slimmings` reports."""
    heads_go = size.kv_heads < model.kv_heads_per_layer[0]
    modules = [*(model.attention_outputs if heads_go else []), *model.mlp_outputs]
    return len(text.windows) * (passes(model, modules) + ("loss" in importances))


@contextmanager
def replaced(model: LanguageModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """Other weights in a live model while the context lasts."""
    own = {name: model.model.get_parameter(name).data for name in weights}
    try:
        for name, value in weights.items():
            model.model.get_parameter(name).data = value.to(own[name].device)
        yield
    finally:
        for name, value in own.items():
            model.model.get_parameter(name).data = value


def _kept_neurons(
    model: LanguageModel,
    layer: int,
    gram: Tensor,
    weight: Tensor,
    keep: np.ndarray,
    importance: Importance,
    losses: np.ndarray | None,
    size: int,
) -> np.ndarray:
    """Neurons of a layer to keep, ascending: of those that the plan keeps, the most important."""
    if importance == "output":
        return cheapest_first(gram, weight, ~keep, size, RIDGE)
    if importance == "data":
        worth = peak_share(model, layer).double().cpu().numpy() * input_norms(gram)
    else:
        assert losses is not None
        worth = losses
    return _most(worth, keep, size)


def _kept_heads(gram: Tensor, weight: Tensor, keep: np.ndarray, groups: int, size: int) -> np.ndarray:
    """Heads of the most important KV groups of a layer, ascending."""
    by_group = keep.reshape(groups, -1)
    norms = _group_norms(gram, weight, groups)
    chosen = _most(norms, np.asarray(by_group.any(axis=1)), size)
    return spread(chosen, by_group.shape[1])


def _group_norms(gram: Tensor, weight: Tensor, groups: int) -> np.ndarray:
    """L2 norm over the text of what each KV group's heads add to the residual stream, (groups,)."""
    width = len(gram) // groups
    norms = []
    for start in range(0, len(gram), width):
        part, own = weight[:, start : start + width].float(), gram[start : start + width, start : start + width]
        norms.append(float((part @ own * part).sum().clamp(min=0).sqrt()))
    return np.array(norms)


def _most(worth: np.ndarray, keep: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` of most worth among those kept, then among the others; ascending, of equal worth the first."""
    order = np.lexsort((np.arange(len(worth)), -worth, ~keep))  # the last key counts first
    return np.sort(order[:size])


def _inputs_last(model: LanguageModel, module: nn.Module) -> Tensor:
    """A projection's weight as (outputs, inputs)."""
    weight: Tensor = module.weight.data  # type: ignore[assignment, union-attr]
    return weight.T if model.family.transposed else weight


def _whole(model: LanguageModel, weight: Tensor, columns: Tensor, inputs: np.ndarray) -> Tensor:
    """A weight of the projection's own layout with the given columns and zeros elsewhere."""
    full = torch.zeros_like(weight)
    full[:, torch.from_numpy(inputs).to(weight.device)] = columns
    return full.T.contiguous() if model.family.transposed else full
