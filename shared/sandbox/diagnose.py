"""Why this host does not reach a tier, and what to do about it: `tirgen doctor`.

A tier is tried, never guessed: a bare zygote is started at it, and its own check must hold. Only
the explanation of a failure is read from the host's settings.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.sandbox import confine
from shared.sandbox.pool import Sandbox
from shared.sandbox.result import Tier
from shared.sandbox.watch import LostError

NEEDS = {
    Tier.A: "own namespaces, Landlock and seccomp",
    Tier.B: "Landlock and seccomp",
    Tier.C: "seccomp",
}
_MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True, slots=True)
class Finding:
    """One tier on this host. `reason` is what the attempt said; empty where the tier holds."""

    tier: Tier
    reason: str = ""
    remedies: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.reason


def probe(minimum: Tier) -> Tier:
    """The tier of a sandbox opened here. Raises SandboxError below `minimum`."""
    with _bare(minimum) as sandbox:
        assert sandbox.tier is not None
        return sandbox.tier


def diagnose(root: Path = Path("/")) -> list[Finding]:
    """A, B and C, each by an attempt; settings are read below `root`."""
    return [_finding(tier, root) for tier in NEEDS]


def _bare(minimum: Tier) -> Sandbox:
    return Sandbox(zygotes=1, minimum_tier=minimum, preload=(), warmup="")


def _finding(tier: Tier, root: Path) -> Finding:
    try:
        _bare(tier)._launch(tier).close()
    except LostError as error:
        return Finding(tier, str(error), tuple(remedies(tier, root, str(error))))
    return Finding(tier)


def remedies(
    tier: Tier, root: Path, reason: str = "", landlock: int | None = None
) -> Iterator[str]:
    """What stands in the way of a tier that was tried in vain, one remedy each."""
    entered = "confinement" in reason  # the namespaces were made, and what came after failed
    found = False
    for remedy in (
        *(_namespaces(root) if tier is Tier.A and not entered else ()),
        *(_landlock(root, landlock_error() if landlock is None else landlock)
          if tier is not Tier.C else ()),
        *_seccomp(root),
    ):  # fmt: skip
        found = True
        yield remedy
    if not found:
        yield (
            "no setting known to forbid it was found: a security module or a seccomp filter around "
            "this process may; ask whoever runs the host or the container"
        )


def landlock_error() -> int:
    """0 where the kernel offers Landlock; else the errno with which it declines."""
    asked = confine.libc.syscall(444, None, ctypes.c_size_t(0), 1)
    return 0 if asked > 0 else ctypes.get_errno() or errno.ENOSYS


def _namespaces(root: Path) -> Iterator[str]:
    if _read(root, "proc/sys/user/max_user_namespaces") == "0":
        yield "user.max_user_namespaces is 0: sysctl -w user.max_user_namespaces=15000"
    if _read(root, "proc/sys/kernel/unprivileged_userns_clone") == "0":
        yield (
            "kernel.unprivileged_userns_clone is 0 (Debian): "
            "sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if _read(root, "proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        yield (
            "kernel.apparmor_restrict_unprivileged_userns is 1 (Ubuntu 23.10 and later): "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give this Python an "
            "AppArmor profile with the rule `userns,`"
        )
    if _in_container(root):
        yield (
            "in a container the default seccomp and AppArmor profiles forbid unshare and mount: "
            "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined, as "
            "docker-compose.yml does; on Kubernetes seccompProfile and appArmorProfile of type "
            "Unconfined"
        )


def _landlock(root: Path, error: int) -> Iterator[str]:
    kernel = _read(root, "proc/sys/kernel/osrelease") or os.uname().release
    if error == errno.ENOSYS:
        yield f"kernel {kernel} has no Landlock: 5.13 or later, with CONFIG_SECURITY_LANDLOCK"
    elif error == errno.EOPNOTSUPP:
        active = _read(root, "sys/kernel/security/lsm") or "unknown"
        yield (
            f"Landlock was not switched on at boot: add it to the kernel's command line, "
            f"lsm=landlock,{active}"
        )
    elif error == errno.EPERM:
        yield (
            "a seccomp profile forbids Landlock: use Docker 23 (moby) or later, whose default "
            "profile allows it, or seccomp=unconfined"
        )


def _seccomp(root: Path) -> Iterator[str]:
    if os.uname().machine not in _MACHINES:
        yield (
            f"there is no table of system calls for {os.uname().machine}: run on "
            f"{' or '.join(_MACHINES)}"
        )
    actions = _read(root, "proc/sys/kernel/seccomp/actions_avail")
    if actions is None:
        yield "the kernel has no seccomp filters: CONFIG_SECCOMP_FILTER"
    elif "user_notif" not in actions.split():
        yield "seccomp has no user_notif, which sessions need: kernel 5.0 or later"


def _in_container(root: Path) -> bool:
    """Some filter is around us already, and the place looks like a container."""
    status = _read(root, "proc/self/status") or ""
    marks = (".dockerenv", "run/.containerenv", "var/run/secrets/kubernetes.io")
    return "Seccomp:\t2" in status and any((root / mark).exists() for mark in marks)


def _read(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None
