"""Configs: presets load, a wrong key is named, and a fingerprint covers exactly what it says."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from shared import prompts
from shared.errors import ConfigError
from shared.sandbox.result import Tier
from shared.trajectory import Check
from tirgen import config
from tirgen.config import NOT_IDENTITY, PRESETS, RunConfig, differences, load, override, parse

URL = "http://127.0.0.1:1/v1"


def full() -> RunConfig:
    """A config in which every section is present, and a price, so that a limit of cost may be."""
    judge = {"endpoint": {"base_url": URL, "model": "j", "prompt_price": 2.0}}
    return parse({**load(base_url=URL).model_dump(mode="json"), "judge": judge}, "test")


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Independent of the code under test: walks the model classes, not a dump."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


OTHER: dict[str, Any] = {
    "prompts": "full",
    "reasoner.boundary": "window",
    "reasoner.own_blocks": "reject",
    "reasoner.cut_at": ["x"],
    "extractor.calls": "three",
    "extractor.response_format": "json_object",
    "extractor.chat_template_kwargs": {},
    "correction.strategy": "none",
    "tool.observation": "plain",
    "tool.minimum_tier": "C",
    "tool.sandbox_url": "http://127.0.0.1:2",
    "verifier.required": ["executed"],
    "verifier.trivial": "lines",
}


def another(path: str, value: Any) -> Any:
    """A valid value of the field that is not `value`."""
    if path in OTHER:
        return OTHER[path]
    if path.endswith("base_url"):
        return "http://127.0.0.1:2/v1"
    if value is None or value == 0.0:
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if path.endswith((".top_p", ".min_overlap", ".max_trivial")):
        return value / 2
    if path.endswith(".deadline"):
        return value * 2
    return value + 1 if isinstance(value, int) else value / 2


def changed(base: RunConfig, path: str, value: Any) -> RunConfig:
    values = base.model_dump(mode="json")
    *sections, name = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[name] = value
    return parse(values, "test")


PATHS = [path for path, _ in leaves(full())]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_says_nothing_unknown(preset: str) -> None:
    loaded = load(preset, base_url=URL)
    assert loaded.reasoner.endpoint.base_url == URL
    assert load(preset, base_url=URL).fingerprint == loaded.fingerprint


def test_presets_differ_where_paper_and_release_differ() -> None:
    paper, code = load("paper"), load("authors-code")
    assert (paper.reasoner.top_k, code.reasoner.top_k) == (50, 30)
    assert (paper.extractor.calls, code.extractor.calls) == ("three", "one")
    assert (paper.reasoner.l_step, code.reasoner.l_step) == (512, 4096)
    assert (paper.verifier.trivial, code.verifier.trivial) == ("syntax", "lines")
    assert len({load(p, base_url=URL).fingerprint for p in PRESETS}) == len(PRESETS)


def test_not_identity_names_only_fields_that_exist() -> None:
    assert set(PATHS) >= NOT_IDENTITY


@pytest.mark.parametrize("path", PATHS)
def test_the_fingerprint_covers_every_field_but_not_identity(path: str) -> None:
    base = full()
    value = dict(leaves(base))[path]
    new = changed(base, path, another(path, value))
    assert new != base, "control: the field did change"
    assert (new.fingerprint == base.fingerprint) == (path in NOT_IDENTITY)
    named = {line.split(":")[0] for line in differences(base.identity(), new.identity())}
    assert named - {"prompts.version"} == (set() if path in NOT_IDENTITY else {path})


def test_the_identity_survives_json_as_the_database_keeps_it() -> None:
    base = full()
    assert differences(json.loads(json.dumps(base.identity())), base.identity()) == []


def test_a_section_that_appears_is_a_difference() -> None:
    base = full()
    without = base.model_copy(update={"judge": None})
    lines = differences(without.identity(), base.identity())
    assert "judge.max_tokens: absent in the run, 8 now" in lines


def test_a_none_that_appears_is_a_difference() -> None:
    assert differences({}, {"reasoner.top_k": None}) == [
        "reasoner.top_k: absent in the run, None now"
    ]


def test_the_text_of_the_prompts_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    base = full()
    before = base.fingerprint
    monkeypatch.setattr(config, "version", lambda profile: "other")
    assert base.fingerprint != before
    assert base.identity()["prompts.version"] == "other"


def test_the_prompt_profile_decides_the_version() -> None:
    assert prompts.version("full") != prompts.version("compact")


@pytest.mark.parametrize(
    ("setting", "key", "hint"),
    [
        ("budgets.cals=3", "budgets.cals", "calls"),
        ("reasoner.endpoint.modell=3", "reasoner.endpoint.modell", "model"),
        ("sed=1", "sed", "seed"),
        ("judge.endpoint.modle='x'", "judge.endpoint.modle", "model"),
    ],
)
def test_an_unknown_key_is_named_with_its_neighbour(setting: str, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(base_url=URL, settings=[setting])
    assert f"{key}: unknown key; did you mean {hint!r}?" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("budgets.calls=-1", "budgets.calls"),
        ("budgets.calls=many", "budgets.calls"),
        ("reasoner=3", "reasoner"),
        ("reasoner.endpoint='http://x/v1'", "reasoner.endpoint"),
        ("reasoner.temperature=nan", "reasoner.temperature"),
        ("tool.timeout=inf", "tool.timeout"),
        ("tool.minimum_tier='Z'", "tool.minimum_tier"),
        ("tool.minimum_tier='remote'", "tool.minimum_tier"),
        ("extractor.chat_template_kwargs.x=nan", "extractor.chat_template_kwargs.x"),
        ("reasoner.cut_at=['']", "reasoner.cut_at.0"),
        ("verifier.required=['format']", "verifier.required"),
        ("verifier.required=['executed','judge']", "verifier.required"),
        ("verifier.required=['executed','taste']", "verifier.required.1"),
        ("reasoner.endpoint.base_url='ftp://x'", "reasoner.endpoint.base_url"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(setting: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^    {key}\b") as caught:
        load(base_url=URL, settings=[setting])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("setting", ["budgets.calls", "=3", ""])
def test_a_setting_that_is_no_assignment_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load(base_url=URL, settings=[setting])


def test_a_missing_address_is_named() -> None:
    with pytest.raises(ConfigError, match=r"reasoner\.endpoint\.base_url"):
        load("nano")


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        load("papr")


@pytest.mark.parametrize(
    "content", [b"reasoner = ", b"\xff\xfe", b"reasoner = 3", b"[reasoner]\nendpoint = 'x'"]
)
def test_a_bad_file_is_a_config_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    """Also a scalar where a table belongs, which must not end in an AttributeError."""
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file=file, base_url=URL)
    assert str(file) in str(caught.value)
    with pytest.raises(ConfigError):
        load(file=tmp_path / "absent.toml", base_url=URL)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_override_of_nothing_changes_nothing(preset: str) -> None:
    """Fields that are None stay None: a default must not come back."""
    base = load(
        preset, base_url="http://127.0.0.1:1/v1", settings=["extractor.response_format=text"]
    )
    base = base.model_copy(update={"reasoner": base.reasoner.model_copy(update={"top_k": None})})
    assert override(base) == base
    moved = override(base, base_url="http://127.0.0.1:2/v1", settings=["in_flight=3"])
    assert moved.fingerprint == base.fingerprint
    assert moved.extractor.endpoint.base_url == "http://127.0.0.1:2/v1"
    assert override(base, settings=["budgets.calls=9"]).fingerprint != base.fingerprint


def test_what_is_said_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 1\n[reasoner.endpoint]\nmodel = "file"\n[budgets]\nsteps = 3\n')
    loaded = load(
        file=file,
        base_url=URL,
        model="flag",
        settings=["seed=2", "reasoner.endpoint.model=setting", "extractor.endpoint.timeout=1"],
    )
    assert loaded.seed == 2
    assert loaded.reasoner.endpoint.model == "setting"
    assert loaded.extractor.endpoint.model == "flag"
    assert loaded.budgets.steps == 3
    assert loaded.budgets.tokens == 600, "the preset holds where nothing else speaks"
    assert loaded.extractor.endpoint.timeout == 1


def test_defaults_are_valid_themselves() -> None:
    """pydantic does not validate defaults: a default that no user could set would slip through."""
    base = full()
    assert parse(base.model_dump(mode="json"), "test") == base
    assert base.tool.minimum_tier is Tier.B
    assert base.verifier.required[0] is Check.EXECUTED


def test_no_preset_is_forgotten_and_a_models_opinion_is_opt_in() -> None:
    folder = Path(config.__file__).parent / "presets"
    assert {f.stem for f in folder.glob("*.toml")} == set(PRESETS)
    assert all("judge" not in tomllib.loads(f.read_text()) for f in folder.glob("*.toml"))
