"""The schema of a suite: what is asked, of whom, and which measure turns an answer into a number."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SLOT = "{marker}"
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Unknown fields are errors: a misspelt name must not pass in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Preference(Strict):
    """y = log sum P(a) - log sum P(b), over surface forms that continue the reply; in nats.

    Attributes
    ----------
    favourable: the answers, "a" or "b", that decide in favour of the person; None where the scenario is no decision
        about a person. y does not depend on it, selection rates do.
    """

    kind: Literal["preference"]
    a: Annotated[list[Text], Field(min_length=1)]
    b: Annotated[list[Text], Field(min_length=1)]
    favourable: Literal["a", "b"] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Preference:
        both = [*self.a, *self.b]
        if len(set(both)) < len(both):
            raise ValueError("the answers in a and b must all differ")
        return self


class Quantity(Strict):
    """y = sum_v w_v log v, w the softmax of the candidates' log-likelihoods; in log units."""

    kind: Literal["quantity"]
    values: Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=2)]
    format: str = "{}"
    unit: str = ""

    @field_validator("values")
    @classmethod
    def _ascending(cls, values: list[float]) -> list[float]:
        if any(later <= earlier for earlier, later in pairwise(values)):
            raise ValueError("the values must be ascending")
        return values

    @field_validator("format")
    @classmethod
    def _formattable(cls, text: str) -> str:
        try:
            if text.format(1) == text.format(2):
                raise ValueError
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError("the format must hold one {} for the value, such as '{},' or '{:,}'") from error
        return text

    @model_validator(mode="after")
    def _distinct(self) -> Quantity:
        if len(set(self.candidates)) < len(self.candidates):
            raise ValueError("two values give the same candidate text in this format")
        return self

    @property
    def candidates(self) -> list[str]:
        """The candidate answers, whole numbers without a decimal point."""
        return [self.format.format(int(v) if v == int(v) else v) for v in self.values]


class LikelihoodPair(Strict):
    """y = log P(more) - log P(less), two whole continuations; in nats, positive = more stereotypical."""

    kind: Literal["likelihood-pair"]
    more: Text
    less: Text


Measure = Annotated[Preference | Quantity | LikelihoodPair, Field(discriminator="kind")]


class Paraphrase(Strict):
    """One wording: the user's message and the beginning of the reply; the slot in either."""

    prompt: str = ""
    reply: str = ""

    @property
    def text(self) -> str:
        """Both, as one text."""
        return f"{self.prompt}\n{self.reply}".strip()


class Scenario(Strict):
    """A situation in which the marker should not matter, in several wordings."""

    id: Slug
    measure: Measure
    paraphrases: Annotated[list[Paraphrase], Field(min_length=1)]

    @model_validator(mode="after")
    def _slots(self) -> Scenario:
        pair = self.measure if isinstance(self.measure, LikelihoodPair) else None
        in_pair = pair is not None and SLOT in pair.more and SLOT in pair.less
        for number, paraphrase in enumerate(self.paraphrases, 1):
            if not in_pair and SLOT not in paraphrase.prompt + paraphrase.reply:
                raise ValueError(f"paraphrase {number} has no {SLOT} slot")
            if pair is None and not paraphrase.prompt + paraphrase.reply:
                raise ValueError(f"paraphrase {number} is empty")
            if paraphrase.reply != paraphrase.reply.rstrip(" "):
                raise ValueError(f"the reply of paraphrase {number} ends in a space; begin the answers with it instead")
        return self


class Suite(Strict):
    """Scenarios, groups and markers for one protected attribute in one language.

    Attributes
    ----------
    groups: markers by group; the order of the groups fixes the sign of a gap (first minus second).
    control: whether the attribute is non-demographic, for comparison.
    """

    name: Slug
    version: int = 1
    title: str = ""
    description: str = ""
    attribute: Text
    domain: str = ""
    language: str = "en"
    control: bool = False
    sources: list[str] = []
    groups: dict[Slug, list[Text]]
    scenarios: Annotated[list[Scenario], Field(min_length=1)]

    @property
    def markers(self) -> list[str]:
        """The markers of all groups, in their flat order."""
        return [marker for markers in self.groups.values() for marker in markers]

    @property
    def marks_prompts(self) -> bool:
        """Whether a marker stands in any prompt, not in answers alone."""
        return any(SLOT in p.prompt + p.reply for scenario in self.scenarios for p in scenario.paraphrases)

    @field_validator("groups")
    @classmethod
    def _groups(cls, groups: dict[str, list[str]]) -> dict[str, list[str]]:
        if len(groups) < 2:
            raise ValueError("at least two groups are needed")
        seen: dict[str, str] = {}
        for group, markers in groups.items():
            if not markers:
                raise ValueError(f"group '{group}' is empty; give it at least two markers")
            if len(markers) < 2:
                raise ValueError(f"group '{group}' has one marker; give it at least two")
            for marker in markers:
                if marker in seen:
                    raise ValueError(f"marker '{marker}' is listed twice (groups '{seen[marker]}' and '{group}')")
                seen[marker] = group
        return groups

    @field_validator("scenarios")
    @classmethod
    def _unique_ids(cls, scenarios: list[Scenario]) -> list[Scenario]:
        ids = [scenario.id for scenario in scenarios]
        for scenario_id in ids:
            if ids.count(scenario_id) > 1:
                raise ValueError(f"scenario id '{scenario_id}' is used twice")
        return scenarios
