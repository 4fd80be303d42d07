"""The data-generation service. `Client` is its Python face; it is imported when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tirgen.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    if name == "Client":
        from tirgen.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
