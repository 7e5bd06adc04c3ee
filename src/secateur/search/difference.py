"""``SetDifference``: the heads that stand out under the minority and not under the majority."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.models import LanguageModel
from secateur.scoring.base import Ranking, Scorer, Settings
from secateur.search.base import Problem, Proposals, Selection, check_counts
from secateur.units import UnitSpace

# The published pair is the last.
TOPS = (2, 5, 10, 20, 40)
EXCLUDED = (40, 20, 5)


class SetDifference(Settings):
    """Remove the ``top`` heads under the minority but for the ``exclude`` heads under the majority.

    Attributes
    ----------
    top: how many heads stand out under the minority; None tries 2, 5, 10, 20 and 40.
    exclude: how many heads stand out under the majority; None tries 40, 20 and 5.

    The published counts (Ma et al., FAccT 2025) are 40 and 5. A suite whose groups are read alike leaves few heads
    where much is excluded and almost ``top`` where little is; so a short grid, ours, begins with the heads that are
    most the minority's own. For every ``exclude``, ``top`` grows until a proposal breaks the
    utility limit; the published pair is proposed in any case. Counts of the grid above half of the heads become half
    of them.
    """

    top: Annotated[int | None, Field(ge=1)] = None
    exclude: Annotated[int | None, Field(ge=0)] = None

    def cheaper(self) -> dict[str, Any]:
        return {"exclude": EXCLUDED[-1]}

    def check(self, model: LanguageModel, scorer: Scorer, ablation: str) -> None:
        """Refuse counts above what there is.

        Raises
        ------
        SettingError: more heads are asked for than the model has.
        """
        check_counts(self, UnitSpace.of(model), top="heads", exclude="heads")

    def proposals(self, problem: Problem, scorer: Scorer) -> Proposals:
        """Every pair in turn; equal masks are proposed once."""
        heads = problem.space.n_heads
        values = problem.score(scorer).values
        within: dict[tuple[int, ...], bool] = {}
        over: int | None = None  # the exclude whose last proposal broke the limit
        tops, excludes = _counts(self.top, TOPS, heads), _counts(self.exclude, EXCLUDED, heads)
        for exclude, top in product(excludes, tops):
            if exclude == over and (exclude, top) != (excludes[-1], tops[-1]):
                continue
            removed = set_difference(values["minority"], values["majority"], top, exclude)
            key = tuple(sorted(removed.tolist()))
            if key and key not in within:
                outcome = yield Selection("heads", removed, {"top": top, "exclude": exclude})
                within[key] = outcome.within_limit
            if not within.get(key, True):
                over = exclude


def _counts(asked: int | None, grid: tuple[int, ...], heads: int) -> list[int]:
    if asked is not None:
        return [asked]
    return list(dict.fromkeys(min(count, max(1, heads // 2)) for count in grid))


def set_difference(minority: np.ndarray, majority: np.ndarray, top: int, exclude: int) -> np.ndarray:
    """Flat positions of the ``top`` units under the minority that are not among the ``exclude`` under the majority.

    Parameters
    ----------
    minority, majority: (units,), the higher, the more a unit stands out; NaN for units that are not scored.
        Ties go to the lower position.
    top, exclude: counts; those above the number of scored units mean all.

    Returns
    -------
    positions, those that stand out most under the minority first.
    """
    first = Ranking(minority, {}).order()[:top]
    return np.asarray(first[~np.isin(first, Ranking(majority, {}).order()[:exclude])])
