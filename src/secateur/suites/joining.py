"""One suite out of several that ask about the same groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice, zip_longest

from secateur.errors import SuiteError
from secateur.suites.schema import Scenario, Suite


def joined(suites: Sequence[Suite], name: str) -> Suite:
    """A suite of as many scenarios as the largest of some suites has, dealt in turn from all of them.

    It is no larger than one of them, so that what is fitted on it differs by the variety of uses alone and not by
    the amount of data.

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
    size = max(len(suite.scenarios) for suite in suites)
    dealt = chain.from_iterable(zip_longest(*([_renamed(suite, s) for s in suite.scenarios] for suite in suites)))
    scenarios = list(islice((scenario for scenario in dealt if scenario is not None), size))
    told = {"name": name, "title": "", "description": "", "domain": "", "scenarios": scenarios}
    return first.model_copy(update=told)


def alike(one: Suite, other: Suite) -> bool:
    """Whether two suites ask about the same markers in the same language."""
    return (one.attribute, one.language, one.groups) == (other.attribute, other.language, other.groups)


def _renamed(suite: Suite, scenario: Scenario) -> Scenario:
    return scenario.model_copy(update={"id": f"{suite.name}-{scenario.id}"})
