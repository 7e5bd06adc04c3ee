"""Evaluations spread over Ray actors: one model each, masks travel as bits.

Every actor computes with the same number of threads whatever the number of actors, so that the result does not depend
on how many there are. An actor that dies is replaced, and what it was measuring is measured again; until the new one is
ready, which it never is where its machine is gone, the others go on.
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
from secateur.measures.prompts import PromptSet
from secateur.measures.utility import NeutralText
from secateur.models import LanguageModel, load
from secateur.units import ActivationMeans, Mask, UnitSpace

Figures = dict[str, np.ndarray]
LOCAL, AUTO = "local:", "auto"
QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "ignore_reinit_error": True}
THREADS = 1
REPLACEMENTS = 3
START_SECONDS = 1800
ANSWER_SECONDS = 10.0
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
    own: whether this process opened the Ray session for them; one that was open before stays open.
    """

    ray: Any
    model: LanguageModel
    actors: list[Actor]
    gpus: int
    own: bool = True
    replaced: int = 0
    _parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, address: str, model: LanguageModel) -> Cluster:
        """Start actors on a cluster.

        Parameters
        ----------
        address: "auto" for this machine, "local:N" for N actors on the CPU of this machine, or the address of a running
            Ray cluster. Actors compute on what the model computes on here: each on as many GPUs, or each on a core.
            The first two start Ray anew, whatever runs on this machine already; only a session that this process has
            open is used for them, too.
        model: was loaded by name, so that actors can load it, too.

        Raises
        ------
        ClusterError: Ray is not installed, does not answer, or an actor cannot load the model.
        """
        if model.loaded_with is None:
            raise ClusterError("Actors load the model themselves; give one that was loaded by secateur.load.")
        asked = _local_count(address)
        ray = _ray()
        is_here = asked is not None or address == AUTO
        # Without an address Ray would join a cluster that it finds in RAY_ADDRESS or on this machine.
        where: dict[str, Any] = {"address": "local", "num_cpus": asked} if is_here else {"address": address}
        own = not ray.is_initialized()
        try:
            ray.init(**where, **QUIET)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            if is_here:
                raise ClusterError(f"Ray does not start on this machine. ({reason})") from error
            raise ClusterError(f"The Ray cluster '{address}' does not answer; check the address. ({reason})") from error
        count, gpus = (asked, 0) if asked is not None else division(ray.nodes(), gpus_of(model))
        cluster = cls(ray, model, [], gpus, own)
        if count < 1:
            cluster.close()
            raise ClusterError(f"The model takes {gpus} GPUs, more than the cluster '{address}' has; use a larger one.")
        try:
            cluster.actors = [cluster._begin() for _ in range(count)]
            ray.get([actor.handle.__ray_ready__.remote() for actor in cluster.actors], timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            cluster.close()
            raise ClusterError(
                f"{count} actors were not ready on '{address}' after {START_SECONDS // 60} minutes; other work may "
                "hold what they need."
            ) from error
        except Exception as error:
            cluster.close()
            reason = " ".join(str(error.__cause__ or error).split())[-200:]
            raise ClusterError(f"An actor on '{address}' cannot load the model. ({reason})") from error
        return cluster

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
        while waiting or running:
            while waiting and idle:
                actor, mask = idle.popleft(), waiting.popleft()
                name = self._prepare(actor, evaluator, mask.means)
                task = actor.handle.measure.remote(name, np.packbits(mask.keep).tobytes(), utility)
                # An actor does one thing after the other: what it was given came before what it measures.
                running[task] = (actor, mask, [actor.prepared[name], task])
            done = self._next([*running, *starting], None if running else START_SECONDS)
            actor, tried, awaited = running.pop(done) if done in running else (starting.pop(done), None, [done])
            try:
                *_, outcome = self.ray.get(awaited)
            except died:
                fresh = self._replace(actor)
                starting[fresh.ready] = fresh
                waiting.extend(() if tried is None else (tried,))
                continue
            actor.ready = None
            idle.append(actor)
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
            self.ray.kill(actor.handle)
        if self.own:
            self.ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> Actor:
        options = {"num_gpus": self.gpus} if self.gpus else {"num_cpus": 1}
        worker = self.ray.remote(**options)(Worker)
        source = dict(self.model.loaded_with or {})
        if not self.gpus:
            # Ray does not hide the GPUs from an actor that asked for none.
            source |= {"device": "cpu", "device_map": None}
        return Actor(worker.remote(source, self.model.fingerprint))

    def _replace(self, dead: Actor) -> Actor:
        self.replaced += 1
        if self.replaced > REPLACEMENTS * len(self.actors):
            raise ClusterError(
                f"Ray actors died {self.replaced} times; look at Ray's logs (a common reason is too little memory)."
            )
        self.ray.kill(dead.handle)  # a lost result does not say that its actor is gone, too
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
        if name not in actor.prepared:
            actor.prepared[name] = actor.handle.prepare.remote(name, self._parts[name])
        return name


def gpus_of(model: LanguageModel) -> int:
    """GPUs that a model is spread over; 0 on a CPU."""
    return len({parameter.device for parameter in model.model.parameters() if parameter.device.type == "cuda"})


def division(nodes: list[dict[str, Any]], gpus: int) -> tuple[int, int]:
    """How many actors a cluster holds, and the GPUs of each.

    Parameters
    ----------
    nodes: what Ray says of its machines; an actor's GPUs are all in one of them.
    gpus: that the model takes here; 0 for an actor on every core.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
    return sum(int(there.get(kind, 0)) // each for there in resources), gpus


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
