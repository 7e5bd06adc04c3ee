"""Judge what was fitted on one suite on the test parts of all, and advise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from secateur.measures.disparity import (
    Interval,
    Table,
    bootstrap_squares,
    compare,
    corrected_square,
    fall_if_closed,
    holm,
    largest_reduction,
    p_value,
    suite_bias,
    suite_p_value,
)
from secateur.measures.selection import StateSelections, selections
from secateur.measures.splits import NOTHING_SEEN
from secateur.studies.advice import Advice, Use, advise
from secateur.studies.fitting import Fitting
from secateur.studies.reach import NO_REPAIR, NOT_FINITE, Cell, Summary
from secateur.studies.relations import Mode, Relation, differences, family_of, relation
from secateur.studies.summary import Squares, summarise
from secateur.suites import Suite
from secateur.weights import AnyMask, WeightMask

BUILT_IN_LANGUAGE = "en"  # of the built-in text
MEANT_FOR: dict[Relation, str] = {"own": "its own repair", "together": "the one repair for all"}
LEAST_TO_JUDGE = 5  # markers of every group, unless the whole test part has fewer


@dataclass(eq=False)
class Judging:
    """Masks on the test parts of suites that they were not fitted on.

    Attributes
    ----------
    modes: which pairs of suites are looked at. random_draws: random masks judged on every target.
    after: y on the test part of a target, by method, source and target, without a mask where one is unusable.
    unusable: by the same, why nothing was judged: there is no mask, or answers under it are not finite.
    random: y under every random mask, by method and target.
    notes: what could not be judged, in sentences.
    """

    fitted: Fitting
    modes: Sequence[Mode]
    random_draws: int
    after: dict[tuple[str, str, str], Table] = field(init=False, default_factory=dict)
    unusable: dict[tuple[str, str, str], str] = field(init=False, default_factory=dict)
    random: dict[tuple[str, str], list[Table]] = field(init=False, default_factory=dict)
    notes: list[str] = field(init=False, default_factory=list)

    @property
    def _seed(self) -> int:
        return self.fitted.settings.seed

    def judge(self, name: str) -> list[Cell]:
        """Every mask of a method on every target that the modes are about, and random masks beside them.

        Where there is no mask, or answers under it are not finite, all stays as it is: left out, a method that hardly
        ever finds a repair that works would look its best.
        """
        cells = []
        for target in self.fitted.suites:
            judged = self._judged(name, target)
            found = {source: self.fitted.masks.get((name, source)) for source, _ in judged}
            masks = {source: mask for source, mask in found.items() if mask is not None}
            measured = self._measured(name, target, [*masks.values(), *self._random_masks([*masks.values()])])
            random = [after for after in measured[len(masks) :] if after is not None]
            self.random[name, target.name] = random
            under = dict(zip(masks, measured, strict=False))
            for source, how in judged:
                after = under.get(source)
                if after is None:
                    self.unusable[name, source, target.name] = NOT_FINITE if source in under else NO_REPAIR
                    after = self._before(target)
                self.after[name, source, target.name] = after
                cells.append(self._cell(name, source, target, how, random))
            cells += [self._random_cell(name, target, random)] if random else []
        return cells

    def _judged(self, name: str, target: Suite) -> list[tuple[str, Relation]]:
        """The sources whose effect on a target can be judged; named are those that have seen too much of it."""
        judged = []
        for source, how in self._sources(target):
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
        rng = np.random.default_rng(self._seed + 1)
        return [largest.random_like(rng) for _ in range(self.random_draws)]

    def _measured(self, name: str, target: Suite, masks: list[AnyMask]) -> list[Table | None]:
        """y on the test part of a target under masks; None where it is not finite."""
        if not masks:
            return []
        test = self.fitted.parts[target.name].test
        with self.fitted.recorder.step(
            f"{name} on {target.name}: {len(masks)} masks", len(masks) * test.work()
        ) as advance:
            return [None if found is None else found.table for found in test.evaluate_each(masks, advance)]

    def _sources(self, target: Suite) -> list[tuple[str, Relation]]:
        """The sources whose repairs a target is judged under."""
        asked: list[tuple[str, Relation]] = []
        for suite in self.fitted.suites:
            how = relation(suite, target)
            if how == "own" or how in self.modes:
                asked.append((suite.name, how))
        for joint in self.fitted.joint:
            if any(one.name == target.name for one in joint.targets):
                asked.append((joint.source, joint.relation))
        return asked

    def _cell(self, name: str, source: str, target: Suite, how: Relation, random: list[Table]) -> Cell:
        """One cell; random masks are compared on what it is judged on, too."""
        rows, keep = self._unseen(source, target)
        fit = self.fitted.fits[name, source]
        before, after = (_cut(one, rows, keep) for one in (self._before(target), self.after[name, source, target.name]))
        found, raw = compare(before, after, self._seed), [suite_bias(one, self._seed) for one in (before, after)]
        home = next((suite for suite in self.fitted.suites if suite.name == source), None)
        return Cell(
            method=name,
            source=source,
            target=target.name,
            relation=how,
            differs=() if home is None else differences(home, target),
            markers=int(keep.sum()),
            scenarios=len(rows),
            p_before=self._p_before[target.name],
            before=found.before,
            after=found.after,
            reduction=found.reduction,
            change=found.change,
            fall=found.fall,
            fall_if_closed=fall_if_closed(before, self._seed),
            mean_abs_smd=(raw[0].mean_abs_smd, raw[1].mean_abs_smd),
            mean_abs_gap=(raw[0].mean_abs_gap, raw[1].mean_abs_gap),
            unusable=self.unusable.get((name, source, target.name), ""),
            perplexity_increase=fit.perplexity_increase,
            over_limit=fit.over_limit,
            foreign_text=self._foreign_text(home or target, target),
            largest_random=self._largest_reduction(before, [_cut(after, rows, keep) for after in random]),
        )

    def _foreign_text(self, home: Suite, target: Suite) -> bool:
        """Whether the text is the built-in one, in another language than a suite; a user's own is taken to be right."""
        languages = {home.language, target.language}
        return self.fitted.settings.utility_text is None and languages != {BUILT_IN_LANGUAGE}

    def _largest_reduction(self, before: Table, afters: list[Table]) -> float | None:
        """The largest reduction of B under several masks; None without any."""
        return largest_reduction(np.array([corrected_square(table, self._seed) for table in (before, *afters)]))

    def _random_cell(self, name: str, target: Suite, tables: list[Table]) -> Cell:
        """Mean over random masks on the whole test part, with the smallest and the largest in place of an interval."""
        before = self._before(target)
        found = [compare(before, table, self._seed) for table in tables]
        raw = [suite_bias(table, self._seed) for table in (before, *tables)]

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
            p_before=self._p_before[target.name],
            before=found[0].before,
            after=spread([one.after.value for one in found]),
            reduction=spread([one.reduction.value for one in found]),
            change=spread([one.change.value for one in found]),
            fall=spread([one.fall.value for one in found]),
            mean_abs_smd=(raw[0].mean_abs_smd, float(np.mean([one.mean_abs_smd for one in raw[1:]]))),
            mean_abs_gap=(raw[0].mean_abs_gap, float(np.mean([one.mean_abs_gap for one in raw[1:]]))),
        )

    @cached_property
    def _p_before(self) -> dict[str, float]:
        """Of the bias on the test part of every suite, corrected for all of them."""
        found = [suite_p_value(self._before(suite), self._seed) for suite in self.fitted.suites]
        return dict(zip([suite.name for suite in self.fitted.suites], holm(np.array(found)).tolist(), strict=True))

    def _before(self, target: Suite) -> Table:
        return self.fitted.parts[target.name].test.evaluate().table

    def _unseen(self, source: str, target: Suite) -> tuple[list[int], np.ndarray]:
        """What a source has neither fitted nor chosen by: rows of the target's scenarios; bool (markers,)."""
        prompts, names = self.fitted.parts[target.name].test.prompts, target.markers
        seen = NOTHING_SEEN if source == target.name else self.fitted.seen[source]
        keep = np.array([names[marker] not in seen.markers for marker in prompts.markers])
        dealt = self.fitted.parts[target.name].splits.test.paraphrases
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

    def summary(self, name: str, cells: Sequence[Cell]) -> list[Summary]:
        """What a method's repairs do by what a target differs in; ``cells`` are those of the method."""
        return summarise(name, cells, self._squares(name, cells), self._random_squares(name))

    def _random_squares(self, name: str) -> dict[str, np.ndarray]:
        """B^2 of a target before and under every random mask that stands beside a method, (1 + draws,)."""
        return {
            target.name: np.array([corrected_square(one, self._seed) for one in (self._before(target), *drawn)])
            for target in self.fitted.suites
            if (drawn := self.random.get((name, target.name)))
        }

    def _squares(self, name: str, cells: Sequence[Cell]) -> dict[tuple[str, str], Squares]:
        """B^2 before and after by source and target, under resamples that are drawn alike for all."""
        targets = {target.name: target for target in self.fitted.suites}
        asked = [cell for cell in cells if cell.relation != "random"]
        alike = dict[tuple[Any, ...], list[Cell]]()  # those that are judged on the same share one resampling
        for cell in asked:
            rows, keep = self._unseen(cell.source, targets[cell.target])
            alike.setdefault((cell.target, *rows, keep.tobytes()), []).append(cell)
        found = dict[tuple[str, str], Squares]()
        for inside in alike.values():
            target = inside[0].target
            rows, keep = self._unseen(inside[0].source, targets[target])
            before = _cut(self._before(targets[target]), rows, keep)
            afters = [_cut(self.after[name, cell.source, target], rows, keep) for cell in inside]
            markers = self._marker_names(targets[target], keep)
            values = np.array([corrected_square(table, self._seed) for table in (before, *afters)])
            draws = [_cut(after, rows, keep) for after in self.random[name, target]]
            random = np.array([corrected_square(after, self._seed) for after in draws])
            drawn = bootstrap_squares([before, *afters], self._seed, markers, target)
            for row, cell in enumerate(inside, start=1):
                found[cell.source, target] = Squares(values[[0, row]], drawn[[0, row]], random)
        return found

    def selections(self, names: Sequence[str]) -> list[StateSelections]:
        """Selection rates of every use that is a decision: unpruned, and under the repairs that are meant for it."""
        found = []
        for target in self.fitted.suites:
            test = self.fitted.parts[target.name].test
            meant = [(source, how) for source, how in self._sources(target) if how in MEANT_FOR]
            states: dict[str, AnyMask | None] = {"unpruned": None}
            for name in names:
                for source, how in meant:
                    mask = self.fitted.masks.get((name, source))
                    if mask is not None and (name, source, target.name) not in self.unusable:
                        states[f"{name}, {MEANT_FOR[how]}"] = mask
            rates = {state: selections(test.prompts, test.y(mask), self._seed) for state, mask in states.items()}
            found += [StateSelections(target.name, state, of) for state, of in rates.items() if of]
        return found

    def advice(self, name: str) -> list[Advice]:
        """For every family of uses: repairs of their own, shared ones, or one for all."""
        uses = {target.name: self._use(name, target) for target in self.fitted.suites}
        left_out = [target for target, use in uses.items() if use is None]
        if left_out:
            self.notes.append(
                f"{name}: not in the advice, for want of markers and wordings that no repair has seen: "
                f"{', '.join(left_out)}."
            )
        families: dict[str, list[Use]] = {}
        for target in self.fitted.suites:
            use = uses[target.name]
            families.setdefault(family_of(target), []).extend([] if use is None else [use])
        return [advise(name, one, inside, self._seed) for one, inside in families.items()]

    def _use(self, name: str, target: Suite) -> Use | None:
        """A suite with its own and shared repairs, side by side on what none has seen; None where that is too little.

        Shared is the one repair for all uses where it was asked for, else those for the other uses. A repair that
        breaks the utility limit, or under which answers are not finite, is none.
        """
        by_relation: dict[Relation, list[str]] = {}
        for source, how in self._sources(target):
            by_relation.setdefault(how, []).append(source)
        together, left_out = by_relation.get("together", []), by_relation.get("joint", [])
        shared = together or by_relation.get("across", [])
        unseen = [self._unseen(source, target) for source in (target.name, *shared, *left_out)]
        rows = sorted(set.intersection(*(set(rows) for rows, _ in unseen)))
        keep = np.all([keep for _, keep in unseen], axis=0)
        if not self._enough(target, rows, keep):
            return None

        def under(source: str) -> Table | None:
            after = self.after.get((name, source, target.name))
            usable = after is not None and not self.fitted.fits[name, source].over_limit
            return _cut(after, rows, keep) if after is not None and usable else None

        return Use(
            name=target.name,
            markers=self._marker_names(target, keep),
            before=_cut(self._before(target), rows, keep),
            p_before=self._p_before[target.name],
            own=under(target.name),
            shared=[under(source) for source in shared],
            random=[_cut(after, rows, keep) for after in self.random[name, target.name]],
            foreign_text=self._foreign_text(target, target),
            together=self.fitted.fits[name, together[0]].name if together else "",
            left_out=under(left_out[0]) if left_out else None,
        )

    def _marker_names(self, target: Suite, keep: np.ndarray) -> tuple[str, ...]:
        """Some test markers of a target, each with its group."""
        flat = [f"{group}: {marker}" for group, markers in target.groups.items() for marker in markers]
        asked = np.array(self.fitted.parts[target.name].test.prompts.markers)
        return tuple(flat[marker] for marker in asked[keep])


def _cut(table: Table, rows: list[int], keep: np.ndarray) -> Table:
    """Some scenarios and markers of a table."""
    return table.of_scenarios(rows).of_markers(keep)


def _share(mask: AnyMask) -> float:
    """How much of a model a mask takes away, to tell the larger of two masks of one method."""
    if isinstance(mask, WeightMask):
        return mask.weights_removed
    return mask.heads_removed / mask.space.n_heads + mask.neurons_removed / mask.space.n_neurons


def with_holm(cells: list[Cell]) -> list[Cell]:
    """Cells with p-values corrected within each of the questions that are asked: one method, one thing that differs.

    Random masks and uses that stay as they are are no tests.
    """
    families, corrected = dict[tuple[Any, ...], list[int]](), list(cells)
    for number, cell in enumerate(cells):
        if cell.repaired and cell.relation != "random":
            families.setdefault((cell.method, cell.relation, cell.differs_in_one), []).append(number)
    for tested in families.values():
        found = np.array([_p_values(cells[number]) for number in tested])  # (tested, 2)
        for number, p, p_if_closed in zip(tested, holm(found[:, 0]), holm(found[:, 1]), strict=True):
            corrected[number] = replace(cells[number], p_holm=float(p), p_if_closed=float(p_if_closed))
    return corrected


def _p_values(cell: Cell) -> tuple[float, float]:
    """Of no fall under the repair, and under one that closes every gap."""
    return p_value(cell.fall), 1.0 if cell.fall_if_closed is None else p_value(cell.fall_if_closed)
