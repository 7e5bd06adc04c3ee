"""``generalise``: where a repair holds. Fitted on one suite, judged on the held-out part of every other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from secateur.attenuation import Attenuation
from secateur.errors import SettingError
from secateur.evaluation.evaluator import Pool
from secateur.evaluation.store import Store
from secateur.measures.disparity import Interval, Table, compare, holm, p_value, suite_bias
from secateur.measures.disparity import reduction as reduction_of
from secateur.measures.overlap import overlap
from secateur.measures.splits import NOTHING_SEEN, Dealing, Seen, split
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.search.methods import DEFAULT_METHOD, Method, method, methods_of
from secateur.studies.advice import Advice, Use, advise
from secateur.studies.candidates import Candidates
from secateur.studies.leave_one_out import LeftOut, leave_one_out, with_holm
from secateur.studies.parts import Parts, StudySettings
from secateur.studies.plan import Plan
from secateur.studies.reach import Agreement, Cell, Fit, GeneraliseResult, Relation
from secateur.studies.record import Recorder
from secateur.studies.verdict import examine
from secateur.suites import Suite, suite_hash
from secateur.suites.joining import alike, joined
from secateur.units import ActivationMeans, Mask, UnitSpace
from secateur.weights import AnyMask, WeightMask

Mode = Literal["across", "attributes", "languages", "joint", "specific", "within"]
MODES: tuple[Mode, ...] = get_args(Mode)
PAIRED: tuple[Mode, ...] = ("across", "attributes", "languages")
ALL_BUT = "all but "
QUICK_MARKERS = 4
QUICK_TEST_MARKERS = 6
QUICK_TOKENS = 768
QUICK_SCENARIOS = 4
SUITES_TO_JOIN = 3
LEAST_TO_JUDGE = 5  # markers of every group, unless the whole test part has fewer


@dataclass(frozen=True)
class GeneraliseSettings(StudySettings):
    """What this study can be told, besides what every study can.

    Attributes
    ----------
    methods: names of the methods. options: their settings by method.
    modes: what to look at. Pairs of suites, by what they differ in: "languages", "attributes", or else the domain,
        "across"; "joint": fitted on all suites of the same groups but one, and judged on that one; "specific": fitted
        on one scenario and judged on it; "within": fitted on all scenarios of a suite but one, and judged on that one.
    random_draws: random masks that are judged on every target, of the size of the largest repair judged there; without
        any, nothing is proven.
    scenarios_left_out: of every suite in the modes "specific" and "within", evenly spaced; None for all.
    dealing: "by text", so that suites which share markers and wordings hold the same ones out.
    quick: few markers, four scenarios of every suite and little text: minutes, wider intervals.
    """

    dealing: Dealing = "by text"
    methods: tuple[str, ...] = (DEFAULT_METHOD,)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    modes: tuple[Mode, ...] = PAIRED
    random_draws: int = 3
    scenarios_left_out: int | None = 6
    quick: bool = False

    def check(self) -> None:
        super().check()
        self.check_least("random_draws", 0)
        self.check_least("scenarios_left_out", 1)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise SettingError("Name one method or several, each once.")
        for name in {*self.options} - {*self.methods}:
            raise SettingError(f"There are settings for the method '{name}', which does not take part.")
        for name in self.methods:
            method(name, self.options.get(name))
        for mode in self.modes:
            if mode not in MODES:
                raise SettingError(f"Unknown mode '{mode}'; choose among: {', '.join(MODES)}.")
        if not self.modes:
            raise SettingError(f"Name at least one mode of: {', '.join(MODES)}.")

    def reduced(self) -> GeneraliseSettings:
        """The same on less data if it is to be quick."""
        if not self.quick:
            return self
        return replace(
            self,
            max_markers=min(self.max_markers or QUICK_MARKERS, QUICK_MARKERS),
            max_test_markers=min(self.max_test_markers or QUICK_TEST_MARKERS, QUICK_TEST_MARKERS),
            max_scenarios=min(self.max_scenarios or QUICK_SCENARIOS, QUICK_SCENARIOS),
            utility_tokens=min(self.utility_tokens or QUICK_TOKENS, QUICK_TOKENS),
            random_draws=min(self.random_draws, 1),
            scenarios_left_out=min(self.scenarios_left_out or 2, 2),
        )


FitKey = tuple[str, str]
Remember = Callable[[Fit, Plan | None], None]


def check_suites(suites: Sequence[Suite], settings: GeneraliseSettings) -> None:
    """Refuse suites that cannot be set side by side.

    Raises
    ------
    SettingError: fewer than two, one twice, or no pair that the modes are about.
    SuiteError: one has too few markers or wordings to hold a part out.
    """
    if len(suites) < 2:
        raise SettingError("Generalising needs at least two suites; name more with --suites.")
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"Suite '{name}' is named twice.")
    for suite in suites:
        split(suite, settings.seed, dealing=settings.dealing)
    kinds = {relation(one, other) for one in suites for other in suites if one is not other}
    wanted = set(settings.modes)
    if not wanted & kinds and not wanted - set(PAIRED):
        raise SettingError(
            f"The suites differ in other things than the modes look at; add one of: {', '.join(sorted(kinds))}."
        )
    if wanted == {"joint"} and not joint_families(suites):
        raise SettingError(f"The mode 'joint' needs at least {SUITES_TO_JOIN} suites with the same groups.")


def check_methods(model: LanguageModel, suites: Sequence[Suite], settings: GeneraliseSettings) -> list[Method]:
    """The methods of a study.

    Raises
    ------
    SettingError: one of them cannot work on the model or a suite.
    """
    methods = methods_of(settings.methods, settings.options, settings.seed, settings.quick)
    for chosen in methods:
        for suite in suites:
            chosen.check(model, suite, settings.ablation)
    return methods


def relation(source: Suite, target: Suite) -> Relation:
    """The mode that a pair belongs to: the first of language and attribute that differs, else the domain."""
    if source.name == target.name:
        return "own"
    if source.language != target.language:
        return "languages"
    return "attributes" if source.attribute != target.attribute else "across"


def differences(source: Suite, target: Suite) -> tuple[str, ...]:
    """All that a target differs in from a source."""
    return tuple(name for name in ("language", "attribute", "domain") if getattr(source, name) != getattr(target, name))


def family_of(suite: Suite) -> str:
    """What suites must have in common for one repair to be advised for them."""
    return f"{suite.attribute} ({suite.language})"


def joint_families(suites: Sequence[Suite]) -> list[list[Suite]]:
    """The suites that can be joined, by family; families too small to leave one out are not among them."""
    families: list[list[Suite]] = []
    for suite in suites:
        home = next((family for family in families if alike(family[0], suite)), None)
        if home is None:
            families.append([suite])
        else:
            home.append(suite)
    return [family for family in families if len(family) >= SUITES_TO_JOIN]


def generalise(
    model: LanguageModel,
    suites: Sequence[Suite],
    settings: GeneraliseSettings | None = None,
    *,
    progress: Progress | None = None,
    remembered: dict[FitKey, tuple[Fit, AnyMask | None]] | None = None,
    remember: Remember = lambda _, __: None,
    store: Store | None = None,
    cluster: Pool | None = None,
) -> GeneraliseResult:
    """Fit every method on every suite, and judge every mask on the test part of every other suite.

    A source's choice is made on its own fit and select parts. Of a target's test markers those that the source has
    fitted or chosen by, because both suites have them, are left out.

    Parameters
    ----------
    remembered: fits of an interrupted run, by method and source, with their masks; not made again where the method's
        settings are the same.
    remember: called with every fit, and its plan, as soon as it is there.
    store: keeps every measured mask. cluster: measures many masks at once, or None.
    """
    settings = (settings or GeneraliseSettings()).reduced()
    settings.check()
    check_suites(suites, settings)
    methods = check_methods(model, suites, settings)
    study = _Study(model, list(suites), settings, progress or Progress(), store, cluster, remembered or {}, remember)
    study.prepare()
    for chosen in methods:
        study.fit_all(chosen)
    cells = _corrected([cell for chosen in methods for cell in study.judge(chosen.name)])
    agreements = _agreements_corrected([one for chosen in methods for one in study.agreements(chosen.name)])
    advice = [one for chosen in methods for one in study.advice(chosen.name)]
    left_out = with_holm([one for chosen in methods for one in study.leave_out(chosen)])
    return GeneraliseResult(
        model=model.source,
        suites=list(suites),
        limit=settings.max_perplexity_increase,
        control_suite=settings.control_suite,
        fits=list(study.fits.values()),
        cells=cells,
        agreements=agreements,
        layers={chosen.name: study.layers(chosen.name) for chosen in methods},
        left_out=left_out,
        advice=advice,
        notes=[*notes(suites, settings), *study.notes],
        run=study.describe(),
    )


def notes(suites: Sequence[Suite], settings: GeneraliseSettings) -> list[str]:
    """What a reader should know of the suites, in sentences."""
    kinds = sorted({scenario.measure.kind for suite in suites for scenario in suite.scenarios})
    said = []
    if len(kinds) > 1:
        said.append(
            f"The suites hold different measures ({', '.join(kinds)}); B stands in units of the spread within groups, "
            "so reductions of B can be set side by side, gaps cannot."
        )
    if "joint" in settings.modes:
        inside = {suite.name for family in joint_families(suites) for suite in family}
        outside = [suite.name for suite in suites if suite.name not in inside]
        if outside:
            said.append(
                f"Not in the joint mode, which needs {SUITES_TO_JOIN} suites of the same groups: {', '.join(outside)}."
            )
    foreign = sorted({suite.language for suite in suites if suite.language != "en"})
    if foreign and settings.utility_text is None:
        said.append(
            f"Perplexity is measured on English text, for suites in {', '.join(foreign)}, too, where a repair may cost "
            "more than it shows; give text of the language with --utility-text."
        )
    return said


@dataclass(eq=False)
class _Study:
    """The parts of every suite, and what has been chosen on them.

    Attributes
    ----------
    seen: by source, what it was fitted on and chosen by. means: for mean ablation, the same for all suites.
    after: y on the test part of a target, by method, source and target.
    notes: what could not be judged, in sentences.
    """

    model: LanguageModel
    suites: list[Suite]
    settings: GeneraliseSettings
    progress: Progress
    store: Store | None
    cluster: Pool | None
    remembered: dict[FitKey, tuple[Fit, AnyMask | None]]
    remember: Remember
    recorder: Recorder = field(init=False)
    parts: dict[str, Parts] = field(init=False, default_factory=dict)
    seen: dict[str, Seen] = field(init=False, default_factory=dict)
    means: ActivationMeans | None = field(init=False, default=None)
    fits: dict[FitKey, Fit] = field(init=False, default_factory=dict)
    masks: dict[FitKey, AnyMask] = field(init=False, default_factory=dict)
    after: dict[tuple[str, str, str], Table] = field(init=False, default_factory=dict)
    notes: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.model, self.progress)

    def prepare(self) -> None:
        """Measure the unpruned model on every suite."""
        for suite in self.suites:
            self.parts[suite.name] = self._parts(suite.name, suite)
        self.means = self.parts[self.suites[0].name].means(self.settings, self.recorder)
        for parts in self.parts.values():
            parts.measure_unpruned(self.recorder)

    def _parts(self, source: str, suite: Suite) -> Parts:
        parts = Parts.prepare(self.model, suite, self.settings, self.store, self.cluster)
        self.seen[source] = Seen.of(parts.splits.describe(suite))
        return parts

    def fit_all(self, chosen: Method) -> None:
        """Fit a method on every suite and, where that is asked for, on all suites but one."""
        for suite in self.suites:
            self._fit(chosen, suite.name, self.parts[suite.name])
        for target, others in self._joint():
            suite, source = joined(others, f"all-but-{target.name}", self.settings.max_scenarios), ALL_BUT + target.name
            self._fit(chosen, source, self._parts(source, suite), judged=False)

    def _joint(self) -> list[tuple[Suite, list[Suite]]]:
        """Every target of the joint mode with the suites to fit on."""
        if "joint" not in self.settings.modes:
            return []
        families = joint_families(self.suites)
        return [(one, [other for other in family if other is not one]) for family in families for one in family]

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

    def judge(self, name: str) -> list[Cell]:
        """Every mask of a method on every target that the modes are about, and random masks beside them."""
        cells = []
        for target in self.suites:
            judged = self._judged(name, target)
            masks = [self.masks[name, source] for source, _ in judged]
            measured = self._measured(name, target, masks + self._random_masks(masks))
            random = [after for after in measured[len(masks) :] if after is not None]
            for (source, how), after in zip(judged, measured, strict=False):
                if after is None:
                    self.notes.append(
                        f"{name}: under the repair for {source}, answers to {target.name} are not finite."
                    )
                    continue
                self.after[name, source, target.name] = after
                cells.append(self._cell(name, source, target, how, random))
            cells += [self._random_cell(name, target, random)] if random else []
        return cells

    def _judged(self, name: str, target: Suite) -> list[tuple[str, Relation]]:
        """The sources with a repair whose effect on a target can be judged; named are those that have seen too much."""
        judged = []
        for source, how in self._sources(target):
            if (name, source) not in self.masks:
                continue
            if self._enough(target, *self._unseen(source, target)):
                judged.append((source, how))
            else:
                self.notes.append(
                    f"{name}: a repair for {source} has seen too many markers or wordings of {target.name} to be "
                    "judged there; the pair is left out."
                )
        return judged

    def _random_masks(self, masks: list[AnyMask]) -> list[AnyMask]:
        """Random masks like the largest of some: what removes as much as any of them, and knows nothing of bias."""
        if not masks:
            return []
        largest = max(masks, key=_share)
        rng = np.random.default_rng(self.settings.seed + 1)
        return [largest.random_like(rng) for _ in range(self.settings.random_draws)]

    def _measured(self, name: str, target: Suite, masks: list[AnyMask]) -> list[Table | None]:
        """y on the test part of a target under masks; None where it is not finite."""
        test = self.parts[target.name].test
        with self.recorder.step(f"{name} on {target.name}: {len(masks)} masks", len(masks) * test.work()) as advance:
            return [None if found is None else found.table for found in test.evaluate_each(masks, advance)]

    def _sources(self, target: Suite) -> list[tuple[str, Relation]]:
        """The sources whose repairs a target is judged under."""
        asked: list[tuple[str, Relation]] = []
        for suite in self.suites:
            how = relation(suite, target)
            if how == "own" or how in self.settings.modes:
                asked.append((suite.name, how))
        if any(one.name == target.name for one, _ in self._joint()):
            asked.append((ALL_BUT + target.name, "joint"))
        return asked

    def _cell(self, name: str, source: str, target: Suite, how: Relation, random: list[Table]) -> Cell:
        """One cell; random masks are compared on what it is judged on, too."""
        rows, keep = self._unseen(source, target)
        fit = self.fits[name, source]
        before = _cut(self._before(target), rows, keep)
        found = compare(before, _cut(self.after[name, source, target.name], rows, keep), self.settings.seed)
        home = next((suite for suite in self.suites if suite.name == source), None)
        return Cell(
            method=name,
            source=source,
            target=target.name,
            relation=how,
            differs=() if home is None else differences(home, target),
            markers=int(keep.sum()),
            scenarios=len(rows),
            before=found.before,
            after=found.after,
            reduction=found.reduction,
            change=found.change,
            perplexity_increase=fit.perplexity_increase,
            over_limit=fit.over_limit,
            largest_random=self._largest_reduction(before, [_cut(after, rows, keep) for after in random]),
        )

    def _largest_reduction(self, before: Table, afters: list[Table]) -> float | None:
        """The largest reduction of B under several masks; None without any."""
        left = [suite_bias(after, self.settings.seed).corrected for after in afters]
        return float(reduction_of(suite_bias(before, self.settings.seed).corrected, min(left))) if left else None

    def _random_cell(self, name: str, target: Suite, tables: list[Table]) -> Cell:
        """Mean over random masks on the whole test part, with the smallest and the largest in place of an interval."""
        before = self._before(target)
        found = [compare(before, table, self.settings.seed) for table in tables]

        def spread(values: list[float]) -> Interval:
            return Interval(float(np.mean(values)), min(values), max(values))

        return Cell(
            method=name,
            source="random masks",
            target=target.name,
            relation="random",
            differs=(),
            markers=len(before.groups),
            scenarios=len(before.y),
            before=found[0].before,
            after=spread([one.after.value for one in found]),
            reduction=spread([one.reduction.value for one in found]),
            change=spread([one.change.value for one in found]),
        )

    def _before(self, target: Suite) -> Table:
        return self.parts[target.name].test.evaluate().table

    def _unseen(self, source: str, target: Suite) -> tuple[list[int], np.ndarray]:
        """What a source has neither fitted nor chosen by: rows of the target's scenarios; bool (markers,)."""
        prompts, names = self.parts[target.name].test.prompts, target.markers
        seen = NOTHING_SEEN if source == target.name else self.seen[source]
        keep = np.array([names[marker] not in seen.markers for marker in prompts.markers])
        dealt = self.parts[target.name].splits.test.paraphrases
        rows = [
            row
            for row, number in enumerate(prompts.scenarios)
            if not seen.wordings & {target.scenarios[number].paraphrases[one].text for one in dealt[number]}
        ]
        return rows, keep

    def _enough(self, target: Suite, rows: list[int], keep: np.ndarray) -> bool:
        """Whether scenarios and markers are left to judge on."""
        groups = self._before(target).groups
        each = [(int((keep & (groups == group)).sum()), int((groups == group).sum())) for group in np.unique(groups)]
        return bool(rows) and all(kept >= min(LEAST_TO_JUDGE, whole) for kept, whole in each)

    def agreements(self, name: str) -> list[Agreement]:
        """Every two suites' units side by side; nothing for masks of single weights."""
        space, found = UnitSpace.of(self.model), []
        chosen = {suite.name: self._units(name, suite.name) for suite in self.suites}
        names = [one for one, units in chosen.items() if units is not None]
        for number, one in enumerate(names):
            for other in names[number + 1 :]:
                a, b = chosen[one], chosen[other]
                assert a is not None
                assert b is not None
                kinds = [[units[units < space.n_heads], units[units >= space.n_heads]] for units in (a, b)]
                both = np.intersect1d(a, b)
                agreement = overlap(kinds[0], kinds[1], (space.n_heads, space.n_neurons))
                found.append(Agreement(name, one, other, agreement, per_layer(space, both)))
        return found

    def _units(self, name: str, source: str) -> np.ndarray | None:
        mask = self.masks.get((name, source))
        if mask is None or isinstance(mask, WeightMask):
            return None
        return np.asarray(mask.removed if isinstance(mask, Mask) else mask.changed)

    def layers(self, name: str) -> dict[str, list[int]]:
        """Units of every source, by layer."""
        space = UnitSpace.of(self.model)
        found = {source: self._units(name, source) for method_name, source in self.masks if method_name == name}
        return {source: per_layer(space, units) for source, units in found.items() if units is not None}

    def leave_out(self, chosen: Method) -> list[LeftOut]:
        """The modes "specific" and "within"."""
        modes = [mode for mode in ("specific", "within") if mode in self.settings.modes]
        if not modes:
            return []
        if any(isinstance(mask, WeightMask | Attenuation) for key, mask in self.masks.items() if key[0] == chosen.name):
            asked = " and ".join(modes)
            self.notes.append(f"{chosen.name}: its repairs do not remove whole units, but the modes {asked} do.")
        return [
            one
            for suite in self.suites
            for one in leave_one_out(
                self.parts[suite.name],
                chosen,
                self.settings,
                self.recorder,
                modes,
                self.settings.scenarios_left_out,
                self.means,
            )
        ]

    def advice(self, name: str) -> list[Advice]:
        """For every family of uses: repairs of their own, or shared ones."""
        uses = {target.name: self._use(name, target) for target in self.suites}
        left_out = [target for target, use in uses.items() if use is None]
        if left_out:
            self.notes.append(
                f"{name}: not in the advice, for want of markers and wordings that no repair has seen: "
                f"{', '.join(left_out)}."
            )
        families: dict[str, list[Use]] = {}
        for target in self.suites:
            use = uses[target.name]
            families.setdefault(family_of(target), []).extend([] if use is None else [use])
        return [advise(name, one, inside, self.settings.seed) for one, inside in families.items()]

    def _use(self, name: str, target: Suite) -> Use | None:
        """A suite with its own and shared repairs, side by side on what none has seen; None where that is too little.

        A repair that breaks the utility limit, or under which answers are not finite, is none.
        """
        sources = [one for one in self._sources(target) if one[1] in ("joint", "across")]
        joint = [source for source, how in sources if how == "joint"]
        shared = joint or [source for source, _ in sources]
        unseen = [self._unseen(source, target) for source in (target.name, *shared)]
        rows = sorted(set.intersection(*(set(rows) for rows, _ in unseen)))
        keep = np.all([keep for _, keep in unseen], axis=0)
        if not self._enough(target, rows, keep):
            return None

        def under(source: str) -> Table | None:
            after = self.after.get((name, source, target.name))
            usable = after is not None and not self.fits[name, source].over_limit
            return _cut(after, rows, keep) if after is not None and usable else None

        return Use(
            name=target.name,
            markers=self._marker_names(target, keep),
            before=_cut(self._before(target), rows, keep),
            own=under(target.name),
            shared=[under(source) for source in shared],
            joint=bool(joint),
        )

    def _marker_names(self, target: Suite, keep: np.ndarray) -> tuple[str, ...]:
        """Some test markers of a target, each with its group."""
        flat = [f"{group}: {marker}" for group, markers in target.groups.items() for marker in markers]
        asked = np.array(self.parts[target.name].test.prompts.markers)
        return tuple(flat[marker] for marker in asked[keep])

    def describe(self) -> dict[str, Any]:
        """The record of the run; what finished before an interruption belongs to the cost, too."""
        suites = {suite.name: suite_hash(suite) for suite in self.suites}
        told = {**self.settings.as_dict(), "suite_hash": ", ".join(suites.values())}
        run = self.recorder.describe(told)
        before = [fit for key, fit in self.fits.items() if key in self.remembered]
        for name in ("tokens_forward", "tokens_backward", "seconds"):
            run[name] += sum(getattr(fit, name) for fit in before)
        return {**run, "suite_hashes": suites}


def _cut(table: Table, rows: list[int], keep: np.ndarray) -> Table:
    """Some scenarios and markers of a table."""
    return table.of_scenarios(rows).of_markers(keep)


def _share(mask: AnyMask) -> float:
    """How much of a model a mask takes away, to tell the larger of two masks of one method."""
    if isinstance(mask, WeightMask):
        return mask.weights_removed
    return mask.heads_removed / mask.space.n_heads + mask.neurons_removed / mask.space.n_neurons


def per_layer(space: UnitSpace, units: np.ndarray) -> list[int]:
    """How many of some flat positions lie in every layer, (layers,)."""
    layers = range(space.n_layers)
    parts = [(space.head_slice(layer), space.neuron_slice(layer)) for layer in layers]
    return [int(sum(((units >= part.start) & (units < part.stop)).sum() for part in both)) for both in parts]


def _corrected(cells: list[Cell]) -> list[Cell]:
    """Cells with p-values corrected for all of them; random masks are no tests."""
    tested = [number for number, cell in enumerate(cells) if cell.relation != "random"]
    adjusted = holm(np.array([p_value(cells[number].change) for number in tested]))
    corrected = list(cells)
    for number, p in zip(tested, adjusted, strict=True):
        corrected[number] = replace(cells[number], p_holm=float(p))
    return corrected


def _agreements_corrected(agreements: list[Agreement]) -> list[Agreement]:
    adjusted = holm(np.array([one.found.p_value for one in agreements]))
    return [replace(one, p_holm=float(p)) for one, p in zip(agreements, adjusted, strict=True)]
