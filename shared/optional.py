"""Libraries that only some people need, imported when first used."""

from __future__ import annotations

import importlib
from types import ModuleType

from shared.errors import ConfigError


def require(module: str, *, need: str, install: str) -> ModuleType:
    """Import `module`. Raises ConfigError: who needs it (`need`), what to `install`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{need} needs the Python package {module.partition('.')[0]!r}",
            where=str(error),
            remedy=f"pip install '{install}'",
        ) from error
