"""Hostile programs at every tier, as whoever runs the tests and as an ordinary user.

The table, with what must come of each, is shared/sandbox/attacks.py. The control at the end runs
attacks without a wall, where they get through.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from shared.sandbox import Outcome, Sandbox, Tier, launcher, pool
from shared.sandbox.attacks import ATTACKS, LIMITS, Expect, unexpected
from tests.sandboxes import bare, eventually, processes

SECRET = "PLANTED_SECRET"  # "seen: the caller's environment" looks for it
JAIL = {"preload": ("numpy",), "limits": LIMITS}


@pytest.mark.parametrize("tier", [Tier.A, Tier.B, Tier.C])
def test_every_attack_comes_to_what_it_must_and_leaves_nothing(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On one zygote, which outlives them all; no process and no file is left."""
    monkeypatch.setattr(pool, "TIERS", (tier,))
    monkeypatch.setenv(SECRET, "gold answer")
    monkeypatch.setitem(launcher.ENVIRONMENT, "TMPDIR", str(tmp_path))
    with bare(minimum_tier=tier, **JAIL) as sandbox:
        zygotes = set(sandbox._all)
        alone = len(processes(sandbox))  # the child that waits for the next run is always another
        found = {attack.name: unexpected(sandbox, attack) for attack in ATTACKS}
        assert {name: what for name, what in found.items() if what is not None} == {}
        eventually(lambda: len(processes(sandbox)) == alone)
        assert zygotes == sandbox._all
        assert sandbox.run("print(1)").stdout == "1\n"
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_what_it_claims() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 150
    assert {attack.expected(tier) for attack in ATTACKS for tier in Tier} == set(Expect)


@pytest.mark.parametrize("tier", [Tier.A, Tier.B])
def test_what_is_stopped_in_a_run_is_stopped_in_a_cell_and_the_state_survives(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "TIERS", (tier,))
    with bare(minimum_tier=tier, **JAIL) as sandbox:
        alone = set(processes(sandbox))
        with sandbox.session() as cells:
            cells.run("kept = 5")
            for attack in ATTACKS:
                if attack.expected(tier) is Expect.STOPPED and not attack.before:
                    result = cells.run(f"{attack.code}\nprint('out')", timeout=attack.timeout)
                    assert result.outcome is Outcome.MODEL_ERROR, (attack.name, result)
                    assert "out" not in result.stdout, (attack.name, result)
                    assert result.error is not None
                    assert result.error.type != "SessionBroken", (attack.name, result)
            assert cells.run("print(kept)").stdout == "5\n"
            assert cells.depth == 2
        eventually(lambda: set(processes(sandbox)) == alone)


# ---- as an ordinary user, on hosts that forbid something -----------------------------------------

ORDINARY = """
import ctypes, os, struct, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
refused = [int(number) for number in sys.argv[1].split(",") if number]

def readable_by_all(path):
    return all(p.stat().st_mode & 0o005 == 0o005 for p in [path, *path.parents] if p.is_dir())

if os.getuid() == 0:
    places = [Path(p).resolve() for p in (sys.executable, sys.base_prefix, *sys.path) if p]
    if all(readable_by_all(p.parent if p.is_file() else p) for p in places if p.exists()):
        os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    else:  # a checkout in root's own home: root's files, but none of root's powers
        assert libc.unshare(0x10000000) == 0
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text("1000 0 1")
        Path("/proc/self/gid_map").write_text("1000 0 1")
        assert libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)) == 0
assert os.getuid() != 0

# As a kernel or a container's profile does it: these calls do not work, for us or our children.
if refused:
    from shared.sandbox import confine
    tests = [(0x15, len(refused) - 1 - i, 0, n) for i, n in enumerate(refused)]
    tests[-1] = (0x15, 0, 1, refused[-1])
    libc.prctl(38, 1, 0, 0, 0)
    program = [(0x20, 0, 0, 0), *tests, confine._ret(0x50000 | 38), confine._ret(0x7FFF0000)]
    confine._install(confine._assemble(program), 0)

from shared.sandbox import Sandbox, Tier
from shared.sandbox.attacks import ATTACKS, LIMITS, unexpected
with Sandbox(zygotes=1, preload=("numpy",), warmup="", limits=LIMITS,
             minimum_tier=Tier(sys.argv[2])) as sandbox:
    print(sandbox.tier)
    for attack in ATTACKS[:: int(sys.argv[3])]:
        found = unexpected(sandbox, attack)
        if found is not None:
            print(attack.name, found)
    with sandbox.session() as cells:
        cells.run("x = 1")
        cells.run("x = 2; 1 / 0")
        print(cells.run("print(x)").stdout, len(sandbox._all))
"""
LANDLOCK = "444,445,446"
UNSHARE = "272" if platform.machine() == "x86_64" else "97"


@pytest.mark.parametrize(
    ("refused", "tier", "every"),
    [("", Tier.A, 2), (UNSHARE, Tier.B, 4), (f"{UNSHARE},{LANDLOCK}", Tier.C, 4)],
    ids=["all", "no user namespaces", "no user namespaces and no Landlock"],
)
def test_the_same_as_an_ordinary_user_where_the_host_forbids_something(
    refused: str, tier: Tier, every: int
) -> None:
    """The sandbox finds the tier itself; it is told only which is the least that will do."""
    command = [sys.executable, "-c", ORDINARY, refused, tier, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tier}\n1\n 1\n"


def test_control_without_a_wall_the_same_programs_get_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier D: the attacks themselves work, so it is the wall that stops them above."""
    monkeypatch.setattr(pool, "TIERS", (Tier.D,))
    names = {
        "read: a host file", "read: the root directory", "network: TCP",
        "network: a pair of sockets",
        "process: fork", "process: subprocess", "process: execve", "process: new group",
        "write: modes", "write: a symbolic link", "kernel: memory files", "kernel: watch files",
        "process: a thousand short threads", "write: a lock on a host file",
    }  # fmt: skip
    with Sandbox(zygotes=1, preload=(), warmup="", minimum_tier=Tier.D) as open_field:
        for attack in ATTACKS:
            if attack.name in names:
                names.discard(attack.name)
                result = open_field.run(f"{attack.code}\nprint('out')")
                assert "out" in result.stdout, (attack.name, result)
    assert names == set()
