"""Seeds: every draw of a run is a function of what is drawn, never of when or by whom."""

from __future__ import annotations

import hashlib


def derive(*parts: str | int) -> int:
    """A seed below 2^31 from (run seed, problem, sample) or (trajectory seed, step, role, try)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def tool(trajectory_seed: int, step: int) -> int:
    """The seed of step's tool call, the same for each try: the verifier must get the same run."""
    return derive(trajectory_seed, step, "tool")
