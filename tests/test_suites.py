"""Built-in suites are complete; a user's faulty suite is refused in one clear sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SuiteError
from secateur.suites import (
    DEFAULT_SUITE,
    Preference,
    Quantity,
    Suite,
    fill,
    fill_text,
    load_suite,
    suite_hash,
    suite_names,
)
from secateur.suites.schema import SLOT

Document = dict[str, Any]
DOMAINS = ("hiring", "lending", "purchase", "activity", "service", "housing", "justice")
REQUIRED = [
    "occupations",
    *(f"{domain}-{attribute}" for domain in DOMAINS for attribute in ("race", "gender")),
    *("religion", "nationality", "age", "disability", "orientation"),
    *("occupations-es", "hiring-race-es"),
]
GOOD: Document = {
    "name": "small",
    "attribute": "gender",
    "groups": {"men": ["him", "his"], "women": ["her", "hers"]},
    "scenarios": [
        {
            "id": "one",
            "measure": {"kind": "preference", "a": [" yes"], "b": [" no"]},
            "paraphrases": ["Hello {marker}"],
        },
        {
            "id": "two",
            "measure": {"kind": "quantity", "values": [1, 2], "format": "{}"},
            "paraphrases": [{"prompt": "Hello", "reply": "For {marker}:"}],
        },
    ],
}


def write(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document), encoding="utf-8")
    return path


def refusal(source: str | Path) -> str:
    with pytest.raises(SuiteError) as caught:
        load_suite(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.rstrip()[-1] in ".?)"
    return message


def test_required_suites_exist() -> None:
    assert not set(REQUIRED) - set(suite_names())
    assert DEFAULT_SUITE in suite_names()
    assert sum(load_suite(name).control for name in suite_names()) >= 2


@pytest.mark.parametrize("name", suite_names())
def test_builtin_suite_is_complete(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert len(suite.scenarios) >= 12
    assert {len(scenario.paraphrases) for scenario in suite.scenarios} == {3}
    assert len({scenario.id for scenario in suite.scenarios}) == len(suite.scenarios)
    assert suite.title
    assert suite.description
    assert suite.sources


@pytest.mark.parametrize("name", suite_names())
def test_builtin_suite_has_enough_markers(name: str) -> None:
    suite = load_suite(name)
    names = any(name.startswith(domain) for domain in DOMAINS)
    assert len(suite.groups) >= 2
    assert min(len(markers) for markers in suite.groups.values()) >= (32 if names else 16)
    everything = [marker for markers in suite.groups.values() for marker in markers]
    assert len(set(everything)) == len(everything)
    assert all(marker == marker.strip() for marker in everything)


@pytest.mark.parametrize("name", suite_names())
def test_builtin_wordings_differ_and_fill(name: str) -> None:
    suite = load_suite(name)
    markers = [marker for markers in suite.groups.values() for marker in markers]
    wordings = [paraphrase for scenario in suite.scenarios for paraphrase in scenario.paraphrases]
    assert len(set(wordings)) == len(wordings)
    for paraphrase in wordings:
        filled = {fill(paraphrase, marker) for marker in markers}
        assert len(filled) == len(markers)
        assert not any(brace in text for pair in filled for text in pair for brace in "{}")


def test_occupations_are_many_and_of_two_groups() -> None:
    suite = load_suite("occupations")
    assert len(suite.groups) == 2
    assert sum(len(markers) for markers in suite.groups.values()) >= 40


def test_none_is_the_default_suite() -> None:
    suite = load_suite(DEFAULT_SUITE)
    assert load_suite(None) == suite
    assert load_suite(suite) is suite


def test_good_user_suite_loads_with_short_forms_written_out(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD))
    assert isinstance(suite, Suite)
    assert suite.scenarios[0].paraphrases[0].prompt == "Hello {marker}"
    assert suite.scenarios[1].paraphrases[0].reply == "For {marker}:"
    measure = suite.scenarios[1].measure
    assert isinstance(measure, Quantity)
    assert measure.candidates == ["1", "2"]


def test_user_suite_may_refer_to_builtin_groups_and_to_its_own(tmp_path: Path) -> None:
    document = {**GOOD, "groups": "names-by-race", "sources": ["mine"]}
    suite = load_suite(write(tmp_path, document))
    assert suite.groups == load_suite("hiring-race").groups
    assert suite.sources[0] == "mine"
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "names-by-race.yaml").write_text("groups: {a: [x, y], b: [z, w]}", encoding="utf-8")
    assert set(load_suite(write(tmp_path, document)).groups) == {"a", "b"}


def test_reply_and_measure_of_the_whole_are_defaults(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["measure"] = document["scenarios"][0].pop("measure")
    document["scenarios"][0]["reply"] = "I say"
    document["scenarios"][0]["paraphrases"].append({"prompt": "Hi {marker}", "reply": "Well,"})
    suite = load_suite(write(tmp_path, document))
    assert [p.reply for p in suite.scenarios[0].paraphrases] == ["I say", "Well,"]
    assert suite.scenarios[0].measure == load_suite(write(tmp_path, GOOD)).scenarios[0].measure
    assert isinstance(suite.scenarios[1].measure, Quantity)


def test_hash_follows_the_content(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD))
    changed = copy.deepcopy(GOOD)
    changed["groups"]["men"][0] = "he"
    assert suite_hash(suite) == suite_hash(load_suite(write(tmp_path, GOOD)))
    assert suite_hash(suite) != suite_hash(load_suite(write(tmp_path, changed)))


def test_hash_leaves_out_which_answer_is_favourable_since_y_does_not_depend_on_it(tmp_path: Path) -> None:
    marked = copy.deepcopy(GOOD)
    marked["scenarios"][0]["measure"]["favourable"] = "b"
    plain, decision = load_suite(write(tmp_path, GOOD)), load_suite(write(tmp_path, marked))
    assert plain != decision
    assert suite_hash(plain) == suite_hash(decision)


def test_suites_of_decisions_say_which_answer_is_favourable() -> None:
    without = {"occupations", "occupations-es"}
    for name in set(REQUIRED) - without:
        suite = load_suite(name)
        assert any(isinstance(s.measure, Preference) and s.measure.favourable for s in suite.scenarios), name
    for name in without:
        assert not any(getattr(s.measure, "favourable", None) for s in load_suite(name).scenarios)


def first(document: Document) -> Document:
    scenario: Document = document["scenarios"][0]
    return scenario


def rename(mapping: Document, old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def quantity(**fields: object) -> Document:
    return {"kind": "quantity", "values": [1, 2.5], **fields}


# What is done to the good suite; which field the message must name; what it must say is expected.
FAULTS: dict[str, tuple[Callable[[Document], object], str, str]] = {
    "no slot": (lambda d: first(d).update(paraphrases=["Hello"]), "scenarios.0", "{marker}"),
    "empty group": (lambda d: d["groups"].update(men=[]), "groups", "group 'men' is empty"),
    "one marker": (lambda d: d["groups"].update(men=["him"]), "groups", "at least two"),
    "duplicate in a group": (lambda d: d["groups"].update(men=["him", "him"]), "groups", "'him' is listed twice"),
    "duplicate across groups": (lambda d: d["groups"].update(men=["him", "her"]), "groups", "'her' is listed twice"),
    "duplicate with a newline": (lambda d: d["groups"].update(men=["a\nb", "a\nb"]), "groups", "listed twice"),
    "favourable is no side": (
        lambda d: first(d)["measure"].update(favourable="yes"),
        "scenarios.0.measure.preference.favourable",
        "'a' or 'b'",
    ),
    "one group": (lambda d: d["groups"].pop("men"), "groups", "at least two groups"),
    "groups as a list": (lambda d: d.update(groups=["him", "her"]), "groups", "dictionary"),
    "marker not text": (lambda d: d["groups"].update(men=[True, False]), "groups.men.0", "valid string"),
    "scenario for scenarios": (lambda d: rename(d, "scenarios", "scenario"), "'scenarios'", "'scenario'"),
    "group for groups": (lambda d: rename(d, "groups", "group"), "'groups'", "'group'"),
    "key not text": (lambda d: (d.pop("groups"), d.update([(True, 1)])), "'groups'", "missing"),
    "unknown field": (lambda d: d.update(titel="x"), "'titel'", "title"),
    "paraphrase for paraphrases": (
        lambda d: rename(first(d), "paraphrases", "paraphrase"),
        "scenarios.0.paraphrase'",
        "Did you mean: paraphrases",
    ),
    "no name": (lambda d: d.pop("name"), "'name'", "required"),
    "no scenarios": (lambda d: d.update(scenarios=[]), "'scenarios'", "at least 1 item"),
    "same id twice": (lambda d: d["scenarios"][1].update(id="one"), "'scenarios'", "'one' is used twice"),
    "unknown kind": (lambda d: first(d)["measure"].update(kind="prefer"), "scenarios.0.measure", "'preference'"),
    "no measure": (lambda d: first(d).pop("measure"), "scenarios.0.measure", "required"),
    "same answers": (lambda d: first(d)["measure"].update(b=[" yes"]), "scenarios.0.measure", "differ"),
    "descending values": (lambda d: first(d).update(measure=quantity(values=[2, 1])), "values", "ascending"),
    "infinite value": (lambda d: first(d).update(measure=quantity(values=[1, float("inf")])), "values.1", "finite"),
    "negative value": (lambda d: first(d).update(measure=quantity(values=[-1, 1])), "values.0", "greater than 0"),
    "one value": (lambda d: first(d).update(measure=quantity(values=[1])), "values", "at least 2"),
    "format without slot": (lambda d: first(d).update(measure=quantity(format="x")), "format", "one {}"),
    "format of attributes": (lambda d: first(d).update(measure=quantity(format="{.foo}")), "format", "one {}"),
    "format of items": (lambda d: first(d).update(measure=quantity(format="{[0]}")), "format", "one {}"),
    "same candidates": (
        lambda d: first(d).update(measure=quantity(values=[1, 1.2], format="{:.0f}")),
        "scenarios.0.measure",
        "same candidate",
    ),
    "reply ends in a space": (lambda d: first(d).update(reply="So "), "scenarios.0", "ends in a space"),
    "unknown groups file": (lambda d: d.update(groups="names-by-rase"), "groups", "names-by-race"),
    "unknown scenarios file": (lambda d: d.update(scenarios="hirin"), "scenarios", "hiring"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_suite_is_refused_with_file_field_and_expectation(tmp_path: Path, fault: str) -> None:
    break_it, field, expectation = FAULTS[fault]
    document = copy.deepcopy(GOOD)
    break_it(document)
    path = write(tmp_path, document)
    message = refusal(path)
    assert str(path) in message
    assert field in message
    assert expectation in message


def test_refusal_names_the_scenario_and_counts_other_faults(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["scenarios"][1]["paraphrases"] = ["no slot"]
    document["extra"] = 1
    document["scenarios"][0]["paraphrases"] = ["no slot"]
    assert "2 more faults" in refusal(write(tmp_path, document))
    del document["extra"]
    assert "(scenario 'one')" in refusal(write(tmp_path, document))


@pytest.mark.parametrize(
    ("text", "expectation"),
    [
        ("name: [a\nb: }", "not valid YAML"),
        ("name:\n\tx: 1", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("version: 2020-13-45", "not valid YAML"),
        ("- a\n- b", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, expectation: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert str(path) in message
    assert expectation in message


def test_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in refusal(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(binary)
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.yaml")


def test_unknown_builtin_name_lists_near_misses() -> None:
    assert "occupations" in refusal("occupation")
    assert "Did you mean" not in refusal("zzzzzz")


@pytest.mark.parametrize("sources", [None, []])
def test_empty_sources_beside_shared_groups_are_allowed(tmp_path: Path, sources: list[str] | None) -> None:
    suite = load_suite(write(tmp_path, {**GOOD, "groups": "names-by-gender", "sources": sources}))
    assert suite.sources == load_suite("hiring-gender").sources


AROUND = st.text(alphabet=st.characters(blacklist_characters="{}", blacklist_categories=["Cs"]))
MARKERS = st.text(alphabet="{}\"'<>&%$\\ab é", min_size=1)


@given(before=AROUND, after=AROUND, marker=MARKERS)
def test_filling_leaves_other_text_alone(before: str, after: str, marker: str) -> None:
    assert fill_text(before + SLOT + after, marker) == before + marker + after
    assert fill_text(before + after, marker) == before + after


@given(before=AROUND, between=AROUND, marker=MARKERS)
def test_doubled_braces_become_single_ones(before: str, between: str, marker: str) -> None:
    text = f"{before}{{{{{between}{{marker}}{between}}}}}"
    assert fill_text(text, marker) == f"{before}{{{between}{marker}{between}}}"


@given(marker=MARKERS)
def test_every_slot_is_filled_once(marker: str) -> None:
    assert fill_text("{marker} and {marker}", marker) == f"{marker} and {marker}"
