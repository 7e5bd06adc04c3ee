"""One suite out of several that ask about the same groups, and some scenarios of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.errors import SuiteError
from secateur.suites.schema import Scenario, Suite


def joined(suites: Sequence[Suite], name: str, size: int | None = None) -> Suite:
    """A suite of scenarios from all of some suites, from each as many (one more from the first), evenly spaced.

    It is no larger than one of them, so that what is fitted on it differs by the variety of uses and not by the
    amount of data.

    Parameters
    ----------
    size: number of scenarios; None for as many as the largest of the suites has.

    Raises
    ------
    SuiteError: the suites differ in groups, attribute or language.
    """
    first = suites[0]
    for suite in suites[1:]:
        if not alike(first, suite):
            raise SuiteError(
                f"Suites '{first.name}' and '{suite.name}' cannot be joined: they differ in groups, attribute or "
                "language."
            )
    most = max(len(suite.scenarios) for suite in suites)
    share, more = divmod(most if size is None else min(size, most), len(suites))
    scenarios = [
        _renamed(suite, suite.scenarios[at])
        for number, suite in enumerate(suites)
        for at in spaced(len(suite.scenarios), share + (number < more))
    ]
    told = {"name": name, "title": "", "description": "", "domain": "", "scenarios": scenarios}
    return first.model_copy(update=told)


def alike(one: Suite, other: Suite) -> bool:
    """Whether two suites ask about the same markers, in the same order, in the same language."""
    attribute, language = one.attribute == other.attribute, one.language == other.language
    return attribute and language and [*one.groups.items()] == [*other.groups.items()]


def spaced(total: int, most: int | None) -> list[int]:
    """At most so many of the numbers below ``total``, evenly spaced, the first and the last among them."""
    count = total if most is None else min(most, total)
    return [round(number) for number in np.linspace(0, total - 1, count).tolist()]


def thinned(suite: Suite, most: int | None) -> Suite:
    """A suite with at most so many of its scenarios, evenly spaced; None for all."""
    scenarios = [suite.scenarios[number] for number in spaced(len(suite.scenarios), most)]
    return suite.model_copy(update={"scenarios": scenarios})


def _renamed(suite: Suite, scenario: Scenario) -> Scenario:
    return scenario.model_copy(update={"id": f"{suite.name}-{scenario.id}"})
