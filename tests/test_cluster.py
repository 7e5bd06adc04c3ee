"""Evaluations on a local Ray cluster: the same figures for any number of actors, and after actors have died."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.exceptions
from command import save_model
from test_scoring import SUITE
from tiny import tiny_model

import secateur
from secateur.errors import ClusterError, NumericalError
from secateur.evaluation import Evaluator
from secateur.evaluation.cluster import KEPT_PARTS, Actor, Cluster, Worker, check_address, division
from secateur.evaluation.memory import Shape, actor_bytes
from secateur.evaluation.store import Store
from secateur.measures.prompts import build_prompts
from secateur.measures.splits import whole
from secateur.measures.utility import cut
from secateur.models import LanguageModel
from secateur.units import ActivationMeans, Mask, UnitSpace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return secateur.load(save_model(tmp_path_factory.mktemp("models") / "tiny", seed=2), device="cpu")


@pytest.fixture(scope="module")
def cluster(model: LanguageModel) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of another cluster, which "local" does not mean
        started = Cluster.start("local:2", model)
    with started:
        yield started


def evaluator(model: LanguageModel, **options: Any) -> Evaluator:
    text = cut(model, "a boat and a lamp, " * 40, window=50, stride=30)
    return Evaluator(model, build_prompts(model, SUITE, whole(SUITE)), text, 5, divergence=True, **options)


def some_masks(model: LanguageModel) -> list[Mask]:
    rng, units = np.random.default_rng(0), len(UnitSpace.of(model))
    masks = [Mask.removing(model, rng.choice(units, size=size, replace=False)) for size in (1, 3, 9, 30)]
    space = UnitSpace.of(model)
    means = ActivationMeans(
        tuple(np.full((n, space.head_dim), 0.3, dtype=np.float32) for n in space.heads),
        tuple(np.full(n, 0.2, dtype=np.float32) for n in space.neurons),
    )
    return [*masks, masks[1], Mask.none(model), Mask.removing(model, [0, 20], means)]


def test_actors_measure_what_is_measured_here(
    model: LanguageModel, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, done = evaluator(model), evaluator(model, cluster=cluster), []
    masks, here_alone = some_masks(model), []
    hidden = LanguageModel.hidden
    monkeypatch.setattr(
        LanguageModel, "hidden", lambda self, ids, *rest: (here_alone.append(ids.numel()), hidden(self, ids, *rest))[1]
    )
    before = model.usage.forward
    found = list(there.evaluate_each(masks, done.append, utility=True))
    assert sum(done) == len(masks) * there.work(utility=True)
    spent = model.usage.forward - before
    monkeypatch.undo()
    for mask, measured in zip(masks, found, strict=True):
        expected = here.evaluate(mask, utility=True)
        assert measured is not None
        np.testing.assert_allclose(measured.table.y, expected.table.y, atol=1e-5)
        np.testing.assert_allclose(measured.nll, expected.nll, atol=1e-3)
        assert there.kl_divergence(mask) == pytest.approx(here.kl_divergence(mask), abs=1e-6)
    assert here.text is not None
    once = sum(batch.tokens for batch in here.batches) + sum(len(window.tokens) for window in here.text.windows)
    assert sum(here_alone) <= once, "only the unpruned model is measured in this process"
    assert spent >= sum(here_alone) + 5 * once, "tokens of the actors count, too"


def test_an_actor_that_dies_is_replaced_and_its_mask_measured_again(model: LanguageModel, cluster: Cluster) -> None:
    masks = [Mask.removing(model, [unit]) for unit in range(8)]
    there, replaced = evaluator(model, cluster=cluster), cluster.replaced
    measured: dict[bytes, Any] = {}
    for number, (mask, figures) in enumerate(cluster.measure(there, masks, False)):
        measured[mask.key] = figures
        if number == 1:
            cluster.ray.kill(cluster.actors[0].handle)
    assert cluster.replaced > replaced
    here = evaluator(model)
    assert set(measured) == {mask.key for mask in masks}
    for mask in masks:
        np.testing.assert_allclose(measured[mask.key]["y"], here.y(mask), atol=1e-5)


def test_actors_that_die_for_ever_are_given_up(
    model: LanguageModel, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Cluster._begin

    def doomed(self: Cluster) -> Any:
        actor = begin(self)
        self.ray.kill(actor.handle)
        return actor

    masks = [Mask.removing(model, [unit]) for unit in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "_begin", doomed)
        cluster.ray.kill(cluster.actors[0].handle)
        cluster.ray.kill(cluster.actors[1].handle)
        with pytest.raises(ClusterError, match=r"actors died \d+ times"):
            list(cluster.measure(evaluator(model), masks, False))
    cluster.actors, cluster.replaced = [cluster._begin(), cluster._begin()], 0
    assert len(list(cluster.measure(evaluator(model), masks, False))) == 2


@pytest.mark.parametrize(
    ("machines", "gpus", "expected"),
    [
        ([{"CPU": 6.0, "memory": 80e9}], 0, 6),
        ([{"CPU": 6.0, "memory": 80e9}, {"CPU": 2.0, "memory": 64e9}], 0, 8),
        ([{"CPU": 64.0, "memory": 40e9}], 0, 3),
        ([{"CPU": 64.0, "memory": 11e9}, {"CPU": 2.0, "memory": 64e9}], 0, 2),
        ([{"CPU": 64.0}], 0, 0),
        ([{"CPU": 64.0, "GPU": 8.0, "memory": 1e12}], 0, 64),  # the model is on a CPU here
        ([{"CPU": 64.0, "GPU": 8.0}], 1, 8),
        ([{"GPU": 8.0}, {"GPU": 8.0}, {"GPU": 8.0}], 3, 6),
        ([{"GPU": 1.0}, {"GPU": 1.0}], 2, 0),
        ([{"CPU": 64.0}], 2, 0),
    ],
)
def test_there_are_as_many_actors_as_there_is_room_for(
    machines: list[dict[str, float]], gpus: int, expected: int
) -> None:
    nodes = [{"Alive": True, "Resources": resources} for resources in machines]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0, "memory": 1e12}}
    assert division([dead, *nodes], gpus, 12_000_000_000) == expected


@pytest.mark.parametrize(
    ("address", "asked", "room"), [("auto", {"num_cpus": 1, "memory": 700}, 3), ("local:2", {"num_cpus": 1}, 2)]
)
def test_ray_sets_the_memory_of_an_actor_aside_unless_their_number_is_asked_for(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, address: str, asked: dict[str, int], room: int
) -> None:
    monkeypatch.setattr("secateur.evaluation.cluster.actor_bytes", lambda _: 700)
    fake = FakeRay(model, {}, nodes=[{"CPU": 8.0, "memory": 2200.0}])
    monkeypatch.setattr("secateur.evaluation.cluster._ray", lambda: fake)
    with Cluster.start(address, model) as started:
        assert len(started.actors) == room
    assert [{name: value for name, value in options.items() if value} for options in fake.options] == [asked] * room


def test_an_actor_takes_more_memory_than_its_model(model: LanguageModel) -> None:
    config = model.model.config
    taken = actor_bytes(model)
    assert taken > model.weight_bytes + 2 * 4 * 896 * config.vocab_size
    half = Shape(config.hidden_size, config.intermediate_size, config.vocab_size, 2)
    assert half.head_copy == 4 * config.hidden_size * config.vocab_size
    assert Shape.of(model).head_copy == 0
    assert 2 * half.activations(900) == Shape.of(model).activations(900)


def starting(
    model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    errors: dict[tuple[str, int], BaseException] | None = None,
    absent: Container[int] = (),
) -> FakeRay:
    """What the next cluster starts on: Ray with room for three actors."""
    fake = FakeRay(model, errors or {}, absent, [{"CPU": 3.0, "memory": 1e12}])
    monkeypatch.setattr("secateur.evaluation.cluster._ray", lambda: fake)
    return fake


def test_the_first_actor_that_is_ready_begins(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = starting(model, monkeypatch, absent={0, 2})
    with Cluster.start("auto", model) as cluster:
        masks = [Mask.removing(model, [unit]) for unit in range(5)]
        assert len(list(cluster.measure(evaluator(model), masks, False))) == 5
        fake.arrive(2)
        assert len(list(cluster.measure(evaluator(model), masks, False))) == 5
        assert [actor.ready is None for actor in cluster.actors] == [False, True, True]
    assert not fake.waited
    assert len(fake.killed) == 3


def test_a_cluster_without_a_ready_actor_is_given_up(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = starting(model, monkeypatch, absent=range(99))
    with pytest.raises(ClusterError, match=r"^No actor was ready on 'auto' after 30 minutes; other work may hold"):
        Cluster.start("auto", model)
    assert fake.waited == [1800]
    assert fake.is_shut


def test_a_cluster_without_memory_is_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.evaluation.cluster.actor_bytes", lambda _: 14_200_000_000)
    fake = FakeRay(model, {}, nodes=[{"CPU": 8.0, "memory": 14e9}])
    monkeypatch.setattr("secateur.evaluation.cluster._ray", lambda: fake)
    with pytest.raises(ClusterError, match=r"^An actor takes a core and 14\.2 GB of memory with this model, and no"):
        Cluster.start("auto", model)
    assert fake.is_shut


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (ray.exceptions.ActorDiedError(), ClusterError, "An actor on 'auto' cannot load the model"),
    ],
)
def test_what_ends_the_start_leaves_no_session_open(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type, said: str | None
) -> None:
    fake = starting(model, monkeypatch, {("__ray_ready__", 0): error})
    with pytest.raises(expected, match=said):
        Cluster.start("auto", model)
    assert fake.is_shut
    assert len(fake.killed) == 3


def test_a_session_that_is_gone_hides_no_error(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = starting(model, monkeypatch)
    monkeypatch.setattr(fake, "kill", lambda _: (_ for _ in ()).throw(RuntimeError("no session")))
    with pytest.raises(NumericalError, match="the real one"), Cluster.start("auto", model):
        raise NumericalError("the real one")
    assert fake.is_shut


def test_a_cluster_too_small_for_the_model_is_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.evaluation.cluster.gpus_of", lambda _: 4)
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}])
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with pytest.raises(ClusterError, match=r"^The model takes 4 GPUs, more than the cluster 'auto' has"):
        Cluster.start("auto", model)


def test_a_model_that_no_actor_can_load_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ClusterError, match="Actors load the model themselves"):
        Cluster.start("local:1", tiny_model())


@pytest.mark.parametrize("address", ["local:", "local:0", "local:many", "local:-1"])
def test_an_address_without_a_number_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="names no number of actors; write local:2, auto, or a cluster's address"):
        check_address(address)


def test_a_missing_ray_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"Ray is not installed; run: pip install 'secateur\[ray\]'"):
        check_address("auto")
    check_address(None)


class FakeRay:
    """Ray with actors in this process, each call done at once; calls by number end in an error instead.

    An actor whose number is in ``absent`` does not answer until it arrives; what waits for that alone waits ``waited``
    seconds in vain. ``options`` are what was asked for each actor.
    """

    exceptions = ray.exceptions

    def __init__(
        self,
        model: LanguageModel,
        errors: dict[tuple[str, int], BaseException],
        absent: Container[int] = (),
        nodes: Sequence[dict[str, float]] = (),
    ) -> None:
        self.model, self.errors, self.absent, self.machines = model, errors, absent, nodes
        self.calls: dict[str, int] = {}
        self.actors: list[Any] = []
        self.workers: list[Worker] = []
        self.starts: dict[int, Reference] = {}
        self.options: list[dict[str, Any]] = []
        self.killed: list[Any] = []
        self.waited: list[float | None] = []
        self.is_shut = False

    def is_initialized(self) -> bool:
        return False

    def init(self, **told: Any) -> None:
        pass

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": resources} for resources in self.machines]

    def remote(self, **options: Any) -> Any:
        """In place of the class of an actor."""
        self.options.append(options)
        return lambda _: SimpleNamespace(remote=lambda *_: self.handle())

    def handle(self) -> Any:
        """An actor's handle."""
        worker, number = Worker.__new__(Worker), len(self.actors)
        worker.model, worker.parts = self.model, {}
        calls = {"prepare": worker.prepare, "measure": worker.measure, "forget": worker.forget}
        handle = SimpleNamespace(**{name: self._remote(name, call) for name, call in calls.items()})
        ready = self._remote("__ray_ready__", lambda: None)
        if number in self.absent:
            self.starts[number] = Reference(None)
            ready = SimpleNamespace(remote=lambda: self.starts[number])
        handle.__ray_ready__ = ready
        self.actors.append(handle)
        self.workers.append(worker)
        return handle

    def arrive(self, number: int) -> None:
        """Let an actor that was absent be ready."""
        self.starts[number].result = SimpleNamespace(error=None, value=None)

    def _remote(self, name: str, method: Any) -> Any:
        def call(*given: Any) -> Any:
            number = self.calls[name] = self.calls.get(name, -1) + 1
            error = self.errors.get((name, number))
            try:
                return SimpleNamespace(error=error, value=None if error else method(*given))
            except KeyError as missing:  # as where the actor was never prepared
                return SimpleNamespace(error=self.exceptions.RayTaskError("measure", "", missing), value=None)

        return SimpleNamespace(remote=lambda *given: Reference(call(*given)))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        done = [reference for reference in references if reference.result is not None][:num_returns]
        if not done:
            assert timeout is not None, "nothing ends this wait"
            self.waited.append(timeout)
        return done, [reference for reference in references if reference not in done]

    def get(self, references: list[Any]) -> list[Any]:
        for reference in references:
            if reference.result.error is not None:
                raise reference.result.error
        return [reference.result.value for reference in references]

    def kill(self, handle: Any) -> None:
        self.killed.append(handle)

    def shutdown(self) -> None:
        self.is_shut = True


@dataclass(eq=False)
class Reference:
    """Of a result; None where there is none yet."""

    result: Any


def faked(
    model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    errors: dict[tuple[str, int], BaseException],
    absent: Container[int] = (),
    **told: Any,
) -> Cluster:
    fake = FakeRay(model, errors, absent)
    return Cluster(fake, model, [Actor(fake.handle()), Actor(fake.handle())], 0, **told)


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.OutOfMemoryError("the node is low on memory"),
        ray.exceptions.NodeDiedError("the node is gone"),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.ObjectLostError("0" * 56, None, ""),
        ray.exceptions.ActorDiedError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("call", [("measure", 1), ("prepare", 1)])
def test_memory_kills_and_dead_nodes_are_dead_actors(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, error: Exception, call: tuple[str, int]
) -> None:
    cluster = faked(model, monkeypatch, {call: error})
    before, masks = list(cluster.actors), [Mask.removing(model, [unit]) for unit in range(5)]
    measured = {mask.key: figures for mask, figures in cluster.measure(evaluator(model), masks, False)}
    here = evaluator(model)
    for mask in masks:
        np.testing.assert_allclose(measured[mask.key]["y"], here.y(mask), atol=1e-5)
    assert cluster.replaced == 1
    assert [actor.handle for actor in before if actor not in cluster.actors] == cluster.ray.killed


def test_a_mask_whose_actor_died_comes_next(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = faked(model, monkeypatch, {("measure", 0): ray.exceptions.ActorDiedError()})
    masks = [Mask.removing(model, [unit]) for unit in range(6)]
    measured = [mask.key for mask, _ in cluster.measure(evaluator(model), masks, False)]
    assert masks[0].key in measured[:2], "others wait for it, in their order"


def test_the_others_go_on_where_the_replacement_never_comes(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = {("measure", 1): ray.exceptions.NodeDiedError("the node is gone")}
    cluster = faked(model, monkeypatch, died, absent=range(2, 99))
    masks = [Mask.removing(model, [unit]) for unit in range(5)]
    assert len(list(cluster.measure(evaluator(model), masks, False))) == 5
    assert cluster.replaced == 1
    assert len(list(cluster.measure(evaluator(model), masks, False))) == 5, "nor is it given masks the next time"
    assert not cluster.ray.waited


def test_the_wait_for_a_replacement_ends_where_no_other_is_left(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ray.exceptions.NodeDiedError("the node is gone")
    cluster = faked(model, monkeypatch, {("measure", 1): gone, ("measure", 2): gone}, absent=range(2, 99))
    measured, masks = [], [Mask.removing(model, [unit]) for unit in range(5)]
    for _ in range(2):
        with pytest.raises(ClusterError, match="All Ray actors have died, and no other was ready after 30 minutes"):
            measured.extend(cluster.measure(evaluator(model), masks, False))
    assert len(measured) == 1
    assert cluster.ray.waited == [1800, 1800]


def test_a_replacement_that_dies_before_it_is_ready_is_replaced(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ray.exceptions.ActorDiedError()
    cluster = faked(model, monkeypatch, {("measure", 0): gone, ("measure", 1): gone, ("__ray_ready__", 0): gone})
    masks = [Mask.removing(model, [unit]) for unit in range(5)]
    measured = [mask.key for mask, _ in cluster.measure(evaluator(model), masks, False)]
    assert sorted(measured) == sorted(mask.key for mask in masks)
    assert cluster.replaced == 3


@pytest.mark.parametrize(("address", "cores"), [("local:3", 3), ("auto", None)])
def test_actors_on_this_machine_never_join_another_cluster(
    address: str, cores: int | None, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def init(**told: Any) -> None:
        asked.append(told)
        raise ConnectionError("no room in /dev/shm")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ClusterError, match=r"^Ray does not start on this machine\. \(no room in /dev/shm\)$"):
        Cluster.start(address, model)
    assert [(told["address"], told["num_cpus"]) for told in asked] == [("local", cores)]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("measure", ray.exceptions.RaySystemError("the head is gone"), r"^The Ray cluster failed; .*the head is gone"),
        ("measure", ray.exceptions.RayTaskError("measure", "", ValueError("odd")), "^A Ray actor failed: odd"),
        ("prepare", ray.exceptions.RayTaskError("prepare", "", ValueError("no room")), "^A Ray actor failed: no room"),
    ],
)
def test_what_else_fails_is_said(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception, said: str
) -> None:
    cluster = faked(model, monkeypatch, {(call, 0): error})
    with pytest.raises(ClusterError, match=said):
        list(cluster.measure(evaluator(model), [Mask.removing(model, [1])], False))


@pytest.mark.parametrize("own", [True, False])
def test_a_session_that_was_open_before_stays_open(
    own: bool, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = faked(model, monkeypatch, {}, own=own)
    with cluster:
        pass
    assert len(cluster.ray.killed) == 2
    assert cluster.ray.is_shut is own
    monkeypatch.setattr("ray.is_initialized", lambda: not own)
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.nodes", lambda: [])
    shut: list[bool] = []
    monkeypatch.setattr("ray.shutdown", lambda: shut.append(True))
    with pytest.raises(ClusterError):
        Cluster.start("auto", model)
    assert bool(shut) is own


def test_masks_without_finite_answers_are_measured_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, bad = [Mask.removing(model, [unit]) for unit in range(4)], Mask.removing(model, [2])
    tried: list[bytes] = []
    measure = Evaluator._measure

    def fragile(self: Evaluator, mask: Any, *rest: Any) -> None:
        tried.append(mask.key)
        if mask.key == bad.key:
            raise NumericalError("not finite")
        measure(self, mask, *rest)

    monkeypatch.setattr(Evaluator, "_measure", fragile)
    there, done = evaluator(model, cluster=faked(model, monkeypatch, {})), []
    found = list(there.evaluate_each(masks, done.append))
    assert [one is None for one in found] == [False, False, True, False]
    assert tried.count(bad.key) == 1
    assert sum(done) == len(masks) * there.work()
    assert list(there.evaluate_each([bad])) == [None]
    assert tried.count(bad.key) == 1


def test_figures_are_kept_as_they_come_and_told_in_order(model: LanguageModel, tmp_path: Path) -> None:
    masks = [Mask.removing(model, [unit]) for unit in range(4)]
    here, held = evaluator(model), list[bytes]()

    class Unordered:
        """Measures the second mask before the first, and notes which masks are in the store when it goes on."""

        def measure(self, asked: Evaluator, given: Any, utility: bool) -> Iterator[tuple[Mask, Any]]:
            for number in (1, 0, 2, 3):
                here.evaluate(given[number], utility=utility)
                yield given[number], here.figures(given[number])
                held.extend(mask.key for mask in given if store.get(asked.part, mask.key) and mask.key not in held)

    with Store(tmp_path / "measured.sqlite", model.fingerprint) as store:
        found = evaluator(model, cluster=Unordered(), store=store).evaluate_each(masks)
        told = []
        for mask in masks:
            measured = next(found)
            assert measured is not None
            np.testing.assert_array_equal(measured.table.y, here.evaluate(mask).table.y)
            told.append(len(held))
        assert told == [1, 1, 2, 3], "a mask is told of before the next is asked for"
        assert held == [masks[number].key for number in (1, 0, 2)], "a mask that comes early is kept at once"


def test_a_mask_that_is_measured_here_holds_up_nothing(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    there = evaluator(model, cluster=faked(model, monkeypatch, {}))
    masks, done = [Mask.none(model), *(Mask.removing(model, [unit]) for unit in range(3))], list[int]()
    found = there.evaluate_each(masks, done.append)
    assert next(found) is not None
    assert sum(done) == 4 * there.work(), "the actors were done before"
    assert len(list(found)) == 3


def test_parts_that_are_left_behind_are_forgotten(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = faked(model, monkeypatch, {})
    whole, here, masks = evaluator(model), evaluator(model), [Mask.removing(model, [unit]) for unit in range(4)]
    parts = [replace(whole, batch_size=size) for size in range(1, KEPT_PARTS + 3)]
    for part in [*parts, parts[0]]:
        for mask, figures in cluster.measure(part, masks, False):
            np.testing.assert_allclose(figures["y"], here.y(mask), atol=1e-5)
        assert len(cluster._parts) <= KEPT_PARTS
        for actor, worker in zip(cluster.actors, cluster.ray.workers, strict=True):
            assert set(worker.parts) == set(actor.prepared) <= set(cluster._parts)
