"""Typed configuration from files and `key=value` settings, in which a wrong key is named.

A configuration is a frozen pydantic model; a part of it may be a frozen dataclass. It is read in
layers (a preset, a file, settings), each over the one before, and checked as a whole before any
work starts.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError
from shared.optional import require

M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def parse(kind: type[M], values: Mapping[str, Any], where: str, remedy: str) -> M:
    """Validate; every wrong key is named, an unknown one with its nearest neighbour.

    Raises ConfigError.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, e["type"], e["loc"], e["msg"]) for e in error.errors()]
        raise ConfigError(
            "The configuration is not valid:\n    " + "\n    ".join(lines),
            where=where,
            remedy=remedy,
        ) from error


def read_toml(text: str, where: str) -> dict[str, Any]:
    """Raises ConfigError for what is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"Not valid TOML: {error}", where=where) from error


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Raises ConfigError for what is not YAML, or no mapping."""
    yaml = require("yaml", need="a YAML file", install="pyyaml")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Not valid YAML: {error}", where=where) from error
    if not isinstance(values, dict):
        raise ConfigError("A configuration is a mapping of keys to values.", where=where)
    return values


def read_file(path: Path) -> dict[str, Any]:
    """A TOML or, by its ending, YAML file. Raises ConfigError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the config file: {error}", where=str(path)) from error
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    return (read_yaml if is_yaml else read_toml)(text, str(path))


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put `over` over `base`, section by section."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def merge_settings(values: dict[str, Any], settings: Iterable[str]) -> None:
    """Put `key=value` settings over `values`; a value is TOML, and a bare word is a string.

    Raises ConfigError for what is not of that form.
    """
    for setting in settings:
        key, sep, value = setting.partition("=")
        if not sep or not key:
            raise ConfigError(f"{setting!r} is not key=value.", where="--set")
        merge(values, _nested(key.split("."), _value(value)))


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, JSON value) of every field that is not itself a section; a dict field is one value."""
    plain = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", plain[name]


def choose(name: str, among: Iterable[str], what: str, where: str) -> None:
    """Raise ConfigError, with the nearest neighbour, unless `name` is one of them."""
    known = list(among)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        f"There is no {what} {name!r}.",
        where=where,
        remedy=f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}",
    )


def _explain(kind: type[BaseModel], error: str, loc: tuple[str | int, ...], message: str) -> str:
    path = ".".join(map(str, loc))
    if error not in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, a dataclass
        return f"{path}: {message}"
    model: Any = kind
    for part in loc[:-1]:
        model = _section(_fields(model)[str(part)])
    near = difflib.get_close_matches(str(loc[-1]), list(_fields(model)), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{path}: unknown key{hint}"


def _fields(section: Any) -> dict[str, Any]:
    """Name -> annotation."""
    if is_dataclass(section):
        return dict(get_type_hints(section))
    return {name: field.annotation for name, field in section.model_fields.items()}


def _section(annotation: Any) -> Any:
    """The section's class inside `X` or `X | None`."""
    options = getattr(annotation, "__args__", (annotation,))
    return next(o for o in options if is_dataclass(o) or hasattr(o, "model_fields"))


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nested(path[1:], value)}
