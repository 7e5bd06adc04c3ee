"""Evaluations spread over Ray actors: one model each, masks travel as bits.

Every actor computes with the same number of threads whatever the number of actors, so that the result does not depend
on how many there are. Work begins with the first actor that is ready; the others are given masks as they start, which
on a busy cluster may be late or never. An actor that dies is replaced, and what it was measuring is measured again;
until the new one is ready, which it never is where its machine is gone, the others go on.
"""

from __future__ import annotations

import hashlib
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from secateur.errors import ClusterError, NumericalError
from secateur.evaluation.evaluator import Evaluator
from secateur.evaluation.memory import actor_bytes
from secateur.measures.prompts import PromptSet
from secateur.measures.utility import NeutralText
from secateur.models import LanguageModel, load
from secateur.units import ActivationMeans, Mask, UnitSpace

Figures = dict[str, np.ndarray]
LOCAL, AUTO = "local:", "auto"
QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "ignore_reinit_error": True}
OBJECT_STORE = 1 << 28  # bytes, of a session on this machine: parts and masks are small, and memory is for models
THREADS = 1
REPLACEMENTS = 3
START_SECONDS = 1800
ANSWER_SECONDS = 10.0
KEPT_PARTS = 4  # a search takes turns between two at most, and leaves them behind
# Ray's errors after which the same work may well succeed on a fresh actor: the old one, its node or its result is gone.
DIED = ("RayActorError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError")


@dataclass(frozen=True, eq=False)
class Part:
    """What an actor measures on; the fields are those of an evaluator, and the means of mean ablation."""

    prompts: PromptSet
    text: NeutralText | None
    batch_size: int
    divergence: bool
    means: ActivationMeans | None


class Worker:
    """What runs in an actor: a model, and an evaluator for every part that it has been given."""

    def __init__(self, source: dict[str, Any], fingerprint: str) -> None:
        torch.set_num_threads(THREADS)
        self.model = load(**source)
        if self.model.fingerprint != fingerprint:
            raise ClusterError(f"An actor loaded another model than this machine under the name '{self.model.source}'.")
        self.parts: dict[str, tuple[Evaluator, ActivationMeans | None]] = {}

    def prepare(self, name: str, part: Part) -> None:
        """Be ready to measure on a part."""
        evaluator = Evaluator(self.model, part.prompts, part.text, part.batch_size, part.divergence)
        self.parts[name] = (evaluator, part.means)

    def forget(self, name: str) -> None:
        """Drop a part, with its packed prompts and all that was measured on it."""
        self.parts.pop(name, None)

    def measure(self, name: str, bits: bytes, utility: bool) -> tuple[Figures, int]:
        """The figures of a mask, which may say that there are none that are finite, and the tokens that were forwarded.

        Parameters
        ----------
        bits: the mask's ``keep``, packed.
        """
        evaluator, means = self.parts[name]
        space = UnitSpace.of(self.model)
        keep = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=len(space)).astype(bool)
        mask, before = Mask(space, keep, self.model.fingerprint, means), self.model.usage.copy()
        with suppress(NumericalError):
            evaluator.evaluate(mask, utility=utility)
        return evaluator.figures(mask), self.model.usage.since(before).forward


@dataclass(eq=False)
class Actor:
    """An actor.

    Attributes
    ----------
    handle: of Ray. prepared: the parts that it has been given, each with what Ray says of that.
    ready: what Ray will say once it runs; None where it does.
    """

    handle: Any
    prepared: dict[str, Any] = field(default_factory=dict)
    ready: Any = None


@dataclass(eq=False)
class Cluster:
    """Ray actors that measure masks of one model.

    Attributes
    ----------
    ray: the module. model: the model here.
    actors: those that run or are about to.
    gpus: of each actor, as many as the model takes here; 0 where they compute on the CPU.
    memory: bytes that Ray sets aside for each actor on a CPU; 0 where as many as were asked for are started.
    own: whether this process opened the Ray session for them; one that was open before stays open.
    """

    ray: Any
    model: LanguageModel
    actors: list[Actor]
    gpus: int
    memory: int = 0
    own: bool = True
    replaced: int = 0
    _parts: dict[str, Any] = field(default_factory=dict)  # by name, the last used last

    @classmethod
    def start(cls, address: str, model: LanguageModel) -> Cluster:
        """Start actors on a cluster, and wait for the first.

        Parameters
        ----------
        address: "auto" for this machine, "local:N" for N actors on the CPU of this machine, or the address of a running
            Ray cluster. Actors compute on what the model computes on here: each on as many GPUs, or each on a core and
            in the memory that it takes. The first two start Ray anew, whatever runs on this machine already; only a
            session that this process has open is used for them, too.
        model: was loaded by name, so that actors can load it, too.

        Raises
        ------
        ClusterError: Ray is not installed, does not answer, has no room for an actor, or an actor cannot load the
            model.
        """
        if model.loaded_with is None:
            raise ClusterError("Actors load the model themselves; give one that was loaded by secateur.load.")
        asked = _local_count(address)
        ray, gpus = _ray(), 0 if asked is not None else gpus_of(model)
        cluster = cls(ray, model, [], gpus, 0 if asked or gpus else actor_bytes(model), not ray.is_initialized())
        try:
            cluster._connect(address, asked)
            cluster._begin_all(address, asked or division(ray.nodes(), gpus, cluster.memory))
        except BaseException:  # Ctrl-C, too, leaves no session open
            cluster.close()
            raise
        return cluster

    def _connect(self, address: str, cores: int | None) -> None:
        is_here = cores is not None or address == AUTO
        # Without an address Ray would join a cluster that it finds in RAY_ADDRESS or on this machine.
        here = {"address": "local", "num_cpus": cores, "object_store_memory": OBJECT_STORE}
        try:
            self.ray.init(**(here if is_here else {"address": address}), **QUIET)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            if is_here:
                raise ClusterError(f"Ray does not start on this machine. ({reason})") from error
            raise ClusterError(
                f"The Ray cluster '{address}' does not answer; check the address, and set RAY_AUTH_MODE=token if it "
                f"asks for a token. ({reason})"
            ) from error

    def _begin_all(self, address: str, count: int) -> None:
        """Begin so many actors, and wait for the first of them."""
        if count < 1:
            raise ClusterError(self._no_room(address))
        self.actors = [self._begin() for _ in range(count)]
        for actor in self.actors:
            actor.ready = actor.handle.__ray_ready__.remote()
        done, _ = self.ray.wait([actor.ready for actor in self.actors], num_returns=1, timeout=START_SECONDS)
        if not done:
            raise ClusterError(
                f"No actor was ready on '{address}' after {START_SECONDS // 60} minutes; other work may hold what it "
                "needs."
            )
        try:
            self.ray.get(done)
        except Exception as error:
            raise ClusterError(f"An actor on '{address}' cannot load the model. ({_reason(error)})") from error
        next(actor for actor in self.actors if actor.ready is done[0]).ready = None

    def _no_room(self, address: str) -> str:
        if self.gpus:
            return f"The model takes {self.gpus} GPUs, more than the cluster '{address}' has; use a larger one."
        return (
            f"An actor takes a core and {self.memory / 1e9:.1f} GB of memory with this model, and no machine of "
            f"'{address}' has both free; use a larger one, or leave out --ray."
        )

    def measure(self, evaluator: Evaluator, masks: Sequence[Mask], utility: bool) -> Iterator[tuple[Mask, Figures]]:
        """Measure masks on the part of an evaluator, in the order in which they are done; tokens count as here.

        Raises
        ------
        ClusterError: an actor or the cluster fails, actors die again and again, or none is left and no other is ready
            within ``START_SECONDS``.
        """
        try:
            yield from self._measure(evaluator, masks, utility)
        except self.ray.exceptions.RayTaskError as error:
            raise ClusterError(f"A Ray actor failed: {error.cause}.") from error
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(f"The Ray cluster failed; look at Ray's logs. ({reason})") from error

    def _measure(self, evaluator: Evaluator, masks: Sequence[Mask], utility: bool) -> Iterator[tuple[Mask, Figures]]:
        died = tuple(getattr(self.ray.exceptions, name) for name in DIED)
        waiting = deque(masks)
        idle = deque(actor for actor in self.actors if actor.ready is None)
        starting = {actor.ready: actor for actor in self.actors if actor.ready is not None}
        running: dict[Any, tuple[Actor, Mask, list[Any]]] = {}

        def hand_out() -> None:
            while waiting and idle:
                actor, mask = idle.popleft(), waiting.popleft()
                name = self._prepare(actor, evaluator, mask.means)
                task = actor.handle.measure.remote(name, np.packbits(mask.keep).tobytes(), utility)
                # An actor does one thing after the other: what it was given came before what it measures.
                running[task] = (actor, mask, [actor.prepared[name], task])

        hand_out()
        while waiting or running:
            done = self._next([*starting, *running], None if running else START_SECONDS)
            actor, tried, awaited = running.pop(done) if done in running else (starting.pop(done), None, [done])
            try:
                *_, outcome = self.ray.get(awaited)
            except died as error:
                fresh = self._replace(actor, error)
                starting[fresh.ready] = fresh
                waiting.extendleft(() if tried is None else (tried,))  # others may wait for it, in their order
                hand_out()
                continue
            actor.ready = None
            idle.append(actor)
            hand_out()  # before whoever asked makes something of the figures
            if tried is not None:
                figures, tokens = outcome
                self.model.usage.forward += tokens
                yield tried, figures

    def _next(self, references: list[Any], patience: float | None) -> Any:
        """The first of what is awaited that is there; None waits for ever, as for an actor that is at work."""
        done, _ = self.ray.wait(references, num_returns=1, timeout=patience)
        if not done:
            raise ClusterError(
                f"All Ray actors have died, and no other was ready after {START_SECONDS // 60} minutes; has the "
                "cluster lost its machines?"
            )
        return done[0]

    def close(self) -> None:
        """Stop the actors, and Ray if it was started for them."""
        for actor in self.actors:
            self._kill(actor)
        if self.own:
            self.ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> Actor:
        options = {"num_gpus": self.gpus} if self.gpus else {"num_cpus": 1, "memory": self.memory}
        worker = self.ray.remote(**options)(Worker)
        source = dict(self.model.loaded_with or {})
        if not self.gpus:
            # Ray does not hide the GPUs from an actor that asked for none.
            source |= {"device": "cpu", "device_map": None}
        return Actor(worker.remote(source, self.model.fingerprint))

    def _kill(self, actor: Actor) -> None:
        with suppress(Exception):  # where its session is gone, so is the actor; an error on the way out hides the first
            self.ray.kill(actor.handle)

    def _replace(self, dead: Actor, why: Exception) -> Actor:
        self.replaced += 1
        if self.replaced > REPLACEMENTS * len(self.actors):
            raise ClusterError(
                f"Ray actors died {self.replaced} times; look at Ray's logs (a common reason is too little memory). "
                f"The last one: {_reason(why)}"
            )
        self._kill(dead)  # a lost result does not say that its actor is gone, too
        fresh = self._begin()
        fresh.ready = fresh.handle.__ray_ready__.remote()
        self.actors[self.actors.index(dead)] = fresh
        return fresh

    def _prepare(self, actor: Actor, evaluator: Evaluator, means: ActivationMeans | None) -> str:
        """Give an actor the part of an evaluator if it has not got it yet; the part's name."""
        name = evaluator.part + _digest(means)
        if name not in self._parts:
            part = Part(evaluator.prompts, evaluator.text, evaluator.batch_size, evaluator.divergence, means)
            self._parts[name] = self.ray.put(part)
        self._parts[name] = self._parts.pop(name)
        if name not in actor.prepared:
            actor.prepared[name] = actor.handle.prepare.remote(name, self._parts[name])
        if len(self._parts) > KEPT_PARTS:
            self._forget(next(iter(self._parts)))
        return name

    def _forget(self, name: str) -> None:
        """Drop a part here and in the actors, which first finish what they were told to measure on it."""
        del self._parts[name]
        for actor in self.actors:
            if actor.prepared.pop(name, None) is not None:
                actor.handle.forget.remote(name)


def gpus_of(model: LanguageModel) -> int:
    """GPUs that a model is spread over; 0 on a CPU."""
    return len({parameter.device for parameter in model.model.parameters() if parameter.device.type == "cuda"})


def division(nodes: list[dict[str, Any]], gpus: int, memory: int) -> int:
    """How many actors a cluster holds when nothing else runs on it.

    Parameters
    ----------
    nodes: what Ray says of its machines; all that an actor takes is in one of them.
    gpus: of each actor; 0 for an actor on every core. memory: bytes of each on a core.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if gpus:
        return sum(int(there.get("GPU", 0)) // gpus for there in resources)
    return sum(min(int(there.get("CPU", 0)), int(there.get("memory", 0)) // memory) for there in resources)


def check_address(address: str | None) -> None:
    """Refuse an address that cannot be meant or that nobody answers at, and a machine without Ray.

    Raises
    ------
    ClusterError: says what an address looks like, that nobody answers, or how to install Ray.
    """
    if address is not None:
        is_local = _local_count(address) is not None
        _ray()
        if not is_local and address != AUTO:
            _knock(address)


def _knock(address: str) -> None:
    """Refuse a machine and port that nobody answers at; Ray itself would go on trying for many minutes."""
    host, _, port = address.rpartition("://")[2].partition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"The Ray cluster '{address}' does not answer; check the address. ({error})") from error


def _local_count(address: str) -> int | None:
    """N of "local:N"; None for anything else."""
    if not address.startswith(LOCAL):
        return None
    count = address.removeprefix(LOCAL)
    if not count.isdigit() or int(count) < 1:
        raise ClusterError(f"'{address}' names no number of actors; write local:2, auto, or a cluster's address.")
    return int(count)


def _reason(error: Exception) -> str:
    """What an error of Ray says in the end, where an actor's own error stands."""
    return "".join(str(error.__cause__ or error).strip().splitlines()[-1:])[:300].strip()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Ray is not installed; run: pip install 'secateur[ray]'.") from error
    return ray


def _digest(means: ActivationMeans | None) -> str:
    digest = hashlib.sha256()
    for values in () if means is None else (*means.heads, *means.neurons):
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]
