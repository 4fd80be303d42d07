"""The long chaos run: 100 faults over 5000 items on every broker that is installed.

    python -m tests.acceptance.chaos.suite [--out FILE] [OPTIONS OF driver.py]

Appends one JSON line a broker to FILE. Exit code 1 where anything was violated, or did not run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.acceptance.chaos.brokers import PORTS, Broker

BROKERS = ("pgmq", *PORTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/chaos.jsonl"))
    asked, others = parser.parse_known_args()
    failed = 0
    for name in BROKERS:
        if not Broker.installed(name):
            print(f"{name}: not installed, not run", file=sys.stderr)
            failed += 1
            continue
        command = [sys.executable, "-m", "tests.acceptance.chaos.driver", "--broker", name, *others]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            last = ""
            for last in driver.stdout:
                print(last, end="", flush=True)
        if '"violations"' in last:
            with asked.out.open("a") as out:
                out.write(last)
        failed += driver.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
