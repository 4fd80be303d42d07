"""Hypothesis for the trainer's tests: the same examples each run, and no limit that reads a clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

fuzz = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
