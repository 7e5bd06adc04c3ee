"""The Python API: the same names as the commands, with the same results and files."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from secateur.attenuation import Attenuation
from secateur.evaluation.cluster import Cluster, check_address
from secateur.evaluation.store import Store, is_usable
from secateur.files import LEFT_BEHIND, MEASURED, STATE, OutputDirectory, to_json, write_text, writing
from secateur.measures.answers import DEFAULT_BATCH_SIZE
from secateur.measures.prompts import ChatMode
from secateur.measures.sampling import TEMPERATURE
from secateur.measures.splits import NOTHING_SEEN
from secateur.measures.utility import read_passages
from secateur.models import LanguageModel, load
from secateur.progress import Progress
from secateur.reports.card import render_card
from secateur.reports.html import (
    render_audit,
    render_compare,
    render_generalise,
    render_repair,
    render_slim,
    render_verify,
)
from secateur.studies import audit as audits
from secateur.studies import compare as comparisons
from secateur.studies import generalise as generalisations
from secateur.studies import localise as localisations
from secateur.studies import repair as repairs
from secateur.studies import slim as slims
from secateur.studies import verification as verifications
from secateur.studies.audit import AuditResult
from secateur.studies.compare import CompareResult, CompareSettings, MethodResult
from secateur.studies.fitting import FitKey
from secateur.studies.generalise import GeneraliseSettings
from secateur.studies.leave_one_out import OneByOne
from secateur.studies.localise import LocaliseResult, LocaliseSettings
from secateur.studies.parts import StudySettings
from secateur.studies.plan import BESIDE_WEIGHTS, Plan, load_plan
from secateur.studies.reach import Fit, GeneraliseResult
from secateur.studies.record import Cost, Costs, now
from secateur.studies.repair import RepairResult, RepairSettings
from secateur.studies.slim import SlimResult, SlimSettings
from secateur.studies.verification import Verification, VerificationSettings
from secateur.suites import Suite, load_suite, suite_hash
from secateur.surgery import FORMATS, check_ablation_fits, check_export
from secateur.surgery.hub import check_hub, push
from secateur.surgery.slimming import target_size
from secateur.weights import AnyMask

SPARE_BYTES = 50_000_000
# Settings that change what a run costs and, but for the last digits of figures, not what it finds: another value may
# carry on a run.
EFFORT = ("masks_at_once", "kept_mib", "verification")
# What a run may be asked for in addition: what is there and was made with the same settings of its method stays.
METHODS_ASKED = ("methods", "options")
CARRYING_ON = "Carrying on an interrupted run; what it has measured is not measured again"
UNREADABLE = "in a form that this version of Secateur cannot carry on: name another directory, or add --overwrite."
Left = TypeVar("Left")
STATE_FORMAT = 2  # of what an interrupted run leaves; another number for other fields or meanings
COST_EVERY = 10.0  # seconds between two notes of what a run has cost: a kill loses no more of it


def audit(
    model: LanguageModel,
    suite: str | Path | Suite | None = None,
    *,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    chat: ChatMode = "auto",
    sampled_runs: int = 0,
    temperature: float = TEMPERATURE,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AuditResult:
    """Measure the disparity of every scenario of a suite on a model.

    Parameters
    ----------
    model: from :func:`secateur.load`.
    suite: the name of a built-in suite, the path of a YAML file, or a suite; None for the default.
    seed: of permutations and bootstrap.
    batch_size: prompts in one forward pass.
    chat: "auto", "chat" or "plain": whether prompts go through the model's chat template.
    sampled_runs: also sample so many answers to every quantity prompt, at ``temperature``, and say how far they
        agree with the measured quantities.
    output: a directory for ``audit.json`` and ``report.html``; overwrite: replace it if it exists.

    Raises
    ------
    SuiteError: the suite is unknown or breaks the schema.
    NumericalError: the model's answers are not finite.
    OutputError: the directory exists or cannot be written.
    """
    suite = load_suite(suite)
    directory = None if output is None else OutputDirectory.open(output, overwrite, SPARE_BYTES)
    with writing(directory):
        result = audits.audit(
            model,
            suite,
            seed=seed,
            batch_size=batch_size,
            chat=chat,
            sampled_runs=sampled_runs,
            temperature=temperature,
            progress=progress,
        )
        if directory is not None:
            directory.write_json("audit.json", result.as_dict())
            write_text(directory.staging / "report.html", render_audit(result))
    return result


def repair(
    model: LanguageModel,
    suite: str | Path | Suite | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    ray: str | None = None,
    **settings: Any,
) -> RepairResult:
    """Find the units that carry a suite's bias, remove the few that matter, and prove it held out.

    Parameters
    ----------
    model: from :func:`secateur.load`; it is left as it was.
    suite: the name of a built-in suite, the path of a YAML file, or a suite; None for the default.
    output: a directory for ``result.json``, ``run.json``, ``plan.json`` with its mask,
        ``report.html`` and ``checkpoint/``, or ``adapter/`` for soft gates; overwrite: replace it if it exists.
    ray: spread evaluations over Ray actors: "auto", "local:N" or a cluster's address.
    settings: fields of :class:`secateur.RepairSettings`, such as ``max_perplexity_increase=0.02``.

    Returns
    -------
    RepairResult: ``plan`` is None where no candidate lowered the bias within the limit; then no
        plan and no checkpoint are written.

    Raises
    ------
    SuiteError, SettingError, DataError: something asked for is unknown or too small.
    MaskError: mean ablation is asked for, and the family's checkpoints cannot carry it.
    NumericalError: the model's answers are not finite.
    OutputError: the directory exists or cannot be written.
    ClusterError: Ray is not installed, or the cluster does not answer.
    """
    suite = load_suite(suite)
    chosen = RepairSettings(**settings)
    chosen.check()
    progress = progress or Progress()
    check_address(ray)
    if output is None:
        with _actors(ray, model, progress) as cluster:
            return repairs.repair(model, suite, chosen, progress=progress, cluster=cluster)
    check_ablation_fits(model, chosen.ablation)
    repairs.check_method(model, suite, chosen)
    key = _run_key("repair", model, [suite], chosen)
    directory, carries_on = _opened(output, overwrite, SPARE_BYTES + model.weight_bytes, key, read=bool)
    with writing(directory, carry_on=True), _State.kept(directory, key, model, [suite], {}) as state:
        if carries_on:
            progress.say(CARRYING_ON)
        with _measuring(directory, ray, model, progress) as (store, cluster):
            result = repairs.repair(
                model,
                suite,
                chosen,
                progress=progress,
                save_partial=state.save,
                costs=state.costs,
                store=store,
                cluster=cluster,
            )
        result.run["started"] = state.started
        _write_repair(result, model, directory)
    (directory.target / STATE).unlink(missing_ok=True)
    return result


def verify(
    model: LanguageModel,
    plan: Plan | str | Path,
    suite: str | Path | Suite | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Verification:
    """Let a model write before and after a plan, on markers and wordings that the plan has not seen.

    Parameters
    ----------
    plan: a plan, or the path of a run's directory or its ``plan.json``.
    suite: another than the plan's, or None for it.
    output: a directory for ``verify.json`` and ``report.html``; overwrite: replace it if it exists.
    settings: fields of :class:`secateur.VerificationSettings`, such as ``runs=20``; seed and chat mode are the
        plan's where they are left out.

    Raises
    ------
    MaskError: the plan cannot be read, or was made for another model.
    SuiteError, SettingError, DataError: something asked for is unknown, unusable or too small.
    NumericalError: the model's output is not finite.
    OutputError: the directory exists or cannot be written.
    """
    loaded = plan if isinstance(plan, Plan) else load_plan(plan)
    asked, chosen = verification_of(loaded, suite, **settings)
    chosen.check()
    loaded.mask.check(model)
    directory = None if output is None else OutputDirectory.open(output, overwrite, SPARE_BYTES)
    with writing(directory):
        result = verifications.verify(
            model,
            asked,
            loaded.mask,
            chosen,
            progress=progress,
            seen=loaded.seen(asked),
            record=loaded.record,
        )
        if directory is not None:
            directory.write_json("verify.json", {**result.as_dict(), "run": result.run})
            write_text(directory.staging / "report.html", render_verify(result))
    return result


def verification_of(
    plan: Plan, suite: str | Path | Suite | None, **settings: Any
) -> tuple[Suite, VerificationSettings]:
    """Suite and settings of a verification that keeps to what a plan has not seen.

    Raises
    ------
    SuiteError, SettingError: the suite is unknown, is not as it was, or too small; or the seed is not the plan's.
    """
    asked, told = plan.held_out(None if suite is None else load_suite(suite), settings)
    told.pop("utility_text")
    told.setdefault("chat", plan.record.get("settings", {}).get("chat", "auto"))
    return asked, VerificationSettings(**told)


def localise(
    model: LanguageModel,
    suite: str | Path | Suite | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    ray: str | None = None,
    **settings: Any,
) -> LocaliseResult:
    """Score every unit by a method, without removing any.

    Parameters
    ----------
    output: a directory for ``scores.safetensors`` (rank and values, each (units,)), ``top.csv`` (the
        first units) and ``localise.json``; overwrite: replace it if it exists. A run that was interrupted carries on
        with the masks that it had measured.
    ray: spread evaluations over Ray actors: "auto", "local:N" or a cluster's address.
    settings: ``method``, ``options`` and the fields that every study has, such as ``seed``.

    Raises
    ------
    SuiteError, SettingError, DataError: something asked for is unknown, too small or does not suit the model.
    OutputError: the directory exists or cannot be written.
    """
    suite = load_suite(suite)
    chosen = LocaliseSettings(**settings)
    chosen.check()
    progress = progress or Progress()
    check_address(ray)
    if output is None:
        with _actors(ray, model, progress) as cluster:
            return localisations.localise(model, suite, chosen, progress=progress, cluster=cluster)
    key = _run_key("localise", model, [suite], chosen)
    directory, carries_on = _opened(output, overwrite, SPARE_BYTES, key, read=bool)
    with writing(directory, carry_on=True), _State.kept(directory, key, model, [suite], {}) as state:
        if carries_on:
            progress.say(CARRYING_ON)
        with _measuring(directory, ray, model, progress) as (store, cluster):
            result = localisations.localise(
                model, suite, chosen, progress=progress, costs=state.costs, store=store, cluster=cluster
            )
        result.run["started"] = state.started
        directory.write_json("localise.json", result.as_dict())
        write_text(directory.staging / "top.csv", result.csv())
        result.save_scores(directory.staging / "scores.safetensors")
    (directory.target / STATE).unlink(missing_ok=True)
    return result


def compare(
    model: LanguageModel,
    suite: str | Path | Suite | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    ray: str | None = None,
    **settings: Any,
) -> CompareResult:
    """Compare methods on the same model, data and utility limit.

    Parameters
    ----------
    output: a directory for ``compare.json``, ``compare.csv`` and ``report.html``; overwrite: replace it if
        it exists. A run that was interrupted carries on with the methods that were not finished.
    ray: spread evaluations over Ray actors: "auto", "local:N" or a cluster's address.
    settings: fields of :class:`secateur.CompareSettings`, such as ``methods=("attribution", "random")``
        or ``quick=True``.

    Raises
    ------
    SuiteError, SettingError, DataError: something asked for is unknown, too small or does not suit the model.
    OutputError: the directory exists or cannot be written.
    """
    suite = load_suite(suite)
    chosen = CompareSettings(**settings)
    chosen.check()
    progress = progress or Progress()
    check_address(ray)
    if output is None:
        with _actors(ray, model, progress) as cluster:
            return comparisons.compare(model, suite, chosen, progress=progress, cluster=cluster)
    comparisons.check_methods(model, suite, chosen)
    key = _run_key("compare", model, [suite], chosen, METHODS_ASKED)
    directory, left = _opened(output, overwrite, SPARE_BYTES, key, read=_methods_of)
    done = left or {}

    def finished() -> dict[str, Any]:
        return {"methods": [asdict(one) for one in done.values()]}

    with writing(directory, keep=True), _State.kept(directory, key, model, [suite], finished()) as state:
        if left is not None:
            progress.say(f"Carrying on an interrupted run; finished: {', '.join(done) or 'no method yet'}")

        def remember(found: MethodResult) -> None:
            done[found.name] = found
            state.save(finished())

        with _measuring(directory, ray, model, progress) as (store, cluster):
            result = comparisons.compare(
                model,
                suite,
                chosen,
                progress=progress,
                remembered=dict(done),
                remember=remember,
                costs=state.costs,
                store=store,
                cluster=cluster,
            )
        result.run["started"] = state.started
        directory.write_json("compare.json", result.as_dict())
        write_text(directory.staging / "compare.csv", result.csv())
        write_text(directory.staging / "report.html", render_compare(result))
    (directory.target / STATE).unlink(missing_ok=True)
    return result


def generalise(
    model: LanguageModel,
    suites: Sequence[str | Path | Suite],
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    ray: str | None = None,
    **settings: Any,
) -> GeneraliseResult:
    """Fit methods on every suite, and judge every mask on the held-out part of every other suite.

    Parameters
    ----------
    suites: names of built-in suites, paths of YAML files, or suites; at least two.
    output: a directory for ``generalise.json``, ``generalise.csv``, ``overlap.csv``, ``within.csv`` (of the modes that
        take one scenario at a time), ``report.html`` and ``plans/METHOD/SUITE/``, a plan for every use; overwrite:
        replace it if it exists. A run that was interrupted carries on.
    ray: spread evaluations over Ray actors: "auto", "local:N" or a cluster's address.
    settings: fields of :class:`secateur.GeneraliseSettings`, such as ``methods=("attribution", "random")``.

    Raises
    ------
    SuiteError, SettingError, DataError: something asked for is unknown, too small or does not suit the model.
    OutputError: the directory exists or cannot be written.
    """
    asked = [load_suite(suite) for suite in suites]
    chosen = GeneraliseSettings(**settings)
    chosen.check()
    generalisations.check_suites(asked, chosen)
    generalisations.check_methods(model, asked, chosen)
    progress = progress or Progress()
    check_address(ray)
    if output is None:
        with _actors(ray, model, progress) as cluster:
            return generalisations.generalise(model, asked, chosen, progress=progress, cluster=cluster)
    key = _run_key("generalise", model, asked, chosen, (*METHODS_ASKED, "modes", "scenarios_left_out"))
    directory, left = _opened(output, overwrite, SPARE_BYTES, key, read=_reach_of)
    done, singles = left or ({}, {})

    def finished() -> dict[str, Any]:
        return {
            "fits": [asdict(one) for one in done.values()],
            "singles": [asdict(one) for one in singles.values()],
        }

    with writing(directory, keep=True), _State.kept(directory, key, model, asked, finished()) as state:
        if left is not None:
            progress.say(f"Carrying on an interrupted run; repairs that are there: {len(done)}")

        def place(fit: Fit) -> Path:
            return directory.staging / "plans" / fit.name

        def remember(fit: Fit, plan: Plan | None) -> None:
            if plan is not None:
                plan.save(place(fit))
            done[fit.method, fit.source] = fit
            state.save(finished())

        def remember_singles(found: OneByOne) -> None:
            singles[found.method, found.suite] = found
            state.save(finished())

        with _measuring(directory, ray, model, progress) as (store, cluster):
            result = generalisations.generalise(
                model,
                asked,
                chosen,
                progress=progress,
                remembered={
                    known: (fit, load_plan(place(fit)).mask if fit.status == "chosen" else None)
                    for known, fit in done.items()
                },
                remember=remember,
                remembered_singles=dict(singles),
                remember_singles=remember_singles,
                costs=state.costs,
                store=store,
                cluster=cluster,
            )
        result.run["started"] = state.started
        directory.write_json("generalise.json", result.as_dict())
        for name, text in result.tables().items():
            write_text(directory.staging / name, text)
        write_text(directory.staging / "report.html", render_generalise(result, directory.target))
    (directory.target / STATE).unlink(missing_ok=True)
    return result


@contextmanager
def _measuring(
    directory: OutputDirectory, address: str | None, model: LanguageModel, progress: Progress
) -> Iterator[tuple[Store, Cluster | None]]:
    """The store of a run, which keeps what is measured, and the actors that measure, if any."""
    with (
        Store(directory.staging / MEASURED, model.fingerprint) as store,
        _actors(address, model, progress) as cluster,
    ):
        yield store, cluster


@contextmanager
def _actors(address: str | None, model: LanguageModel, progress: Progress) -> Iterator[Cluster | None]:
    """Ray actors while the context lasts; none without an address."""
    if address is None:
        yield None
        return
    progress.say(f"Starting Ray actors ({address})")
    with Cluster.start(address, model) as cluster:
        progress.say(f"The first of {len(cluster.actors)} actors is ready; any others take part as they start")
        yield cluster


def _run_key(
    study: str, model: LanguageModel, suites: Sequence[Suite], settings: StudySettings, besides: Sequence[str] = ()
) -> dict[str, Any]:
    """What two runs must have in common for one to carry on the other, as plain data.

    Parameters
    ----------
    besides: settings in which they may differ, too.
    """
    control = None if settings.control_suite is None else suite_hash(load_suite(settings.control_suite))
    text = hashlib.sha256("\n\n".join(read_passages(settings.utility_text)).encode()).hexdigest()
    key = {
        "study": study,
        "version": version("secateur"),
        "model": model.fingerprint,
        "arithmetic": [str(model.dtype), model.matmul_precision],
        "suite": [suite_hash(suite) for suite in suites],
        "control": control,
        "text": text,
        "settings": {name: value for name, value in settings.as_dict().items() if name not in (*EFFORT, *besides)},
    }
    return dict(json.loads(to_json(key)))


@dataclass(eq=False)
class _State:
    """What a run leaves in ``partial.json`` to be carried on from.

    Attributes
    ----------
    content: what the run is, when it was started, and what its study adds. costs: of this sitting and earlier ones.
    """

    directory: OutputDirectory
    content: dict[str, Any]
    costs: Costs
    _saved: float = field(init=False, default_factory=time.monotonic)

    @classmethod
    @contextmanager
    def kept(
        cls,
        directory: OutputDirectory,
        key: dict[str, Any],
        model: LanguageModel,
        suites: Sequence[Suite],
        told: dict[str, Any],
    ) -> Iterator[_State]:
        """Keep the state while the context lasts: from its beginning on, and up to what stops it.

        One that is carried on keeps its start, and adds to its costs.

        Parameters
        ----------
        told: what the study has to tell from the beginning.
        """
        left = directory.read_json(STATE) or {}
        is_command = Path(*sys.argv[:1]).name == "secateur"
        content = {
            "format": STATE_FORMAT,
            "key": key,
            "suite": ", ".join(suite.name for suite in suites),
            "source": model.source,
            "command": sys.argv[1:] if is_command else [],
            "directory": str(Path.cwd()),
            "started": left.get("started") or now(),
        }
        state = cls(directory, content, _costs_of(left))
        state.costs.changed = state._tick
        state.save(told)
        try:
            yield state
        except BaseException:
            with suppress(OSError):  # what stops the run is to be told, not that its cost cannot be
                state.save({})
            raise

    @property
    def started(self) -> str:
        return str(self.content["started"])

    def save(self, told: dict[str, Any]) -> None:
        """Write the state, with what the study has to add or to tell anew."""
        self.content |= told
        costs = {"costs": {part: asdict(cost) for part, cost in self.costs.parts.items()}}
        self.directory.write_json(STATE, {**self.content, "carried_on": self.costs.carried_on, **costs})
        self._saved = time.monotonic()

    def _tick(self) -> None:
        if time.monotonic() - self._saved >= COST_EVERY:
            self.save({})


def _costs_of(state: dict[str, Any]) -> Costs:
    """What a run has cost that is now carried on, or of an empty state begun."""
    parts = {part: Cost(**spent) for part, spent in state.get("costs", {}).items()}
    return Costs(parts, carried_on=state.get("carried_on", 0) + 1 if state else 0)


def _methods_of(state: dict[str, Any]) -> dict[str, MethodResult]:
    """The methods that an interrupted comparison has finished, by name."""
    return {one["name"]: MethodResult.from_dict(one) for one in state["methods"]}


def _reach_of(state: dict[str, Any]) -> tuple[dict[FitKey, Fit], dict[FitKey, OneByOne]]:
    """What an interrupted study of where repairs hold has made: repairs by method and source, and what was done one
    scenario at a time by method and suite."""
    fits = {(one["method"], one["source"]): Fit.from_dict(one) for one in state["fits"]}
    return fits, {(one["method"], one["suite"]): OneByOne.from_dict(one) for one in state.get("singles", [])}


def _opened(
    output: str | Path, overwrite: bool, needed_bytes: int, key: dict[str, Any], read: Callable[[dict[str, Any]], Left]
) -> tuple[OutputDirectory, Left | None]:
    """An output directory, and what an interrupted run with the same key left there; None where there is none.

    Parameters
    ----------
    read: turns its state into what is carried on.

    Raises
    ------
    OutputError: the directory exists, cannot be written or is being written; or there is an interrupted run that cannot
        be carried on by this command, and nobody said that it may be replaced.
    StoreError: nobody can tell whether its measurements can be carried on with.
    """
    directory = OutputDirectory.open(output, overwrite, needed_bytes, carry_on=True)
    try:
        return directory, _left_by(directory, key, read)
    except BaseException:
        directory.close()
        raise


def _left_by(directory: OutputDirectory, key: dict[str, Any], read: Callable[[dict[str, Any]], Left]) -> Left | None:
    """What an interrupted run left, see :func:`_opened`."""
    state, refusal = directory.read_json(STATE), LEFT_BEHIND
    if isinstance(state, dict):
        other = _other(state, key, directory.target)
        store = directory.staging / MEASURED
        if not other and (not directory.overwrite or is_usable(store, key["model"])):
            try:
                _costs_of(state)  # read again with the rest of the state, when it is known to be carried on
                return read(state)
            except (KeyError, TypeError, ValueError, AttributeError):
                other = UNREADABLE
        refusal = f"an interrupted run {other}"
    directory.start_afresh(refusal)
    return None


def _other(state: dict[str, Any], key: dict[str, Any], target: Path) -> str:
    """Why an interrupted run is not carried on by a command with this key; "" where it is."""
    left_key, way = state.get("key"), f"with 'secateur runs --resume {target}'"
    if state.get("command") == []:
        way = "from Python, as it was begun"
    made_by = left_key.get("version") if isinstance(left_key, dict) else None
    if made_by not in (None, key["version"]):
        return f"that was made by version {made_by} of Secateur: name another directory, or add --overwrite."
    if state.get("format", STATE_FORMAT) != STATE_FORMAT:
        return UNREADABLE
    if left_key == key:
        return ""
    return f"with other settings: carry it on {way}, name another directory, or add --overwrite."


def apply(model: LanguageModel, plan: Plan | str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write what a plan gives: a plain Hugging Face directory, or an adapter where units are turned down.

    Raises
    ------
    MaskError: the plan cannot be read, or was made for another model.
    OutputError: the directory exists or cannot be written.
    """
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    return export(model, plan, output, format=usual_format(plan.mask), overwrite=overwrite)


def export(
    model: LanguageModel,
    plan: Plan | str | Path,
    output: str | Path,
    *,
    format: str = "hf",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    **options: Any,
) -> Path:
    """Write what a plan gives in a format that other tools load, with a model card.

    Parameters
    ----------
    format: "hf", "peft", "hf-uniform", "compact" or "gguf"; see :data:`secateur.surgery.FORMATS`.
    push_to_hub: also upload the directory to this repository of the Hub, which needs a token.
    options: settings of the format: ``multiple`` (hf-uniform), ``quantisation`` (gguf), ``shard`` (hf, hf-uniform
        and compact).

    Returns
    -------
    The directory.

    Raises
    ------
    MaskError: the plan cannot be read, was made for another model, or the format cannot carry it.
    SettingError: unknown format or setting.
    OutputError: the directory exists or cannot be written; the Hub cannot be reached.
    """
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    check_export(model, plan.mask, format, **options)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    size = 0 if format == "peft" else model.weight_bytes
    directory = OutputDirectory.open(output, overwrite, SPARE_BYTES + size)
    with writing(directory):
        write_permanently(model, plan, directory.staging, format, push_to_hub or f"./{directory.target.name}", options)
    if push_to_hub is not None:
        push(directory.target, push_to_hub)
    return directory.target


def slim(
    model: LanguageModel,
    plan: Plan | str | Path | None = None,
    suite: str | Path | Suite | None = None,
    *,
    output: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> SlimResult:
    """Make a smaller and faster model, every layer of the same width, and measure it before and after.

    Parameters
    ----------
    plan: whose units go first; None to start from the whole model.
    suite: whose bias is measured; None for the plan's, or the default.
    output: a directory for ``checkpoint/``, ``slim.json`` and ``report.html``; overwrite: replace it if it exists.
    settings: fields of :class:`secateur.SlimSettings`, such as ``width=0.8`` or ``kv_heads=2``.

    Raises
    ------
    MaskError: the plan cannot be read, was made for another model, or removes no whole units.
    SuiteError, SettingError, DataError: something asked for is unknown, too small or does not suit the model.
    OutputError: the directory exists or cannot be written.
    """
    loaded = load_plan(plan) if isinstance(plan, str | Path) else plan
    asked = None if suite is None and loaded is not None else load_suite(suite)
    if loaded is not None:
        asked, settings = loaded.held_out(asked, settings)
    suite = load_suite(asked)
    chosen = SlimSettings(**settings)
    chosen.check()
    start = slims.check_plan(model, None if loaded is None else loaded.mask)
    target_size(model, chosen.width, chosen.multiple, chosen.kv_heads)
    directory = OutputDirectory.open(output, overwrite, SPARE_BYTES + model.weight_bytes)
    with writing(directory):
        checkpoint = directory.staging / "checkpoint"
        seen = NOTHING_SEEN if loaded is None else loaded.seen(suite)
        result = slims.slim(model, suite, checkpoint, like(model), start, chosen, progress=progress, seen=seen)
        record = {**(loaded.record if loaded else {}), **result.plan_record()}
        name = f"./{directory.target.name}/checkpoint"
        _write_record(model, Plan(result.mask, record), checkpoint, "hf-uniform", name)
        directory.write_json("slim.json", result.as_dict())
        write_text(directory.staging / "report.html", render_slim(result))
    return result


def like(model: LanguageModel) -> Callable[[Path], LanguageModel]:
    """How to load another checkpoint as a model was: its precision, and its device or device map."""
    told = dict(model.loaded_with or {})
    spread = told.get("device_map")

    def loading(path: Path) -> LanguageModel:
        return load(
            path,
            dtype=model.dtype,
            device=None if spread is not None else model.input_device,
            device_map=spread,
            matmul_precision=model.matmul_precision,
        )

    return loading


def usual_format(mask: AnyMask) -> str:
    """The format that carries a mask: a checkpoint for what is removed, an adapter for what is turned down."""
    return "peft" if isinstance(mask, Attenuation) else "hf"


def write_permanently(
    model: LanguageModel, plan: Plan, directory: Path, format: str, name: str, options: dict[str, Any]
) -> None:
    """Write a plan in a format, with the plan and a model card beside the weights."""
    FORMATS[format].write(model, plan.mask, directory, **options)
    _write_record(model, plan, directory, format, name)


def _write_record(model: LanguageModel, plan: Plan, directory: Path, format: str, name: str) -> None:
    """Write the plan and a model card beside the weights of a format."""
    plan.save(directory / BESIDE_WEIGHTS)
    write_text(directory / "README.md", render_card(model, plan, format, FORMATS[format].library, name))


def _write_repair(result: RepairResult, model: LanguageModel, directory: OutputDirectory) -> None:
    directory.write_json("result.json", result.as_dict())
    directory.write_json("run.json", result.run)
    write_text(directory.staging / "report.html", render_repair(result, directory.target))
    plan = result.plan
    if plan is not None:
        plan.save(directory.staging)
        usual = usual_format(plan.mask)
        name = "adapter" if usual == "peft" else "checkpoint"
        write_permanently(model, plan, directory.staging / name, usual, f"./{directory.target.name}/{name}", {})
