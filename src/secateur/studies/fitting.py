"""Fit methods on several suites, and keep what was chosen on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from secateur.evaluation.evaluator import Pool
from secateur.evaluation.store import Store
from secateur.measures.splits import Seen
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.search.methods import Method
from secateur.studies.candidates import Candidates
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.plan import Plan
from secateur.studies.reach import Fit
from secateur.studies.record import Cost, Costs, Recorder
from secateur.studies.relations import Joint
from secateur.studies.verdict import Examination, examine_if_finite
from secateur.suites import Suite, suite_hash
from secateur.suites.joining import joined
from secateur.units import ActivationMeans, Mask
from secateur.weights import AnyMask

FitKey = tuple[str, str]
Remember = Callable[[Fit, Plan | None], None]


@dataclass(eq=False)
class Fitting:
    """The parts of every suite, and what has been chosen on them.

    Attributes
    ----------
    joint: what repairs for several suites at once are fitted on.
    remembered: fits of an interrupted run with their masks; not made again where the method's settings are the same.
    remember: called with every fit, and its plan, as soon as it is there.
    costs: of earlier sittings, which this one adds to.
    seen: by source, what it was fitted on and chosen by. means: for mean ablation, the same for all suites.
    fits, masks: by method and source; no mask where none was chosen, or answers under it are not finite at home.
    recorder: of all but the fits, which have their own.
    """

    model: LanguageModel
    suites: Sequence[Suite]
    joint: Sequence[Joint]
    settings: StudySettings
    progress: Progress
    store: Store | None = None
    cluster: Pool | None = None
    remembered: dict[FitKey, tuple[Fit, AnyMask | None]] = field(default_factory=dict)
    remember: Remember = lambda _, __: None
    costs: Costs = field(default_factory=Costs)
    recorder: Recorder = field(init=False)
    parts: dict[str, Parts] = field(init=False, default_factory=dict)
    seen: dict[str, Seen] = field(init=False, default_factory=dict)
    means: ActivationMeans | None = field(init=False, default=None)
    fits: dict[FitKey, Fit] = field(init=False, default_factory=dict)
    masks: dict[FitKey, AnyMask] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.model, self.progress, self.costs)

    def prepare(self) -> None:
        """Measure the unpruned model on every suite."""
        for suite in self.suites:
            self.parts[suite.name] = self._prepared(suite.name, suite)
        self.means = self.parts[self.suites[0].name].means(self.settings, self.recorder)
        for parts in self.parts.values():
            parts.measure_unpruned(self.recorder)

    def _prepared(self, source: str, suite: Suite) -> Parts:
        parts = Parts.prepare(self.model, suite, self.settings, self.store, self.cluster)
        self.seen[source] = Seen.of(parts.splits.describe(suite))
        return parts

    def fit_all(self, chosen: Method) -> None:
        """Fit a method on every suite and, where that is asked for, on several at once."""
        for suite in self.suites:
            self._fit(chosen, suite.name, self.parts[suite.name])
        for joint in self.joint:
            suite = joined(joint.suites, joint.source.replace(" ", "-"), self.settings.max_scenarios)
            self._fit(chosen, joint.source, self._prepared(joint.source, suite), joint)

    def _fit(self, chosen: Method, source: str, parts: Parts, joint: Joint | None = None) -> None:
        """Choose a mask on one source, and judge it there."""
        key = chosen.name, source
        known = self.remembered.get(key)
        if known is not None and known[0].settings == chosen.settings:
            self.fits[key], mask = known
            if isinstance(mask, Mask):  # its file holds the means of removed units only, and random masks take others
                mask = replace(mask, means=self.means)
        else:
            self.progress.say(f"{chosen.name} on {source}")
            with self.recorder.paused():
                fit, mask = self._made(chosen, source, parts, joint)
            self.fits[key] = fit
            self.remember(fit, None if mask is None else self._plan(fit, mask, parts, joint))
        if mask is not None:
            self.masks[key] = mask

    def _made(self, chosen: Method, source: str, parts: Parts, joint: Joint | None) -> tuple[Fit, AnyMask | None]:
        """A fit and, where one was chosen that can be judged, its mask."""
        recorder = Recorder(self.model, self.progress, self.costs, f"{chosen.name} on {source} {chosen.settings}")
        problem = parts.problem(self.settings, recorder, self.means)
        candidates = Candidates(parts.select, problem.limit, self.settings.seed, recorder)
        candidates.run_if_possible(problem, chosen.search.proposals(problem, chosen.scorer))
        mask = candidates.choose()
        found = None if mask is None else self._examined(parts, mask, recorder, joint)
        fit = self._record(chosen, source, candidates, mask, found, recorder.cost, joint)
        return fit, mask if fit.status == "chosen" else None

    def _examined(self, parts: Parts, mask: AnyMask, recorder: Recorder, joint: Joint | None) -> Examination | None:
        """What a mask does at home, on the test part of the suite and of the text; None where it is not finite."""
        if joint is not None:  # of no use's own: a few prompts carry the text
            prompts = parts.test.prompts
            few = prompts.of_scenarios(prompts.scenarios[:1])
            parts = replace(parts, test=replace(parts.test, prompts=few))
        return examine_if_finite(parts, mask, self.settings.seed, recorder)

    def _record(
        self,
        chosen: Method,
        source: str,
        candidates: Candidates,
        mask: AnyMask | None,
        found: Examination | None,
        cost: Cost,
        joint: Joint | None,
    ) -> Fit:
        """A fit with its figures on the test part of the text and, if it is a suite's own, of the suite."""
        figures: dict[str, Any] = {}
        if mask is not None:
            figures |= {"heads": mask.heads_removed, "neurons": mask.neurons_removed, "weights": mask.weights_removed}
        if found is not None:
            figures |= {
                "own": found.comparison if joint is None else None,
                "control": found.control,
                "perplexity_before": found.perplexity_before,
                "perplexity_after": found.perplexity_after,
                "perplexity_increase": found.perplexity_increase,
                "over_limit": found.perplexity_increase.value > self.settings.max_perplexity_increase,
            }
        return Fit(
            method=chosen.name,
            source=source,
            settings=chosen.settings,
            status=candidates.status if mask is None or found is not None else "not finite on test",
            reason=candidates.reason,
            candidates=candidates.records,
            **asdict(cost),
            **figures,
        )

    def _plan(self, fit: Fit, mask: AnyMask, parts: Parts, joint: Joint | None) -> Plan:
        """The mask with what is known of it, so that it can be verified and exported for its use."""
        suite = parts.select.prompts.suite
        told = {**self.settings.as_dict(), "suite": suite.name, "suite_hash": suite_hash(suite)}
        run = self.recorder.describe(told)
        record = {
            "model": self.model.source,
            "suite": suite.name,
            "method": fit.method,
            "settings": told,
            "splits": parts.splits.describe(suite),
            "versions": run["versions"],
            "command": run["command"],
            "test": None,
            "utility": None,
        }
        if joint is not None:
            record["sources"] = [one.name for one in joint.suites]
            record["target"] = None if joint.target is None else joint.target.name
        if fit.perplexity_increase is not None:
            record["utility"] = {
                "perplexity_before": fit.perplexity_before,
                "perplexity_after": fit.perplexity_after,
                "perplexity_increase": fit.perplexity_increase.as_dict(),
            }
            record["verdict"] = "measured"
            record["explanation"] = "What it and random masks do on every use is in generalise.json."
        if fit.own is not None:
            record["test"] = fit.own.as_dict()
        return Plan(mask, record)

    def masks_of(self, method: str) -> dict[str, AnyMask]:
        """A method's masks by source."""
        return {source: mask for (name, source), mask in self.masks.items() if name == method}

    @property
    def notes(self) -> list[str]:
        """What came of searches that could not go on and of masks that could not be judged, in sentences."""
        failed = [f"{fit.method}: no repair for {fit.source}. {fit.reason}" for fit in self.fits.values() if fit.reason]
        return failed + [
            f"{fit.method}: under the repair for {fit.source}, answers on its own test part, the text or the control "
            "suite are not finite; it is left out."
            for fit in self.fits.values()
            if fit.status == "not finite on test"
        ]

    def describe(self) -> dict[str, Any]:
        """The record of the run; what every fit has cost belongs to it, whenever it was made."""
        suites = {suite.name: suite_hash(suite) for suite in self.suites}
        told = {**self.settings.as_dict(), "suite_hash": ", ".join(suites.values())}
        run = self.recorder.describe(told)
        for name in ("tokens_forward", "tokens_backward", "seconds"):
            run[name] += sum(getattr(fit, name) for fit in self.fits.values())
        return {**run, "suite_hashes": suites}
