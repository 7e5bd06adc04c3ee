"""``Protected``: of the heads that perplexity does not need, those with the lowest bias after removal (FASP)."""

from __future__ import annotations

import math
from itertools import product
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.errors import SettingError
from secateur.models import LanguageModel
from secateur.scoring.base import Scorer, Settings
from secateur.search.base import Problem, Proposals, Selection
from secateur.units import UnitSpace

# The paper tries gamma .2 to .7 and alpha .02 to .20 in steps of .02; every pair costs a measurement. Small models
# bear less, so .01 is tried as well.
GAMMAS = (0.3, 0.5, 0.7)
ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
Share = Annotated[float, Field(ge=0, le=1)]


class Protected(Settings):
    """Protect the gamma N heads whose removal hurts perplexity most, of N in the model; of the rest, remove the
    alpha N with the lowest bias after removal: Zayed et al., "Fairness-Aware Structured Pruning in Transformers" (AAAI
    2024, arXiv 2312.15398).

    Attributes
    ----------
    gamma: protected share of all heads; None tries .3, .5 and .7.
    alpha: removed share of all heads, not of those unprotected; None tries .01, .02, .05,
        .1 and .2.

    For every gamma, alpha grows until a proposal breaks the utility limit. Pairs that add up to more
    than 1 are left out. The paper's own grid, gamma .2 to .7 and alpha 0 to .20, is thinned here, without the alpha of
    0 that removes nothing; single pairs of it can be asked for.

    Raises
    ------
    SettingError: gamma and alpha add up to more than 1.
    """

    gamma: Share | None = None
    alpha: Annotated[float, Field(gt=0, le=1)] | None = None

    def model_post_init(self, context: object) -> None:
        if not self.pairs:
            gamma, alpha = (GAMMAS[0] if self.gamma is None else self.gamma), self.alpha or ALPHAS[0]
            raise SettingError(
                f"gamma and alpha, the protected and the removed share of all heads, are {gamma:g} + {alpha:g}, more "
                "than 1; lower one of them."
            )

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The (gamma, alpha) to try, gamma by gamma."""
        gammas = GAMMAS if self.gamma is None else (self.gamma,)
        alphas = ALPHAS if self.alpha is None else (self.alpha,)
        return [(gamma, alpha) for gamma, alpha in product(gammas, alphas) if gamma + alpha <= 1 + 1e-9]

    def cheaper(self) -> dict[str, Any]:
        return {"gamma": 0.5} if self.alpha is None or self.alpha <= 0.5 else {}

    def check(self, model: LanguageModel, scorer: Scorer, ablation: str) -> None:
        """Refuse a share so small that no head would go.

        Raises
        ------
        SettingError: names the least share.
        """
        heads = UnitSpace.of(model).n_heads
        if not any(_share(alpha, heads) for _, alpha in self.pairs):
            raise SettingError(
                f"of {heads:,} heads the share alpha = {self.pairs[-1][1]:g} is less than one head; set "
                f"alpha to {math.ceil(1e4 / heads) / 1e4:g} or more."
            )

    def proposals(self, problem: Problem, scorer: Scorer) -> Proposals:
        """Every pair in turn; equal masks are proposed once."""
        values = problem.score(scorer).values
        within: dict[tuple[int, ...], bool] = {}
        over: float | None = None  # the gamma whose last proposal broke the limit
        for gamma, alpha in self.pairs:
            if gamma == over:
                continue
            removed = protected_selection(values["bias"], values["log_perplexity"], gamma, alpha)
            key = tuple(sorted(removed.tolist()))
            if key and key not in within:
                outcome = yield Selection("heads", removed, {"gamma": gamma, "alpha": alpha})
                within[key] = outcome.within_limit
            if not within.get(key, True):
                over = gamma


def protected_selection(bias: np.ndarray, perplexity: np.ndarray, gamma: float, alpha: float) -> np.ndarray:
    """Flat positions of the heads to remove, that with the lowest bias after removal first.

    Parameters
    ----------
    bias, perplexity: (units,), with the unit removed; NaN for units that are not scored, which
        neither count nor are chosen. Perplexity may be given by its logarithm.
    gamma, alpha: protected and removed share of the N scored units; shares of N are rounded down. Of
        equal perplexities the lower position is protected, of equal biases it is removed first (the
        authors' thresholds let ties through, so that more or fewer heads than asked for may go; ours).
    """
    heads = np.flatnonzero(~np.isnan(bias) & ~np.isnan(perplexity))
    hurt_most_first = heads[np.argsort(-perplexity[heads], kind="stable")]
    free = np.sort(hurt_most_first[_share(gamma, len(heads)) :])
    return np.asarray(free[np.argsort(bias[free], kind="stable")][: _share(alpha, len(heads))])


def _share(share: float, count: int) -> int:
    return int(share * count + 1e-9)  # .29 * 100 is 28.999...
