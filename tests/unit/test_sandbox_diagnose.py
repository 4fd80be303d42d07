"""`tirgen doctor` on hosts that lack something: which tier, why not a better one, what to do."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shared.errors import SandboxError
from shared.sandbox import Tier, diagnose, pool
from shared.sandbox.diagnose import Finding, probe, remedies
from tirgen.cli import stack

pytestmark = pytest.mark.timeout(240)  # a few seconds each, and more on a busy machine

NO_NAMESPACES = """
import ctypes, os
from pathlib import Path
uid = os.getuid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
Path("/proc/sys/user/max_user_namespaces").write_text("0")  # of this namespace alone
"""
NO_LANDLOCK = """
import ctypes, struct
libc = ctypes.CDLL(None)
code = b"".join(struct.pack("=HBBI", *i) for i in (
    (0x20, 0, 0, 0), (0x35, 0, 2, 444), (0x25, 1, 0, 446), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)
))  # system calls 444 to 446 fail with ENOSYS, as in a kernel that has never heard of them
buffer = ctypes.create_string_buffer(code, len(code))
program = struct.pack("@HP", 5, ctypes.addressof(buffer))
assert libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0
assert libc.prctl(22, ctypes.c_ulong(2), program, 0, 0) == 0
"""
LOOK = """
import json
from dataclasses import asdict
from shared.errors import SandboxError
from shared.sandbox.diagnose import diagnose
from tirgen.cli import stack
try: said = stack._sandbox()
except SandboxError as error: said = f"error: {error}"
print(json.dumps({"findings": [asdict(f) for f in diagnose()], "doctor": said}))
"""


def look(simulation: str) -> tuple[dict[str, Any], str]:
    """Findings by tier and the doctor's text, from a process on such a host."""
    done = subprocess.run(
        [sys.executable, "-c", simulation + LOOK], capture_output=True, text=True, check=True
    )
    body = json.loads(done.stdout)
    return {finding["tier"]: finding for finding in body["findings"]}, body["doctor"]


def test_this_host_reaches_tier_a_and_nothing_is_missing() -> None:
    """Control of the two simulations below."""
    assert diagnose.diagnose() == [Finding(Tier.A), Finding(Tier.B), Finding(Tier.C)]
    assert probe(Tier.B) is Tier.A
    said = stack._sandbox()
    assert said.startswith("tier A (own namespaces, Landlock and seccomp), minimum B")
    assert "\n" not in said


def test_without_user_namespaces_it_is_tier_b_and_the_sysctl_is_named() -> None:
    found, doctor = look(NO_NAMESPACES)
    assert "unshare" in found["A"]["reason"]
    assert "sysctl -w user.max_user_namespaces" in found["A"]["remedies"][0]
    assert found["B"]["reason"] == found["C"]["reason"] == ""
    assert doctor.startswith("tier B (Landlock and seccomp), minimum B")
    assert "sysctl -w user.max_user_namespaces" in doctor


def test_without_landlock_the_default_minimum_is_not_reached_and_the_kernel_is_named() -> None:
    found, doctor = look(NO_LANDLOCK)
    for tier in ("A", "B"):
        assert found[tier]["reason"]
        assert "has no Landlock: 5.13 or later" in found[tier]["remedies"][0]
    assert found["C"]["reason"] == ""
    assert doctor.startswith("error: No tier of B")
    assert "5.13 or later" in doctor


def test_a_run_below_its_minimum_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "TIERS", (Tier.C,))
    assert probe(Tier.C) is Tier.C
    with pytest.raises(SandboxError, match="No sandbox of tier B or stronger"):
        probe(Tier.B)


FILTERED = {"proc/self/status": "Name:\tpython\nSeccomp:\t2\n"}
FILTERS = {"proc/sys/kernel/seccomp/actions_avail": "kill_thread errno user_notif allow"}


@pytest.mark.parametrize(
    ("tier", "host", "landlock", "says"),
    [
        (Tier.A, {"proc/sys/user/max_user_namespaces": "0\n"}, 0, "user.max_user_namespaces=15000"),
        (Tier.A, {"proc/sys/kernel/unprivileged_userns_clone": "0\n"}, 0,
         "sysctl -w kernel.unprivileged_userns_clone=1"),
        (Tier.A, {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"}, 0,
         "kernel.apparmor_restrict_unprivileged_userns=0"),
        (Tier.A, {**FILTERED, ".dockerenv": ""}, 0, "seccomp=unconfined"),
        (Tier.A, {**FILTERED, "run/.containerenv": ""}, 0, "apparmor=unconfined"),
        (Tier.A, FILTERED, 0, "no setting known to forbid it"),
        (Tier.A, {}, 0, "no setting known to forbid it"),
        (Tier.A, {}, errno.ENOSYS, "5.13 or later"),
        (Tier.B, {"proc/sys/kernel/osrelease": "5.10.0-28\n"}, errno.ENOSYS, "kernel 5.10.0-28"),
        (Tier.B, {"sys/kernel/security/lsm": "capability,yama,apparmor\n"}, errno.EOPNOTSUPP,
         "lsm=landlock,capability,yama,apparmor"),
        (Tier.B, {}, errno.EPERM, "a seccomp profile forbids Landlock"),
        (Tier.B, {"proc/sys/user/max_user_namespaces": "0\n"}, 0, "no setting known"),
        (Tier.C, {"proc/sys/kernel/seccomp/actions_avail": "kill errno"}, errno.ENOSYS,
         "user_notif"),
    ],
)  # fmt: skip
def test_every_known_obstacle_has_its_remedy(
    tmp_path: Path, tier: Tier, host: Mapping[str, str], landlock: int, says: str
) -> None:
    """And only that: a remedy for what is not in the way would send people astray."""
    for name, text in {**FILTERS, **host}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    [remedy] = remedies(tier, tmp_path, "unshare", landlock)
    assert says in remedy


def test_a_kernel_without_filters_is_named(tmp_path: Path) -> None:
    assert list(remedies(Tier.C, tmp_path)) == [
        "the kernel has no seccomp filters: CONFIG_SECCOMP_FILTER"
    ]
