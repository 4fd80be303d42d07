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


READERS = """
import json
import os
from shared.sandbox import pages

values = [float(i) for i in range(100_000)]

def copied():
    pid = os.fork()
    if pid == 0:
        for value in values:
            pass
        os._exit(0)
    return os.wait4(pid, 0)[2].ru_minflt

before = copied()
pages.immortalize()
print(json.dumps([before, copied(), sum(values)]))
"""


def test_who_looks_at_an_immortal_object_copies_no_page() -> None:
    """Where the interpreter knows of such objects; where not, nothing changes."""
    said = subprocess.run([sys.executable, "-c", READERS], capture_output=True, check=True).stdout
    before, after, total = json.loads(said)
    assert before > 500, "control: 100,000 numbers lie in 600 pages, and each is written to"
    assert (after < before / 3) == (sys.version_info >= (3, 12))
    assert total == sum(range(100_000))
