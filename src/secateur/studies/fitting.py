"""Fit methods on several suites, and keep what was chosen on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from secateur.studies.record import Recorder
from secateur.studies.verdict import examine
from secateur.suites import Suite, suite_hash
from secateur.suites.joining import joined
from secateur.units import ActivationMeans, Mask
from secateur.weights import AnyMask

ALL_BUT = "all but "
FitKey = tuple[str, str]
Remember = Callable[[Fit, Plan | None], None]


@dataclass(eq=False)
class Fitting:
    """The parts of every suite, and what has been chosen on them.

    Attributes
    ----------
    joint: targets, each with the suites that one repair is fitted on, to be judged on the target.
    remembered: fits of an interrupted run with their masks; not made again where the method's settings are the same.
    remember: called with every fit, and its plan, as soon as it is there.
    seen: by source, what it was fitted on and chosen by. means: for mean ablation, the same for all suites.
    fits, masks: by method and source; no mask where none was chosen.
    """

    model: LanguageModel
    suites: Sequence[Suite]
    joint: Sequence[tuple[Suite, list[Suite]]]
    settings: StudySettings
    progress: Progress
    store: Store | None = None
    cluster: Pool | None = None
    remembered: dict[FitKey, tuple[Fit, AnyMask | None]] = field(default_factory=dict)
    remember: Remember = lambda _, __: None
    recorder: Recorder = field(init=False)
    parts: dict[str, Parts] = field(init=False, default_factory=dict)
    seen: dict[str, Seen] = field(init=False, default_factory=dict)
    means: ActivationMeans | None = field(init=False, default=None)
    fits: dict[FitKey, Fit] = field(init=False, default_factory=dict)
    masks: dict[FitKey, AnyMask] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.model, self.progress)

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
        """Fit a method on every suite and, where that is asked for, on all suites but one."""
        for suite in self.suites:
            self._fit(chosen, suite.name, self.parts[suite.name])
        for target, others in self.joint:
            suite, source = joined(others, f"all-but-{target.name}", self.settings.max_scenarios), ALL_BUT + target.name
            self._fit(chosen, source, self._prepared(source, suite), judged=False)

    def _fit(self, chosen: Method, source: str, parts: Parts, judged: bool = True) -> None:
        """Choose a mask on one source, and judge it there."""
        key = chosen.name, source
        known = self.remembered.get(key)
        if known is not None and known[0].settings == chosen.settings:
            self.fits[key], mask = known
            if isinstance(mask, Mask):  # its file holds the means of removed units only, and random masks take others
                mask = replace(mask, means=self.means)
        else:
            self.progress.say(f"{chosen.name} on {source}")
            recorder = Recorder(self.model, self.progress)
            problem = parts.problem(self.settings, recorder, self.means)
            candidates = Candidates(parts.select, problem.limit, self.settings.seed, recorder)
            candidates.run(problem, chosen.search.proposals(problem, chosen.scorer))
            mask = candidates.choose()
            fit = self._judged_at_home(chosen, source, parts, candidates, mask, recorder, judged)
            self.fits[key] = fit
            self.remember(fit, None if mask is None else self._plan(fit, mask, parts))
        if mask is not None:
            self.masks[key] = mask

    def _judged_at_home(
        self,
        chosen: Method,
        source: str,
        parts: Parts,
        candidates: Candidates,
        mask: AnyMask | None,
        recorder: Recorder,
        judged: bool,
    ) -> Fit:
        """A fit with its figures on the test part of the text and, if it is a suite's own, of the suite."""
        figures: dict[str, Any] = {}
        if mask is not None:
            # A joint source has no use of its own to be judged on: a few prompts carry the text.
            prompts = parts.test.prompts
            if not judged:
                few = prompts.of_scenarios(prompts.scenarios[:1])
                parts = replace(parts, test=replace(parts.test, prompts=few))
            found = examine(parts, mask, self.settings.seed, recorder)
            figures = {
                "heads": mask.heads_removed,
                "neurons": mask.neurons_removed,
                "weights": mask.weights_removed,
                "own": found.comparison if judged else None,
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
            status=candidates.status,
            candidates=candidates.records,
            tokens_forward=recorder.usage.forward,
            tokens_backward=recorder.usage.backward,
            seconds=recorder.seconds,
            **figures,
        )

    def _plan(self, fit: Fit, mask: AnyMask, parts: Parts) -> Plan:
        """The mask with what is known of it, so that it can be exported for its use."""
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
        if fit.own is not None and fit.perplexity_increase is not None:
            own = fit.own
            record["test"] = own.as_dict()
            record["utility"] = {
                "perplexity_before": fit.perplexity_before,
                "perplexity_after": fit.perplexity_after,
                "perplexity_increase": fit.perplexity_increase.as_dict(),
            }
            record["verdict"] = "measured"
            record["explanation"] = "Random masks were compared on all uses together; see generalise.json."
        return Plan(mask, record)

    def masks_of(self, method: str) -> dict[str, AnyMask]:
        """A method's masks by source."""
        return {source: mask for (name, source), mask in self.masks.items() if name == method}

    def describe(self) -> dict[str, Any]:
        """The record of the run; what finished before an interruption belongs to the cost, too."""
        suites = {suite.name: suite_hash(suite) for suite in self.suites}
        told = {**self.settings.as_dict(), "suite_hash": ", ".join(suites.values())}
        run = self.recorder.describe(told)
        before = [fit for key, fit in self.fits.items() if key in self.remembered]
        for name in ("tokens_forward", "tokens_backward", "seconds"):
            run[name] += sum(getattr(fit, name) for fit in before)
        return {**run, "suite_hashes": suites}
