"""Seeds of the service: those of `shared.seeds`, which rollouts and evaluation draw from too."""

from shared.seeds import derive, tool

__all__ = ["derive", "tool"]
