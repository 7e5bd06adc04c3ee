"""Orders from weights, from gradients and from chance, against plain loops and transformers' own reshaping."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from test_scoring import fit_of, means_of, model_of, prompts_of, some_mask, table_of, text_of
from tiny import HEADS, NAMES, prompts, tiny_model
from torch import Tensor

from secateur.errors import SettingError
from secateur.evaluation import Evaluator
from secateur.measures.answers import batch_y, pack
from secateur.measures.prompts import PromptSet
from secateur.models import LanguageModel
from secateur.scoring.gradient import Gradient, by_layer
from secateur.scoring.magnitude import Magnitude, head_blocks, neuron_rows
from secateur.scoring.random import Random
from secateur.search.methods import method
from secateur.units import Gates, Mask, UnitSpace, gated, masked

PLAIN = ("gpt2", "gpt_neo", "gpt_neox", "opt", "falcon")
GATED = ("llama", "qwen3", "gemma2", "phi3")
# Those whose heads do not share a norm over all queries, as OLMo 2's do.
SEPARATE = [name for name in NAMES if not name.startswith("olmo2")]


# --- heads ---


def stored(model: LanguageModel, layer: int, path: str) -> Tensor:
    """A projection's weights as (out, in)."""
    module = model.blocks[layer].get_submodule(path)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.data.T if model.family.transposed else weight.data


def split_as_transformers_does(model: LanguageModel, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (heads, head_dim, hidden), keys and values (kv_heads, head_dim, hidden)."""
    config, family = model.model.config, model.family
    parts = [stored(model, layer, path) for path in family.attention_in]
    if len(parts) == 3:
        q, k, v = (part.reshape(-1, model.head_dim, part.shape[1]) for part in parts)
        return q, k, v
    (fused,) = parts
    width = fused.shape[1]
    if config.model_type == "gpt2":
        q, k, v = (part.reshape(HEADS, -1, width) for part in fused.split(config.hidden_size))
    elif config.model_type == "phi3":
        kv = config.num_key_value_heads * model.head_dim
        q, k, v = (part.reshape(-1, model.head_dim, width) for part in fused.split([HEADS * model.head_dim, kv, kv]))
    elif config.model_type == "gpt_neox":
        q, k, v = fused.view(HEADS, 3 * model.head_dim, width).chunk(3, dim=1)
    elif config.new_decoder_architecture:
        grouped = fused.view(config.num_kv_heads, HEADS // config.num_kv_heads + 2, model.head_dim, width)
        q, k, v = grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]
    elif config.multi_query:
        grouped = fused.view(HEADS + 2, model.head_dim, width)
        q, k, v = grouped[:-2], grouped[[-2]], grouped[[-1]]
    else:
        q, k, v = fused.view(HEADS, 3, model.head_dim, width).unbind(1)
    return q, k, v


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_measured_by_all_weights_of_their_projections(name: str) -> None:
    model = model_of(name)
    space = UnitSpace.of(model)
    magnitude = Magnitude().score(fit_of(name)).values["magnitude"]
    for layer in range(space.n_layers):
        q, k, v = split_as_transformers_does(model, layer)
        out = stored(model, layer, model.family.attention_out)
        for head in range(HEADS):
            group = head // (HEADS // len(k))
            columns = out[:, head * model.head_dim : (head + 1) * model.head_dim]
            square = sum(float(w) ** 2 for part in (q[head], k[group], v[group], columns) for w in part.flatten())
            assert magnitude[space.head_slice(layer)][head] == pytest.approx(square**0.5, rel=1e-5)


def head_inputs(model: LanguageModel) -> Tensor:
    """What the first layer's heads give for two prompts, (heads, values)."""
    seen: list[Tensor] = []
    hook = model.attention_outputs[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model.model(input_ids=prompts(model), use_cache=False)
    hook.remove()
    return seen[0].reshape(-1, HEADS, model.head_dim).transpose(0, 1).flatten(1)


def empty_block(model: LanguageModel, block: int) -> None:
    """Set a block of ``head_dim`` rows of the first layer's joined projections, and its biases, to 0."""
    start = block * model.head_dim
    for path in model.family.attention_in:
        rows = stored(model, 0, path)
        if 0 <= start < len(rows):
            rows[start : start + model.head_dim] = 0
            bias = getattr(model.blocks[0].get_submodule(path), "bias", None)
            if bias is not None:
                bias.data[start : start + model.head_dim] = 0
        start -= len(rows)


@pytest.mark.parametrize("name", SEPARATE)
def test_a_block_of_rows_feeds_the_heads_that_it_is_ascribed_to(name: str) -> None:
    space = UnitSpace.of(model_of(name))
    before = head_inputs(model_of(name))
    shared = space.heads[0] // space.kv_heads[0]
    for number, projection in enumerate(head_blocks(model_of(name), 0)):
        for head in range(HEADS):
            model = tiny_model(name)
            empty_block(model, int(projection[head]))
            after = head_inputs(model)
            group = range(head // shared * shared, (head // shared + 1) * shared)
            changed = [head] if number == 0 else list(group)
            assert (after != before).any(dim=1).nonzero().flatten().tolist() == changed
            # A head without value gives nothing; one without query or key attends to all alike.
            assert bool((after[changed] == 0).all()) == (number == 2)


# --- neurons ---


def plain_importance(kind: str, gate: list[float], up: list[float]) -> float:
    if kind == "ppm":
        return max(gate) + abs(min(gate)) + max(up) + abs(min(up))
    if kind == "vow":
        return statistics.variance(gate) + statistics.variance(up)
    if kind == "pon":
        return sum(map(abs, gate)) * sum(map(abs, up))
    return sum(w * w for w in gate + up) ** 0.5


def gate_and_up(model: LanguageModel, layer: int) -> tuple[Tensor, Tensor]:
    mlp = model.blocks[layer].get_submodule("mlp")
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj.weight.chunk(2, dim=0)  # type: ignore[union-attr, operator]
        return gate, up
    return mlp.gate_proj.weight, mlp.up_proj.weight  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("kind", ["ppm", "vow", "pon", "l2"])
def test_neurons_are_measured_by_gate_and_up_rows(name: str, kind: str) -> None:
    model = model_of(name)
    space = UnitSpace.of(model)
    ranking = Magnitude.model_validate({"importance": kind}).score(fit_of(name))
    for layer in range(space.n_layers):
        gate, up = gate_and_up(model, layer)
        expected = [plain_importance(kind, g.tolist(), u.tolist()) for g, u in zip(gate, up, strict=True)]
        np.testing.assert_allclose(ranking.values["magnitude"][space.neuron_slice(layer)], expected, rtol=1e-5)
    np.testing.assert_array_equal(ranking.rank, -ranking.values["magnitude"])


@pytest.mark.parametrize("name", GATED)
def test_gate_rows_come_first(name: str) -> None:
    model = model_of(name)
    gate, up = neuron_rows(model, 0)
    seen: dict[str, Tensor] = {}
    inside, outside = model.blocks[0].get_submodule(model.family.mlp_in[0]), model.mlp_outputs[0]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0].detach()}))
        for key, module in (("in", inside), ("out", outside))
    ]
    with torch.no_grad():
        model.model(input_ids=prompts(model), use_cache=False)
    for hook in hooks:
        hook.remove()
    mlp = model.blocks[0].get_submodule("mlp")
    activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    expected = activation(seen["in"] @ gate.T) * (seen["in"] @ up.T)  # type: ignore[operator]
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_neurons_without_a_gate_are_measured_by_their_one_row(name: str) -> None:
    model = model_of(name)
    magnitude = Magnitude().score(fit_of(name)).values["magnitude"]
    space = UnitSpace.of(model)
    weight: Tensor = model.blocks[1].get_submodule(model.family.mlp_in[0]).weight  # type: ignore[assignment]
    for neuron, value in enumerate(magnitude[space.neuron_slice(1)]):
        row = weight[:, neuron] if name == "gpt2" else weight[neuron]
        assert value == pytest.approx(sum(float(w) ** 2 for w in row) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("scorer", ["magnitude", "fairness-pruning"])
@pytest.mark.parametrize("name", NAMES)
def test_measures_that_need_a_gate_are_refused_where_there_is_none(name: str, scorer: str) -> None:
    model, suite = model_of(name), prompts_of(name).suite
    kinds = ["ppm", "vow", "pon"] + ["data"] * (scorer == "fairness-pruning")
    for kind in kinds:
        chosen = method(scorer, {"importance": kind})
        if name.split("-")[0] in PLAIN:
            with pytest.raises(SettingError, match=r"do not have; set its importance to l2\.$"):
                chosen.check(model, suite)
        else:
            chosen.check(model, suite)
    method(scorer, {"importance": "l2"}).check(model, suite)


def test_the_smallest_weights_go_first() -> None:
    model = tiny_model()
    for path in (*model.family.mlp_in, *model.family.attention_in, model.family.attention_out):
        stored(model, 1, path).mul_(1e-3)
    order = Magnitude().score(Evaluator(model, prompts_of())).order()
    space = UnitSpace.of(model)
    heads, neurons = order[order < space.n_heads], order[order >= space.n_heads]
    assert set(heads[:HEADS]) == set(range(len(order))[space.head_slice(1)])
    assert set(neurons[: space.neurons[1]]) == set(range(len(order))[space.neuron_slice(1)])


# --- chance ---


def test_random_orders_hold_every_unit_and_follow_the_seed() -> None:
    fit = fit_of()
    orders = [Random(seed=seed).score(fit).order().tolist() for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(len(UnitSpace.of(fit.model))))
    assert orders[0] == orders[1] != orders[2]
    assert Random().seed == 0


# --- gradients ---


def disparity_of(y: Tensor, prompt_set: PromptSet) -> Tensor:
    """Root mean square SMD over scenarios and pairs of groups, from y by prompt, in loops."""
    squares = []
    groups = prompt_set.groups
    for scenario in prompt_set.scenarios:
        by_marker = []
        for marker in prompt_set.markers:
            own = [i for i, p in enumerate(prompt_set.prompts) if (p.scenario, p.marker) == (scenario, marker)]
            by_marker.append(y[own].mean())
        values = torch.stack(by_marker)
        members = [values[torch.from_numpy(groups == group)] for group in range(groups.max() + 1)]
        variance = torch.stack([member.var() for member in members]).mean()
        for a in range(groups.max() + 1):
            for b in range(a + 1, groups.max() + 1):
                squares.append((members[a].mean() - members[b].mean()) ** 2 / variance)
    return torch.stack(squares).mean().sqrt()


@pytest.mark.parametrize(("pruned", "mean"), [(False, False), (True, False), (True, True)])
def test_gradient_of_bias_equals_autograd_on_a_mask(pruned: bool, mean: bool) -> None:
    fit = fit_of()
    means = means_of() if mean else None
    mask = some_mask(fit.model, means) if pruned else None
    gates = Gates.ones(fit.model, means=means)
    with masked(fit.model, mask), gated(fit.model, gates):
        y = torch.cat([batch_y(fit.model, fit.prompts.suite, batch) for batch in pack(fit.model, fit.prompts)])
        gradients = torch.autograd.grad(disparity_of(y.double(), fit.prompts), gates.leaves())
    expected = torch.cat(gradients).abs().numpy()
    ranking = Gradient().score(fit, mask, means)
    np.testing.assert_allclose(ranking.rank, expected, rtol=1e-3, atol=1e-4 * expected.max())
    if mask is not None:
        np.testing.assert_allclose(ranking.rank[mask.removed], 0, atol=1e-6 * expected.max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "opt"])
@pytest.mark.parametrize("mean", [False, True])
def test_gradient_of_loss_equals_autograd_on_a_mask_per_window(name: str, mean: bool) -> None:
    model, text = model_of(name), text_of(name)
    means = means_of(name) if mean else None
    mask = some_mask(model, means)
    expected = np.zeros(len(UnitSpace.of(model)))
    tokens = 0
    for window in text.windows:
        gates = Gates.ones(model, means=means)
        with masked(model, mask), gated(model, gates):
            logits = model.model(window.tokens[None], use_cache=False).logits[0]
        chosen = logits.log_softmax(-1)[:-1].gather(1, window.tokens[1:, None])[window.start - 1 :]
        expected += torch.cat(torch.autograd.grad(chosen.sum(), gates.leaves())).abs().numpy()
        tokens += len(chosen)
    ranking = Gradient(of="loss").score(fit_of(name), mask, means)
    found = ranking.values["sensitivity"]
    np.testing.assert_allclose(found, expected / tokens, rtol=1e-3, atol=1e-5 * expected.max() / tokens)
    np.testing.assert_array_equal(ranking.rank, -found)


def test_normalised_values_have_norm_one_in_every_layer_and_kind() -> None:
    space = UnitSpace(heads=(2, 2), kv_heads=(1, 1), neurons=(3, 3), head_dim=4)
    values = np.arange(len(space), dtype=float)
    values[:2] = 0
    scaled = by_layer(values, space)
    np.testing.assert_array_equal(scaled[:2], 0)
    for part in (slice(2, 4), slice(4, 7), slice(7, 10)):
        np.testing.assert_allclose(scaled[part], values[part] / sum(v**2 for v in values[part]) ** 0.5)
    fit = fit_of()
    plain, normalised = (Gradient(normalise=on).score(fit) for on in (False, True))
    np.testing.assert_allclose(normalised.rank, by_layer(plain.rank, UnitSpace.of(fit.model)))


@pytest.mark.parametrize("scorer", [Random(), Magnitude(), Gradient(), Gradient(of="loss")])
def test_work_is_what_is_reported_and_the_model_is_left_as_it_was(scorer: Random | Magnitude | Gradient) -> None:
    fit = fit_of()
    before = table_of(fit).y
    done: list[int] = []
    ranking = scorer.score(fit, Mask.none(fit.model), None, done.append)
    assert sum(done) == scorer.work(fit)
    assert ranking.rank.shape == (len(UnitSpace.of(fit.model)),)
    np.testing.assert_array_equal(table_of(fit).y, before)
    assert not any(module._forward_pre_hooks for module in fit.model.model.modules())


def test_backward_tokens_are_counted() -> None:
    fit = fit_of()
    for scorer, tokens in (
        (Gradient(), sum(batch.tokens for batch in fit.batches)),
        (Gradient(of="loss"), sum(len(window.tokens) for window in text_of().windows)),
    ):
        before = fit.model.usage.copy()
        scorer.score(fit)
        assert fit.model.usage.since(before).backward == tokens
