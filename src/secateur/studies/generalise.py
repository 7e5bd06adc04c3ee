"""``generalise``: where a repair holds. Fitted on one suite, judged on the held-out part of every other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.attenuation import Attenuation
from secateur.errors import NumericalError, SettingError
from secateur.evaluation.evaluator import Pool
from secateur.evaluation.store import Store
from secateur.measures.splits import Dealing, split
from secateur.models import LanguageModel
from secateur.progress import Progress
from secateur.search.methods import DEFAULT_METHOD, Method, method, methods_of
from secateur.studies import agreement, judging, leave_one_out
from secateur.studies import summary as summaries
from secateur.studies.fitting import FitKey, Fitting, Remember
from secateur.studies.judging import Judging
from secateur.studies.leave_one_out import LeftOut, OneByOne
from secateur.studies.parts import StudySettings
from secateur.studies.reach import Fit, GeneraliseResult
from secateur.studies.record import Costs
from secateur.studies.relations import MODES, PAIRED, SUITES_TO_JOIN, Mode, joint_families, joint_sources, relation
from secateur.suites import Suite
from secateur.units import UnitSpace
from secateur.weights import AnyMask, WeightMask

QUICK_MARKERS = 4
QUICK_TEST_MARKERS = 6
QUICK_TOKENS = 768
QUICK_SCENARIOS = 4


@dataclass(frozen=True)
class GeneraliseSettings(StudySettings):
    """What this study can be told, besides what every study can.

    Attributes
    ----------
    methods: names of the methods. options: their settings by method.
    modes: what to look at. Pairs of suites, by what they differ in: "languages", "attributes", or else the domain,
        "across"; "joint": fitted on all suites of the same groups but one, and judged on that one, and on all of them,
        as one repair for all; "specific": fitted on one scenario and judged on it; "within": fitted on all scenarios of
        a suite but one, and judged on that one.
    random_draws: random masks that are judged on every target, of the size of the largest repair judged there; without
        any, nothing is proven.
    scenarios_left_out: of every suite in the modes "specific" and "within", evenly spaced; None for all.
    max_scenarios, utility_tokens: fewer than in other studies, which look at one suite.
    dealing: "by text", so that suites which share groups and scenarios hold the same markers and wordings out.
    quick: few markers, four scenarios of every suite and little text: minutes, wider intervals.
    """

    dealing: Dealing = "by text"
    max_scenarios: int | None = 6
    utility_tokens: int | None = 3072
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
        asked = [mode for mode in PAIRED if mode in wanted]
        raise SettingError(
            f"--modes asks for {' and '.join(asked)}, and no two of these suites make such a pair; add "
            f"{' or '.join(sorted(kinds))}."
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


def generalise(
    model: LanguageModel,
    suites: Sequence[Suite],
    settings: GeneraliseSettings | None = None,
    *,
    progress: Progress | None = None,
    remembered: dict[FitKey, tuple[Fit, AnyMask | None]] | None = None,
    remember: Remember = lambda _, __: None,
    remembered_singles: dict[FitKey, OneByOne] | None = None,
    remember_singles: Callable[[OneByOne], None] = lambda _: None,
    costs: Costs | None = None,
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
    remembered_singles, remember_singles: the same for the modes "specific" and "within", by method and suite.
    costs: of earlier sittings, which this one adds to.
    store: keeps every measured mask. cluster: measures many masks at once, or None.
    """
    settings = (settings or GeneraliseSettings()).reduced()
    settings.check()
    check_suites(suites, settings)
    methods = check_methods(model, suites, settings)
    fitting = Fitting(
        model,
        suites,
        joint_sources(suites) if "joint" in settings.modes else [],
        settings,
        progress or Progress(),
        store,
        cluster,
        remembered or {},
        remember,
        costs or Costs(),
    )
    fitting.prepare()
    for chosen in methods:
        fitting.fit_all(chosen)
    judged, space = Judging(fitting, settings.modes, settings.random_draws), UnitSpace.of(model)
    masks = {chosen.name: fitting.masks_of(chosen.name) for chosen in methods}
    cells = judging.with_holm([cell for name in masks for cell in judged.judge(name)])
    names = [suite.name for suite in suites]
    agreements = [one for name, of in masks.items() for one in agreement.agreements(name, of, names, space)]
    rows = [one for name in masks for one in judged.summary(name, [cell for cell in cells if cell.method == name])]
    summary = summaries.with_holm(rows)
    advice = [one for name in masks for one in judged.advice(name)]
    singles = [
        _one_by_one(fitting, chosen, suite, settings, remembered_singles or {}, remember_singles)
        for chosen in methods
        for suite in (suites if _single_modes(settings) else ())
    ]
    return GeneraliseResult(
        model=model.source,
        suites=list(suites),
        limit=settings.max_perplexity_increase,
        control_suite=settings.control_suite,
        verdict=summaries.verdict_of(summary, compared=settings.random_draws > 0),
        summary=summary,
        fits=list(fitting.fits.values()),
        cells=cells,
        agreements=agreement.with_holm(agreements),
        layers={name: agreement.layers(of, space) for name, of in masks.items()},
        left_out=leave_one_out.with_holm([one for single in singles for one in single.found]),
        advice=advice,
        selections=judged.selections([*masks]),
        notes=[
            *notes(suites, settings),
            *fitting.notes,
            *judged.notes,
            *(f"{one.method}: no single scenarios of {one.suite}. {one.reason}" for one in singles if one.reason),
            *_notes_of_masks(masks, settings),
        ],
        run=fitting.describe(),
    )


def _one_by_one(
    fitting: Fitting,
    chosen: Method,
    suite: Suite,
    settings: GeneraliseSettings,
    remembered: dict[FitKey, OneByOne],
    remember: Callable[[OneByOne], None],
) -> OneByOne:
    """The modes "specific" and "within" of a method on a suite."""
    modes, most = _single_modes(settings), settings.scenarios_left_out
    asked = {"settings": chosen.settings, "modes": modes, "most": most}
    known = remembered.get((chosen.name, suite.name))
    if known is not None and known.asked == asked:
        return known
    parts, recorder = fitting.parts[suite.name], fitting.recorder
    judged, reason = list[LeftOut](), ""
    try:
        judged = leave_one_out.leave_one_out(parts, chosen, settings, recorder, modes, most, fitting.means)
    except (SettingError, NumericalError) as error:  # what shows only while a method scores ends no study
        reason = str(error)
    found = OneByOne(chosen.name, suite.name, asked, judged, reason)
    remember(found)
    return found


def _single_modes(settings: GeneraliseSettings) -> list[str]:
    """The modes that take one scenario at a time."""
    return [mode for mode in ("specific", "within") if mode in settings.modes]


def notes(suites: Sequence[Suite], settings: GeneraliseSettings) -> list[str]:
    """What a reader should know of the suites, in sentences."""
    said, by_measures = [], dict[str, list[str]]()
    for suite in suites:
        kinds = sorted({scenario.measure.kind for scenario in suite.scenarios})
        by_measures.setdefault(" and ".join(kinds), []).append(suite.name)
    if len(by_measures) > 1:
        which = "; ".join(f"{kinds} in {', '.join(names)}" for kinds, names in by_measures.items())
        said.append(
            f"The suites hold different measures: {which}. B is standardised by the spread within groups, so "
            "reductions of B can be set side by side; gaps cannot."
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
            "more than it shows; so nothing is proven of repairs from and for these. Give text of the language with "
            "--utility-text."
        )
    return said


def _notes_of_masks(masks: dict[str, dict[str, AnyMask]], settings: GeneraliseSettings) -> list[str]:
    """Where the modes that take one scenario at a time are not what a method does otherwise."""
    modes = " and ".join(_single_modes(settings))
    return [
        f"{name}: its repairs do not remove whole units, but the modes {modes} do."
        for name, of in masks.items()
        if modes and any(isinstance(mask, WeightMask | Attenuation) for mask in of.values())
    ]
