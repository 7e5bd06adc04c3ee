"""Gates: the loss and its gradient against plain computations, bounds, what stays free, and the rounding."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import write_suite
from test_scoring import fit_of, means_of
from tiny import HEADS, LAYERS, NAMES

import secateur
from secateur.attenuation import Attenuation
from secateur.errors import SettingError
from secateur.evaluation import Evaluator
from secateur.measures.disparity import Table
from secateur.measures.prompts import build_prompts
from secateur.measures.splits import split, whole
from secateur.models import LanguageModel
from secateur.scoring.attribution import pairs_of_groups
from secateur.scoring.gates import Course, GateScores, GateTraining, Lesson
from secateur.search.base import Outcome, Problem
from secateur.search.methods import method
from secateur.search.rounding import Rounding
from secateur.units import Mask, UnitSpace

SHORT = GateTraining(gate_steps=3, prompts=6)


def table_of(fit: Evaluator) -> Table:
    return fit.evaluate().table


def course_of(fit: Evaluator, scorer: GateTraining = SHORT) -> Course:
    return Course.prepare(fit, table_of(fit), scorer.prompts, scorer.seed)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_square_of_gaps_over_spreads(name: str) -> None:
    fit = fit_of(name)
    lesson = Lesson.prepare(fit, table_of(fit), prompts=99, seed=0)  # all markers in one part
    assert len(lesson.parts) == len(fit.prompts.scenarios)
    smds = np.array([gap / spread for _, _, gap, spread in pairs_of_groups(table_of(fit))])  # (pairs, scenarios)
    for scenario in range(len(fit.prompts.scenarios)):
        with torch.no_grad():
            found = float(lesson.loss(fit.model, scenario))
        assert found == pytest.approx(float((smds[:, scenario] ** 2).mean()), rel=1e-3)


def test_a_training_asks_all_markers_of_all_scenarios_in_turn() -> None:
    model, suite = fit_of().model, secateur.load_suite("occupations")
    prompts = build_prompts(model, suite, split(suite, max_markers=9).fit).of_scenarios([0, 1])
    fit = Evaluator(model, prompts)
    lesson = Lesson.prepare(fit, table_of(fit), prompts=6, seed=0)
    asked = [(one.scenario, one.marker) for part in lesson.parts for batch in part.batches for one in batch.prompts]
    assert [len(part.groups) for part in lesson.parts] == [6] * 6  # three of nine markers of each group at a time
    assert sorted(set(asked)) == sorted({(one.scenario, one.marker) for one in fit.prompts.prompts})
    assert all(len(part.groups.unique()) == len(np.unique(fit.prompts.groups)) for part in lesson.parts)


@pytest.fixture
def worded(tmp_path: Path) -> Evaluator:
    """Asks eight markers of each of two groups in three wordings of three scenarios."""
    model, suite = fit_of().model, secateur.load_suite(write_suite(tmp_path))
    return Evaluator(model, build_prompts(model, suite, whole(suite)), fit_of().text)


def test_a_step_asks_about_as_many_prompts_as_it_is_told(worded: Evaluator) -> None:
    lesson = Lesson.prepare(worded, table_of(worded), prompts=12, seed=0)
    assert [sum(len(batch.prompts) for batch in part.batches) for part in lesson.parts] == [12] * 12
    assert [len(part.groups) for part in lesson.parts] == [4] * 12


def asked_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that are asked from now on."""
    asked: list[int] = []
    loss = Lesson.loss

    def heard(self: Lesson, model: LanguageModel, number: int, own_spread: bool = False) -> torch.Tensor:
        asked.append(number)
        return loss(self, model, number, own_spread)

    monkeypatch.setattr(Lesson, "loss", heard)
    return asked


def test_a_training_goes_on_where_the_one_before_stopped(worded: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    start = np.ones(len(UnitSpace.of(worded.model)), dtype=np.float32)
    course = course_of(worded, GateTraining(prompts=12))
    asked = asked_in(monkeypatch)
    for steps in (5, 7):
        SHORT.train(course, start, steps)
    assert sorted(asked) == list(range(12))


def test_neither_names_that_move_apart_nor_answers_that_shrink_win_anything() -> None:
    """The first by the unpruned model's spread, the second by that of the answers."""
    fit = fit_of()
    part = Lesson.prepare(fit, table_of(fit), prompts=99, seed=0).parts[0]
    y = torch.randn(len(part.markers), generator=torch.Generator().manual_seed(0))
    group = part.groups[part.markers]
    mean = torch.stack([y[group == one].mean() for one in group.unique()])[group]
    apart, shrunk = mean + 3 * (y - mean), 0.5 * y

    def loss(answers: torch.Tensor, *, own: bool, variance: float = part.variance) -> float:
        return float(replace(part, variance=variance).gaps(answers, own_spread=own))

    assert loss(apart, own=False) == pytest.approx(loss(y, own=False), rel=1e-4)
    assert loss(shrunk, own=False) == pytest.approx(loss(y, own=False) / 4, rel=1e-4)
    own = loss(y, own=True, variance=1e-9)  # all of the spread is believed
    assert loss(shrunk, own=True, variance=1e-9) == pytest.approx(own, rel=1e-4)
    assert loss(apart, own=True, variance=1e-9) == pytest.approx(own / 9, rel=1e-3)
    assert loss(y, own=True, variance=1e9) < own, "a spread of nothing is not believed"


def test_gates_stay_between_0_and_1_and_every_one_may_move() -> None:
    fit = fit_of()
    gates = SHORT.score(fit).gates
    assert gates.shape == (len(UnitSpace.of(fit.model)),)
    assert gates.min() >= 0
    assert gates.max() <= 1
    assert (gates < 1).mean() > 0.3
    assert (gates[: LAYERS * HEADS] < 1).any()


def test_training_lowers_the_disparity() -> None:
    fit = fit_of()
    table = table_of(fit)
    lesson = Lesson.prepare(fit, table, 99, 0)

    def loss(gates: np.ndarray) -> float:
        removed = np.flatnonzero(gates < 0.5)
        with Mask.removing(fit.model, removed).applied(fit.model), torch.no_grad():
            return sum(float(lesson.loss(fit.model, s)) for s in range(len(lesson.parts)))

    scorer = GateTraining(damage=0, price=0, prompts=99, learning_rate=0.1)
    start = np.ones(len(UnitSpace.of(fit.model)), dtype=np.float32)
    trained = scorer.train(course_of(fit, scorer), start, 30, polarity=0.1)
    assert 0 < (trained < 0.5).sum() < len(trained)
    assert loss(trained) < loss(start)


def test_what_is_not_free_stays_as_it_was() -> None:
    fit = fit_of()
    start = np.random.default_rng(0).random(len(UnitSpace.of(fit.model))).astype(np.float32)
    free = np.arange(len(start)) % 3 == 0
    trained = SHORT.train(course_of(fit), start, 3, free=free)
    np.testing.assert_array_equal(trained[~free], start[~free])
    assert (trained[free] != start[free]).mean() > 0.9


def test_polarity_drives_gates_to_their_nearer_end() -> None:
    fit = fit_of()
    start = np.where(np.arange(len(UnitSpace.of(fit.model))) % 2, 0.8, 0.2).astype(np.float32)
    scorer = GateTraining(damage=0, price=0, learning_rate=0.05)
    trained = scorer.train(course_of(fit, scorer), start, 20, polarity=1e4)
    assert set(np.unique(trained)) == {0.0, 1.0}
    np.testing.assert_array_equal(trained, np.round(start))


def test_few_gates_are_left_on_the_way_by_default() -> None:
    fit, scorer, search = fit_of("qwen2"), GateTraining(), Rounding()

    def left(gates: np.ndarray) -> float:
        return float(((gates > 0.1) & (gates < 0.9)).mean())

    start = scorer.score(fit).gates
    again = scorer.train(course_of(fit, scorer), start, search.steps, polarity=search.polarity)
    assert left(start) > 0.3
    assert left(again) < 0.1


def test_damage_keeps_gates_open() -> None:
    fit = fit_of()
    start = np.ones(len(UnitSpace.of(fit.model)), dtype=np.float32)
    free, dear = (GateTraining(damage=d, price=0).train(course_of(fit), start, 8) for d in (0.0, 1e4))
    assert dear.sum() > free.sum()


def test_training_is_determined_by_its_seed_and_leaves_the_model_as_it_was() -> None:
    fit = fit_of()
    before = table_of(fit).y.copy()
    one, again, other = (GateTraining(gate_steps=3, prompts=6, seed=seed).score(fit).gates for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    fresh = Evaluator(fit.model, fit.prompts, fit.text, fit.batch_size)
    np.testing.assert_array_equal(table_of(fresh).y, before)
    assert not any(parameter.grad is not None for parameter in fit.model.model.parameters())


def test_work_is_what_is_reported() -> None:
    fit, done = fit_of(), []
    SHORT.score(fit, means=means_of(), advance=done.append)
    assert sum(done) == SHORT.work(fit)


class Trained(GateTraining):
    """Scores that are known; training again closes one gate more of those that are free."""

    def score(self, *arguments: object, **options: object) -> GateScores:  # type: ignore[override]
        gates = np.ones(len(UnitSpace.of(fit_of().model)), dtype=np.float32)
        gates[:40] = np.linspace(0.5, 0.9, 40)
        return GateScores(gates)

    def train(self, course: object, start: np.ndarray, steps: int, **options: object) -> np.ndarray:  # type: ignore[override]
        free, gates = options["free"], start.copy()
        assert isinstance(free, np.ndarray)
        assert options["own_spread"] is True
        gates[np.flatnonzero(free & (gates > 0))[:1]] = 0
        self.__dict__.setdefault("damages", []).append(options["damage"])
        return gates

    def work(self, fit: object) -> int:
        return 1


@pytest.mark.parametrize(("from_round", "rounds"), [(1, 2), (2, 2), (3, 3), (4, 4), (99, 4)])
def test_rounds_go_on_until_one_keeps_to_the_limit(from_round: int, rounds: int) -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None))
    proposals, found = Rounding(start=2, rounds=2).proposals(problem, Trained()), []
    with suppress(StopIteration):
        selection = next(proposals)
        while True:
            found.append(selection.knobs.get("round", 0))
            selection = proposals.send(Outcome(0.1, 0.0, found[-1] >= from_round))
    assert found[-1] == rounds


def test_roundings_grow_until_the_limit_and_go_on_from_the_best() -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None))
    scorer = Trained()
    proposals, found, bias = Rounding(start=2, rounds=3).proposals(problem, scorer), [], {2: 0.9, 8: 0.1, 32: 0.1}
    with suppress(StopIteration):
        selection = next(proposals)
        while True:
            found.append(selection)
            within = len(selection.removed) not in (32, 10)
            selection = proposals.send(Outcome(bias.get(len(selection.removed), 0.2), 0.0 if within else 9.0, within))
    # 16 and 23 lie between 8 and 32; 8 with the least bias is what the further rounds start from.
    assert [len(selection.removed) for selection in found] == [2, 8, 32, 16, 23, 9, 10, 11]
    assert [selection.removed.tolist() for selection in found[5:]] == [list(range(n)) for n in (9, 10, 11)]
    assert scorer.__dict__["damages"] == [5.0, 2.5, 10.0]
    assert found[0].kind == "heads"
    assert found[2].kind == "both"


@pytest.mark.parametrize(
    ("increase", "within", "times"),
    [
        (0.02 * 1.7, False, 1.7**2),
        (0.021, False, 1.5),  # a little over: not by so little that the next round is over, too
        (0.019, False, 1.5),  # over for its standard error
        (0.3, False, 4.0),
        (np.inf, False, 4.0),
        (np.nan, False, 4.0),
        (0.018, True, 0.81),
        (0.004, True, 0.5),
        (-0.05, True, 0.5),
    ],
)
def test_damage_weighs_more_after_a_round_over_the_limit(increase: float, within: bool, times: float) -> None:
    fit, scorer = fit_of(), Trained()
    problem = Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None), limit=0.02)
    proposals = Rounding(start=2, rounds=2).proposals(problem, scorer)
    with suppress(StopIteration):
        selection = next(proposals)
        while True:
            selection = proposals.send(
                Outcome(0.1, increase, within) if selection.knobs.get("round") else Outcome(0.1, 0, True)
            )
    first, second, *_ = scorer.__dict__["damages"]
    assert second == pytest.approx(times * first)


@pytest.mark.parametrize(("start", "counts"), [(2, [2, 8, 32, 40]), (99, [40])])
def test_where_the_limit_is_never_broken_all_lowered_gates_are_closed_once(start: int, counts: list[int]) -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None))
    proposals, found = Rounding(start=start, rounds=0).proposals(problem, Trained()), []
    with suppress(StopIteration):
        selection = next(proposals)
        while True:
            found.append(len(selection.removed))
            selection = proposals.send(Outcome(0.1, 0.0, True))
    assert found == counts


def test_further_trainings_are_prepared_once_and_count_as_search(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, seeds, asked = fit_of(), [], asked_in(monkeypatch)
    prepare = Lesson.prepare
    monkeypatch.setattr(Lesson, "prepare", lambda *given: seeds.append(given[-1]) or prepare(*given))
    problem = Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None))
    before = fit.model.usage.copy()
    proposals = Rounding(start=2, factor=1e9, rounds=3, steps=4, pool=20).proposals(problem, SHORT)
    with suppress(StopIteration):
        next(proposals)
        while True:
            proposals.send(Outcome(0.2, 0.0, True))
    assert seeds == [0, [0, 1]]
    assert len(asked) == 3 + 3 * 4
    assert problem.localise_tokens == fit.model.usage.since(before).forward > 0


def test_soft_gates_stay_where_training_left_them() -> None:
    fit = fit_of()
    problem = Problem(fit.model, fit, [fit], lambda name, total: nullcontext(lambda done: None))
    proposals, found = Rounding(start=2, rounds=1, soft=True).proposals(problem, Trained()), []
    with suppress(StopIteration):
        selection = next(proposals)
        while True:
            found.append(problem.mask_of(selection))
            selection = proposals.send(Outcome(0.2, 0.0, len(found) < 3 or "round" in selection.knobs))
    assert all(isinstance(mask, Attenuation) for mask in found)
    first, refined = found[0], found[-1]
    np.testing.assert_allclose(first.gates[:3], [0.5, 0.5 + 0.4 / 39, 1], atol=1e-6)
    assert (first.gates < 1).sum() == 2
    assert refined.gates[0] == 0, "training goes on from the gates, not from their rounding"
    assert 0 < refined.gates[1] < 1


def test_soft_gates_are_refused_with_means_before_anything_is_computed() -> None:
    fit = fit_of()
    chosen = method("gates", {"soft": "true"})
    with pytest.raises(SettingError, match="zero ablation"):
        chosen.check(fit.model, fit.prompts.suite, "mean")
    chosen.check(fit.model, fit.prompts.suite, "zero")
