"""The warm interpreter that runs are forked from. Started by `pool.py`, never imported by it.

Contract:
- It is exec'ed with a clean environment and no descriptors but its control socket and a pidfd of
  the process that owns it. It never runs model code itself, so it never hangs and is never lost.
- A request is one packet: JSON plus descriptors [code, stdout, stderr, facts, status]. The answers
  go to that request's own status socket: {"started"} with a pidfd, then {"status", rusage}.
- When its owner dies or closes the control socket it kills every child and exits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import random
import resource
import select
import signal
import site
import socket
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.sandbox import child, confine, namespaces
from shared.sandbox.packets import SIZE, receive, send
from shared.sandbox.result import Tier

_ADDR_NO_RANDOMIZE = 0x0040000


@dataclass(frozen=True)
class Jail:
    """What every child of this zygote is confined by."""

    tier: Tier
    readable: tuple[str, ...]
    scratch: Path
    memory: int  # RLIMIT_AS of a child
    file_size: int
    open_files: int

    def enter(self, directory: Path, cpu: int, *, forks: bool) -> int | None:
        """Confine the calling process for good. Returns the fork listener, if `forks`."""
        os.chdir(directory)
        confine.limit(self.memory, self.file_size, self.open_files, cpu)
        if self.tier is Tier.D:
            return None
        confine.isolate()
        if self.tier in (Tier.A, Tier.B):
            confine.landlock((*self.readable, "/dev/null"), (str(directory), "/dev/null"))
        return confine.seccomp(forks)


def main() -> None:
    _fix_addresses()
    control = socket.socket(fileno=int(sys.argv[1]))
    owner = int(sys.argv[2])
    config: Mapping[str, Any] = json.loads(control.recv(SIZE))
    try:
        zygote = Zygote(control, owner, config)
    except Exception as error:  # noqa: BLE001  whatever it was, it is reported, and this tier is out
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"[:2000]}).encode())
        return
    try:
        zygote.serve()
    finally:
        zygote.close()


class Zygote:
    def __init__(self, control: socket.socket, owner: int, config: Mapping[str, Any]) -> None:
        self.control, self.owner = control, owner
        self.children: dict[int, tuple[int, socket.socket, Path]] = {}  # pidfd -> pid, status, dir
        tier, limits = Tier(config["tier"]), config["limits"]
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("800")
        sys.path[:] = [*map(os.path.realpath, sys.path[1:]), *config["search"]]  # not PYTHONPATH
        os.environ.pop("PYTHONPATH")
        readable = namespaces.interpreter_paths(config["search"])
        if tier is Tier.A:
            scratch = Path("/tmp/sandbox")  # in a mount namespace of its own
            namespaces.enter(readable, str(scratch), limits["scratch"], limits["scratch_files"])
        else:
            scratch = Path(tempfile.mkdtemp(prefix="tirgen-sandbox-"))
        self.scratch = scratch
        confine.drop_capabilities()
        confine.adopt_orphans()
        _warm(config["preload"], config["warmup"])
        self.jail = Jail(
            tier=tier,
            readable=tuple(readable),
            scratch=scratch,
            memory=_address_space() + limits["memory"],
            file_size=limits["file_size"],
            open_files=limits["open_files"],
        )
        if tier is not Tier.D:
            self._self_check()
        gc.collect()
        gc.freeze()
        control.send(json.dumps({"ready": tier, "scratch": str(scratch)}).encode())

    def serve(self) -> None:
        """Until the owner is gone or closes the control socket."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.owner, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self.owner:
                    return
                if fd == self.control.fileno():
                    packet = receive(self.control)
                    if not packet.fds:
                        return
                    started = self._start(packet.json(), packet.fds)
                    if started is not None:
                        poll.register(started, select.POLLIN)
                elif fd in self.children:
                    poll.unregister(fd)
                    self._finish(fd)

    def _start(self, request: Mapping[str, Any], fds: list[int]) -> int | None:
        """Fork a run; returns its pidfd, or None where no process could be made."""
        *given, status_fd = fds
        status = socket.socket(fileno=status_fd)
        taken = {directory.name for _, _, directory in self.children.values()}
        name = next(n for n in map(str, range(len(taken) + 1)) if n not in taken)
        directory = self.jail.scratch / name
        try:
            directory.mkdir(mode=0o700)
            pid = os.fork()
        except OSError as error:
            status.send(json.dumps({"failed": str(error)}).encode())
            status.close()
            for fd in given:
                os.close(fd)
            return None
        if pid == 0:
            child.main(self.jail, request, directory, given)
        for fd in given:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = (pid, status, directory)
        with contextlib.suppress(OSError):  # the caller may have given up already
            send(status, {"started": pid}, [pidfd])
        return pidfd

    def _finish(self, pidfd: int) -> None:
        pid, status, directory = self.children.pop(pidfd)
        _, code, usage = os.wait4(pid, 0)
        os.close(pidfd)
        if not self.children:
            self._kill_strays()
        remove_tree(directory)
        facts = {
            "status": code,
            "cpu": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss * 1024,
        }
        with contextlib.suppress(OSError):
            send(status, facts)
        status.close()

    def _kill_strays(self) -> None:
        """Processes that a session left behind: they are this zygote's children by adoption."""
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            with contextlib.suppress(OSError):
                listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
                for pid in listed.split():
                    os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0):
                pass

    def _self_check(self) -> None:
        """A tier is what is seen to hold: a confined child tries what it must not be able to do.

        Raises RuntimeError naming what was possible.
        """
        directory = self.jail.scratch / "check"
        directory.mkdir(mode=0o700)
        pid = os.fork()
        if pid == 0:
            os._exit(child.try_forbidden(self.jail, directory))
        _, status = os.waitpid(pid, 0)
        remove_tree(directory)
        broken = os.waitstatus_to_exitcode(status)
        if broken:
            raise RuntimeError(f"confinement does not hold: {child.FORBIDDEN.get(broken, broken)}")

    def close(self) -> None:
        for pid, _, _ in self.children.values():
            os.kill(pid, signal.SIGKILL)
        for pidfd in list(self.children):
            self._finish(pidfd)
        remove_tree(self.scratch)


def _fix_addresses() -> None:
    """Start again without address randomisation, where that is allowed: what depends on the order
    of addresses (the repr of an object, a set of objects) is then the same in every zygote."""
    persona = confine.libc.personality(0xFFFFFFFF)
    if not persona & _ADDR_NO_RANDOMIZE and confine.libc.personality(
        persona | _ADDR_NO_RANDOMIZE
    ) not in (-1, persona | _ADDR_NO_RANDOMIZE):
        os.execv(sys.executable, sys.orig_argv)


def _warm(modules: list[str], source: str) -> None:
    """Import, then compute once: the first sympy operation costs ten times the second."""
    for name in modules:
        importlib.import_module(name)
    site.setquit()  # `exit` and `quit`, which -S leaves out
    scope = types.ModuleType("warmup")
    exec(compile(source, "<warmup>", "exec"), scope.__dict__)  # noqa: S102  our own text
    random.seed(0)


def _address_space() -> int:
    """Bytes of address space now in use, found without /proc: where a limit begins to bite."""
    low, high = 0, 1 << 40
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    while high - low > 1 << 22:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, 1 << 16).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return high


def remove_tree(top: Path) -> None:
    """Remove a directory that hostile code has filled, however deep, whatever its modes."""
    flattened = 0
    pending = True
    while pending:
        pending = False
        top.chmod(0o700)
        with os.scandir(top) as entries:
            listed = list(entries)
        for entry in listed:
            if not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink()
                continue
            Path(entry.path).chmod(0o700)
            with os.scandir(entry.path) as inner:
                for item in list(inner):
                    if item.is_dir(follow_symlinks=False):
                        Path(item.path).rename(top / f".flat{flattened}")
                        flattened, pending = flattened + 1, True
                    else:
                        Path(item.path).unlink()
            Path(entry.path).rmdir()
    top.rmdir()


if __name__ == "__main__":
    main()
