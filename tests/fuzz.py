"""Hypothesis for the trainer's tests: the same examples every run, and no look at a clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

fuzz = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
