"""Prompts as data: every template renders in both profiles, and only what it is given shows."""

from __future__ import annotations

from typing import get_args

import jinja2
import pytest

from shared.prompts import Name, Profile, render, version

VALUES: dict[Name, dict[str, str]] = {
    "reasoner": {"problem": "<P>"},
    "policy": {"problem": "<P>"},
    "extractor": {"step": "<S>"},
    "extractor_judge": {"step": "<S>"},
    "extractor_logic": {"step": "<S>"},
    "extractor_code": {"step": "<S>", "logic": "<L>"},
    "judge": {"reference": "<R>", "answer": "<A>"},
}
ALL = [(profile, name) for profile in get_args(Profile) for name in get_args(Name)]


@pytest.mark.parametrize(("profile", "name"), ALL)
def test_a_template_shows_its_values_and_ends_without_newline(profile: Profile, name: Name) -> None:
    text = render(profile, name, **VALUES[name])
    shown = [v for v in VALUES[name].values() if v in text]
    assert shown == list(VALUES[name].values()) or (profile, name) == ("compact", "extractor_code")
    assert not text.endswith("\n")


@pytest.mark.parametrize(("profile", "name"), ALL)
def test_a_missing_value_is_an_error_not_an_empty_place(profile: Profile, name: Name) -> None:
    with pytest.raises(jinja2.UndefinedError):
        render(profile, name)


@pytest.mark.parametrize("name", [n for n in get_args(Name) if n.startswith("extractor")])
@pytest.mark.parametrize("profile", get_args(Profile))
def test_no_extractor_template_has_a_place_for_problem_or_answer(
    profile: Profile, name: Name
) -> None:
    """Invariant 12 at its root: whatever is passed, the template could not show it."""
    text = render(
        profile, name, **VALUES[name], problem="SECRET", answer="SECRET", reference="SECRET"
    )
    assert "SECRET" not in text
    assert "SECRET" in render(profile, "reasoner", problem="SECRET"), "control"


def test_a_value_is_data_and_never_a_template() -> None:
    hostile = "{{ 7 * 7 }} {% raw %} <b>&amp;"
    assert hostile in render("full", "reasoner", problem=hostile)


def test_versions_are_stable_and_differ_by_profile() -> None:
    assert version("full") == version("full")
    assert version("full") != version("compact")
    assert len(version("full")) == 12
