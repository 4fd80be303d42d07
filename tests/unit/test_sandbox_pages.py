"""What a fork of the warm interpreter has to copy gets less, or pages.py is of no use."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json
from pathlib import Path
import numpy
import numpy.linalg, numpy.random
from shared.sandbox import pages

def mappings():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len(lines), sum(" r--p " in line and ".so" in line for line in lines)

before = mappings()
pages.join()
after = mappings()
print(json.dumps([before, after, float(numpy.linalg.eigvals(numpy.eye(3) * 2)[0])]))
"""


def test_a_library_is_two_mappings_and_still_works() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout
    (before, read_only), (after, left), value = json.loads(said)
    assert read_only > 50, "control: there is something to join"
    assert left < 0.1 * read_only
    assert after < 0.6 * before
    assert value == 2.0
