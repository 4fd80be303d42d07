"""A short run through faults, on the default broker; `make chaos` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.chaos.driver import NAMESPACES

ROOT = Path(__file__).parents[3]
# The others are for `make chaos`: a poisoned item needs ten lives, the rest is in test_celery.py.
KINDS = ("family", "endpoint", "database", "stop", "partition", "disk", "doubled", "lost")


def namespaces_are_allowed() -> bool:
    asked = [*NAMESPACES.split(), "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(asked, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not namespaces_are_allowed(), reason="user, network and mount namespaces are forbidden here"
)


@needs_namespaces
@pytest.mark.timeout(300)  # half a minute where two cores are free
def test_faults_of_eight_kinds_lose_and_double_nothing() -> None:
    command = [sys.executable, "-m", "tests.acceptance.chaos.driver", "--items", "100"]
    options = ["--faults", str(len(KINDS)), "--kinds", ",".join(KINDS), "--seconds", "240"]
    done = subprocess.run([*command, *options, "--small"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["violations"] == [], done.stdout + done.stderr
    assert done.returncode == 0
    assert summary["kinds"] == dict.fromkeys(KINDS, 1)
    assert (summary["lost"], summary["doubled"]) == (0, 0)
    assert summary["done_again"] > 0, "control: the faults hit something"
