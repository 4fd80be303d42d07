"""The warm interpreter that runs are forked from. Started by `launcher.py`, never imported by it.

Contract:
- It is exec'ed with a clean environment and no descriptors but its control socket and a pidfd of
  the process that owns it. It never runs model code itself, so it never hangs and is never lost.
- A request on the control socket is one packet: JSON plus descriptors. A run has [code, stdout,
  stderr, facts, status] and its answers go to its own status socket: {"started"} with a pidfd, then
  {"status", usage}. A session has [channel], on which its cells are asked for (hosted.py).
- Every process of the jail is its child, and is known by a pidfd until it is reaped here.
- When its owner dies or closes the control socket it kills every child and exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import resource
import select
import signal
import site
import socket
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.sandbox import child, confine, fixed, namespaces
from shared.sandbox.children import Child, ended_facts, peak
from shared.sandbox.hosted import HostedSession
from shared.sandbox.packets import SIZE, Packet, receive, tell
from shared.sandbox.result import Tier
from shared.sandbox.trees import remove_tree

_ADDR_NO_RANDOMIZE = 0x0040000
_HUGE = 21  # a huge page is 1 << 21 bytes
_DESCRIPTORS = 1 << 16  # that the zygote itself may hold, where the host lets it


@dataclass(frozen=True)
class Jail:
    """What every child of this zygote is confined by."""

    tier: Tier
    zygote: int  # its pid, as its children see it
    readable: tuple[str, ...]
    scratch: Path | None  # where a run's own directory is made; None: it has none
    memory: int  # RLIMIT_AS of a child
    file_size: int
    open_files: int

    def enter(self, directory: Path | None, cpu: int, *, session: bool) -> None:
        """Confine the calling process for good; `directory` is its own and the only writable."""
        os.chdir(directory or "/")
        confine.limit(self.memory, self.file_size, self.open_files, cpu)
        if self.tier is Tier.D:
            return
        confine.isolate()
        landlocked = self.tier in (Tier.A, Tier.B)
        if landlocked:
            writable = [str(directory)] if directory else []
            confine.landlock((*self.readable, "/dev/null"), (*writable, "/dev/null"))
        minded = landlocked and confine.landlock_abi() >= confine.TRUNCATE_ABI
        confine.seccomp(forks=session, writes=minded or self.tier is Tier.A)


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
        self.children: dict[int, Child] = {}  # by pid
        self.sessions: set[HostedSession] = set()
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self.stopping = self._stale = False
        tier, limits = Tier(config["tier"]), config["limits"]
        self.threads: int = limits["threads"]
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("800")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        sys.path[:] = [*map(os.path.realpath, sys.path[1:]), *config["search"]]  # not PYTHONPATH
        os.environ.pop("PYTHONPATH")
        readable = namespaces.interpreter_paths(config["search"])
        scratch = Path("/tmp/sandbox") if tier is Tier.A else None
        if tier is Tier.A:
            namespaces.enter(readable, str(scratch), limits["scratch"], limits["scratch_files"])
        elif tier is Tier.D:
            scratch = Path(tempfile.mkdtemp(prefix="tirgen-sandbox-"))
        confine.drop_capabilities()
        _warm(config["preload"], config["warmup"])
        fixed.install()
        gc.collect()
        _gather_pages()
        confine.small_pages()
        self.jail = Jail(
            tier=tier,
            zygote=os.getpid(),
            readable=tuple(readable),
            scratch=scratch,
            memory=_address_space() + limits["memory"],
            file_size=limits["file_size"],
            open_files=limits["open_files"],
        )
        if tier is not Tier.D:
            confine.isolate()
            listener = confine.supervise()
            self.watch(listener, lambda: confine.permit(listener, self._decide))
            for session in (False, True):
                self._self_check(session)
        self.watch(owner, self._stop)
        self.watch(control.fileno(), self._request)
        gc.collect()
        gc.freeze()
        shown = str(scratch) if tier is Tier.D else None
        control.send(json.dumps({"ready": tier, "scratch": shown, "memory": peak()}).encode())

    # ---- the loop --------------------------------------------------------------------------------

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        """Before it is closed. Does nothing for what is not watched."""
        if self._handlers.pop(fd, None) is None:
            return
        self._stale = True
        self._poll.unregister(fd)

    def serve(self) -> None:
        """Until the owner is gone or closes the control socket."""
        while not self.stopping:
            self._stale = False
            for fd, _ in self._poll.poll():
                self._handlers[fd]()
                if self._stale:  # a number in the rest of the list may mean another file by now
                    break

    def _stop(self) -> None:
        self.stopping = True

    def _request(self) -> None:
        packet = receive(self.control)
        if not packet.fds:
            self.stopping = True
        elif packet.json().get("session"):
            HostedSession(self, packet)
        else:
            self._run(packet)

    def close(self) -> None:
        for process in list(self.children.values()):
            process.signal(signal.SIGKILL)
        for process in list(self.children.values()):
            self._reap(process)
        if self.jail.scratch is not None:
            remove_tree(self.jail.scratch)

    # ---- children --------------------------------------------------------------------------------

    def adopt(self, pid: int, ended: Callable[[int, resource.struct_rusage], None]) -> Child:
        """Follow a child of this process. Raises OSError if `pid` is not one, or is one already."""
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # ChildProcessError
        if pid in self.children:
            raise ChildProcessError(f"process {pid} is known")
        process = Child(pid, os.pidfd_open(pid), ended)  # ours to reap, so the pid is still its own
        self.children[pid] = process
        self.watch(process.pidfd, lambda: self._reap(process))
        return process

    def _reap(self, process: Child) -> None:
        _, status, usage = os.wait4(process.pid, 0)
        del self.children[process.pid]
        self.unwatch(process.pidfd)
        os.close(process.pidfd)
        process.ended(status, usage)

    def fork(self, request: Mapping[str, Any], directory: Path | None, fds: list[int]) -> int:
        """The pid of a new child that does what `child.main` says. Raises OSError."""
        pid = os.fork()
        if pid == 0:
            child.main(self.jail, request, directory, fds)
        return pid

    def can_fork(self) -> bool:
        """Whether the host lets this process fork, where another says that it could not."""
        try:
            pid = os.fork()
        except OSError:
            return False
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return True

    def _run(self, packet: Packet) -> None:
        *given, status_fd = packet.fds
        status = socket.socket(fileno=status_fd)
        scratch = self.jail.scratch
        directory = scratch / "run" if scratch is not None else None  # one at a time has one

        def ended(code: int, usage: resource.struct_rusage) -> None:
            if directory is not None:
                remove_tree(directory)
            tell(status, ended_facts(code, usage))
            status.close()

        try:
            if directory is not None:
                directory.mkdir(mode=0o700)
            process = self.adopt(self.fork(packet.json(), directory, given), ended)
        except OSError as error:
            tell(status, {"failed": str(error)})
            status.close()
        else:
            tell(status, {"started": process.pid}, [process.pidfd])
        for fd in given:
            os.close(fd)

    def _decide(self, thread: int, is_thread: bool) -> bool:
        """May this process start a thread, or fork beside itself?"""
        if not is_thread:
            return any(session.may_fork(thread) for session in self.sessions)
        if thread in self.children:  # asked by the first thread, whose id is the process's
            asking = [self.children[thread]]
        else:
            asking = [process for process in self.children.values() if process.running]
        for process in asking:
            process.threads += 1
        return all(process.threads <= self.threads for process in asking)

    # ---- the tier --------------------------------------------------------------------------------

    def _self_check(self, session: bool) -> None:
        """A tier is what is seen to hold: a confined child tries what it must not be able to do.

        Raises RuntimeError naming what was possible.
        """
        directory = self.jail.scratch / "run" if self.jail.scratch is not None else None
        if directory is not None:
            directory.mkdir(mode=0o700)
        pid = os.fork()
        if pid == 0:
            found = 17
            try:
                found = child.try_forbidden(self.jail, directory, session=session)
            finally:
                os._exit(found)
        _, status = os.waitpid(pid, 0)
        if directory is not None:
            remove_tree(directory)
        broken = os.waitstatus_to_exitcode(status)
        if broken:
            raise RuntimeError(f"confinement does not hold: {child.FORBIDDEN.get(broken, broken)}")


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


def _gather_pages() -> None:
    """Put what has been imported into huge pages, where the kernel does that on request (6.1): a
    fork, and the end of a run, then handle one entry instead of 512, and cost a third less.
    Where it does not, everything stays as it is."""
    for region in {id(value) >> _HUGE for value in gc.get_objects()}:
        confine.libc.madvise(ctypes.c_void_p(region << _HUGE), ctypes.c_size_t(1 << _HUGE), 25)


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


if __name__ == "__main__":
    main()
