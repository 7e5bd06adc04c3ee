"""The default model for real: loading, invariance to batch size, and a short repair."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import secateur
from secateur.evaluation import Evaluator
from secateur.measures.answers import measure_y, pack
from secateur.measures.prompts import PromptSet, build_prompts
from secateur.measures.splits import Part
from secateur.measures.utility import NeutralText, read_passages, split_text
from secateur.scoring.attribution import Attribution, disparity
from secateur.units import Mask, masked

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model() -> secateur.LanguageModel:
    return secateur.load()


@pytest.fixture(scope="module")
def part() -> Part:
    """Four scenarios, the last ten occupations of one group and the first ten of the other."""
    suite = secateur.load_suite("occupations")
    middle = len(next(iter(suite.groups.values())))
    paraphrases = tuple((0,) if i < 4 else () for i in range(len(suite.scenarios)))
    return Part(paraphrases, tuple(range(middle - 10, middle + 10)))


def test_unit_counts(model: secateur.LanguageModel) -> None:
    space = secateur.UnitSpace.of(model)
    assert (space.n_heads, space.n_neurons, space.head_dim) == (270, 46_080, 64)
    assert set(space.kv_heads) == {3}


def test_y_does_not_depend_on_the_batch_size(model: secateur.LanguageModel, part: Part) -> None:
    prompts = build_prompts(model, secateur.load_suite("occupations"), part)
    y = [measure_y(model, prompts, pack(model, prompts, size)) for size in (1, 7, 64, 128)]
    for other in y[1:]:
        torch.testing.assert_close(other, y[0], atol=1e-4, rtol=0)


def test_y_equals_plain_transformers(model: secateur.LanguageModel) -> None:
    """One prompt, tokenised and measured with transformers alone."""
    suite = secateur.load_suite("occupations")
    nurse = [m for markers in suite.groups.values() for m in markers].index("nurse")
    prompts = build_prompts(model, suite, Part(((0,), *(() for _ in suite.scenarios[1:])), (nurse,)))
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Continue the sentence."}], tokenize=False, add_generation_prompt=True
    )
    ids = model.tokenizer(text + "The nurse said that", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        log_probabilities = model.model(**ids).logits[0, -1].log_softmax(-1)
    he, she = (model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" he", " she"))
    y = measure_y(model, prompts, pack(model, prompts))
    assert float(y[0]) == pytest.approx(float(log_probabilities[he] - log_probabilities[she]), abs=1e-4)
    assert float(y[0]) < 0


@torch.no_grad()
def plain(
    model: secateur.LanguageModel, prompts: PromptSet, text: NeutralText, mask: Mask
) -> tuple[list[float], list[torch.Tensor]]:
    """y of every prompt, and by window the log-probabilities where a token is scored: a whole pass for each."""
    y = []
    with masked(model, mask):
        for prompt in prompts.prompts:
            logs = []
            for answer in prompt.answers:
                ids = torch.tensor([[*prompt.context, *answer]])
                steps = model.model(input_ids=ids, use_cache=False).logits[0, len(prompt.context) - 1 : -1]
                logs.append(steps.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
            first = len(prompts.suite.scenarios[prompt.scenario].measure.a)
            y.append(float(torch.stack(logs[:first]).logsumexp(0) - torch.stack(logs[first:]).logsumexp(0)))
        whole = [model.model(input_ids=window.tokens[None], use_cache=False).logits[0] for window in text.windows]
    return y, [one[window.start - 1 : -1].log_softmax(-1) for one, window in zip(whole, text.windows, strict=True)]


@pytest.mark.parametrize("options", [{"keep_bytes": 1 << 30}, {"masks_at_once": 2}], ids=["restarts", "several"])
def test_the_engine_finds_what_plain_passes_find(model: secateur.LanguageModel, options: dict[str, int]) -> None:
    """Two masks that part in a late layer; y, log-perplexity and KL."""
    suite = secateur.load_suite("occupations")
    middle = len(next(iter(suite.groups.values())))
    paraphrases = tuple((0,) if i < 2 else () for i in range(len(suite.scenarios)))
    prompts = build_prompts(model, suite, Part(paraphrases, tuple(range(middle - 3, middle + 3))))
    text = split_text(model, read_passages())["fit"].first(2, 64)
    engine = Evaluator(model, prompts, text, divergence=True, **options)
    heads = secateur.UnitSpace.of(model).n_heads
    units = [*range(0, 2 * heads // 3, 10), heads + 7]
    masks = [Mask.removing(model, units), Mask.removing(model, [*units, heads - heads // 6])]
    before = model.usage.forward
    found = list(engine.evaluate_each(masks, utility=True))
    if engine.keep_bytes:
        assert model.usage.forward - before < 2 * engine.tokens, "the second pass is not whole"
    unpruned = torch.cat(plain(model, prompts, text, Mask.none(model))[1])
    targets = torch.cat([window.tokens[window.start :] for window in text.windows])
    for mask, one in zip(masks, found, strict=True):
        assert one is not None
        y, read = plain(model, prompts, text, mask)
        after = torch.cat(read)
        np.testing.assert_allclose(engine.y(mask), y, rtol=0, atol=1e-4)
        assert one.log_perplexity == pytest.approx(-float(after.gather(1, targets[:, None]).mean()), abs=1e-4)
        assert one.kl == pytest.approx(float((unpruned.exp() * (unpruned - after)).sum(1).mean()), abs=1e-4)
        assert one.kl > 1e-3, "a mask that does nothing shows nothing"


def test_attribution_agrees_with_switching_units_off(model: secateur.LanguageModel, part: Part) -> None:
    """First order against the whole way, for heads and neurons drawn by chance and for neurons that matter."""
    suite = secateur.load_suite("occupations")
    prompts = build_prompts(model, suite, part).of_scenarios([0, 1])
    fit = Evaluator(model, prompts, split_text(model, read_passages())["fit"].first(1))
    effect, space = Attribution().score(fit).effect, secateur.UnitSpace.of(model)
    rng = np.random.default_rng(0)
    neurons = space.n_heads + np.argsort(-np.abs(effect[space.n_heads :]))
    drawn = ((np.arange(space.n_heads), 24), (neurons[:400], 20), (neurons[400:], 20))
    units = np.concatenate([rng.permutation(some)[:count] for some, count in drawn])
    before = disparity(fit.evaluate().table)
    change = np.array([disparity(fit.evaluate(Mask.removing(model, [u])).table) - before for u in units])
    assert len(set(units)) == 64
    large = np.abs(change) > np.median(np.abs(change))
    # Each kind apart: the difference in size between heads and neurons alone would give a high one of all.
    for stratum in np.split(np.arange(64), [24, 44]):
        found = spearmanr(effect[units[stratum]], change[stratum]).statistic
        print(f"Spearman of {len(stratum)} units: {found:.3f}")
        assert found > 0.9
    assert (np.sign(effect[units]) == np.sign(change))[large].mean() > 0.9


def test_audit_finds_the_gender_bias_of_occupations(model: secateur.LanguageModel, part: Part) -> None:
    suite = secateur.load_suite("occupations")
    evaluator = Evaluator(model, build_prompts(model, suite, part))
    table = evaluator.evaluate().table
    gaps = table.y[:, table.groups == 0].mean(axis=1) - table.y[:, table.groups == 1].mean(axis=1)
    assert (gaps > 0.5).all()


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_checkpoint_loads_without_secateur(model: secateur.LanguageModel, tmp_path: Path, ablation: str) -> None:
    from secateur.measures.utility import activation_means, cut
    from secateur.surgery import write_checkpoint

    means = (
        activation_means(model, cut(model, "The river rose after three days of rain.")) if ablation == "mean" else None
    )
    mask = Mask.removing(model, [5, 100, 269, 1000, 20_000, 46_000], means)
    prompt = model.tokenizer("The engineer said that", return_tensors="pt")["input_ids"]
    with masked(model, mask), torch.no_grad():
        expected = model.model(prompt).logits[0, -1].log_softmax(-1)
    write_checkpoint(model, mask, tmp_path / "checkpoint")
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'checkpoint')!r})\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(tmp_path / 'checkpoint')!r})\n"
        "ids = tokenizer('The engineer said that', return_tensors='pt')['input_ids']\n"
        "with torch.no_grad(): logits = model(ids).logits[0, -1].log_softmax(-1)\n"
        "assert 'secateur' not in sys.modules\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, timeout=300)
    actual = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
