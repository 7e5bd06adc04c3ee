"""The registry of methods and their settings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SettingError
from secateur.search.methods import METHODS, method, parse_options


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_are_found_by_name_and_say_their_settings(name: str) -> None:
    found = method(name)
    assert (type(found.scorer), type(found.search)) == (METHODS[name].scorer, METHODS[name].search)
    assert found.settings == method(name, found.settings).settings
    assert len(METHODS[name].summary) < 110


def test_unknown_method_lists_those_that_exist() -> None:
    with pytest.raises(SettingError, match=r"^Unknown method 'atribution' .did you mean 'attribution'.*choose one of"):
        method("atribution")


def test_settings_given_as_text_are_converted() -> None:
    assert method("attribution", {"rounds": "3", "unit_price": "1e-3"}).settings["rounds"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round": "3"}, "no setting 'round' .did you mean 'rounds'.*it has: max_heads, max_neurons"),
        (
            {"rounds": "-1"},
            "'rounds' of the method 'attribution': input should be greater than or equal to 0",
        ),
        ({"rounds": "many"}, "'rounds' of the method 'attribution': input should be a valid integer"),
        ({"unit_price": 0}, "'unit_price' of the method 'attribution': input should be greater than 0, not 0"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        method("attribution", options)
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.text("abcxyz_", min_size=1), st.text("abc=0.5-", min_size=1)))
def test_options_survive_their_text_form(options: dict[str, str]) -> None:
    assert parse_options(f"{key}={value}" for key, value in options.items()) == options


@pytest.mark.parametrize("pairs", [["rounds"], ["=3"], ["rounds="]])
def test_malformed_options_are_refused(pairs: list[str]) -> None:
    with pytest.raises(SettingError):
        parse_options(pairs)
