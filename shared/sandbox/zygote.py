"""The warm interpreter that runs are forked from. Started by `launcher.py`, never imported by it.

Contract:
- It is exec'ed with a clean environment and no descriptors but its control socket and a pidfd of
  the process that owns it. It never runs model code itself, so it never hangs and is never lost.
- A request on the control socket is one packet: JSON plus descriptors. A run has [code, stdout,
  stderr, facts, status] and its answers go to its own status socket: {"started"} with a pidfd, then
  {"status", usage}. A session has [channel], on which its cells are asked for (hosted.py).
- One child is always there for the run that comes next: forked, confined, and as far as it can be
  without knowing the code. A run therefore waits for no fork.
- Every process of the jail is its child, and is known by a pidfd until it is reaped here.
- When its owner dies or closes the control socket it kills every child and exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
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

from shared.sandbox import child, confine, fixed, namespaces, pages
from shared.sandbox.children import Child, ended_facts, peak
from shared.sandbox.hosted import HostedSession
from shared.sandbox.jail import Jail, Room, Rooms
from shared.sandbox.packets import SIZE, Packet, pass_on, receive, tell
from shared.sandbox.result import Tier
from shared.sandbox.trees import remove_tree

_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock
_ADDR_NO_RANDOMIZE = 0x0040000
_OBJECTS = 48 << 20  # bytes that what is preloaded may take, less what is no small object
_DESCRIPTORS = 1 << 16  # that the zygote itself may hold, where the host lets it


@dataclass(eq=False)
class _Spare:
    """A child that waits for its run; `sock` is our end of where it is told."""

    process: Child
    sock: socket.socket
    room: Room


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
        self._poll = select.epoll()
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
        child.arrange_standard()
        kept = pages.reserve(_OBJECTS)
        _warm(config["preload"], config["warmup"])
        del kept
        fixed.install()
        child.prepare()
        pages.gather()
        pages.join()
        self._scratch = scratch
        self.jail = Jail.make(tier, limits)
        try:
            self._rooms = Rooms(tier, scratch, readable)
        except OSError as error:
            raise RuntimeError(f"confinement does not hold: {error}") from error
        self._spare: _Spare | None = None
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
        self._spare = self._prepare()
        shown = str(scratch) if tier is Tier.D else None
        control.send(json.dumps({"ready": tier, "scratch": shown, "memory": peak()}).encode())

    # ---- the loop --------------------------------------------------------------------------------

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.EPOLLIN)

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
        if self.jail.tier is Tier.D and self._scratch is not None:  # A's ends with its namespace
            remove_tree(self._scratch)

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

    def fork_session(self, seed: int, sock: socket.socket) -> int:
        """The pid of a new child that is state 0 of a session. Raises OSError."""
        os.chdir("/")
        pid = fork()
        if pid == 0:
            child.host(self.jail, self._rooms.closed.ruleset, seed, sock)
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

    def _prepare(self) -> _Spare:
        """The child for the next run. Raises OSError."""
        room = self._rooms.furnish()
        sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.chdir(room.directory or "/")
            pid = fork()
            if pid == 0:
                child.wait(self.jail, room.ruleset, theirs)
            process = self.adopt(pid, lambda *_: self._lost(room))
        except OSError:
            sock.close()
            self._rooms.clear(room)
            raise
        finally:
            theirs.close()
        process.running = False
        return _Spare(process, sock, room)

    def _lost(self, room: Room) -> None:
        """The spare died while it waited: somebody needed the memory."""
        if self._spare is not None:
            self._spare.sock.close()
            self._spare = None
        self._rooms.clear(room)

    def _run(self, packet: Packet) -> None:
        *given, status_fd = packet.fds
        status = socket.socket(fileno=status_fd)
        try:
            spare, self._spare = self._spare or self._prepare(), None
        except OSError as error:
            tell(status, {"failed": str(error)})
            status.close()
        else:
            self._hand_over(spare, packet.body, given, status)
        for fd in given:
            os.close(fd)
        with contextlib.suppress(OSError):  # whoever comes next is told so
            self._spare = self._prepare()

    def _hand_over(
        self, spare: _Spare, request: bytes, given: list[int], status: socket.socket
    ) -> None:
        room, process = self._rooms.assign(spare.room), spare.process

        def ended(code: int, usage: resource.struct_rusage) -> None:
            tell(status, ended_facts(code, usage))
            status.close()
            self._rooms.clear(room)

        process.ended, process.running = ended, True
        with contextlib.suppress(OSError):  # it has died: its end will be seen
            pass_on(spare.sock, request, given)
        spare.sock.close()
        tell(status, {"started": process.pid}, [process.pidfd])

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
        room = self._rooms.furnish()
        os.chdir("/" if session else room.directory or "/")
        pid = os.fork()
        if pid == 0:
            found = 17
            try:
                own = self._rooms.closed if session else room
                found = child.try_forbidden(self.jail, own.ruleset, room.directory, session=session)
            finally:
                os._exit(found)
        _, status = os.waitpid(pid, 0)
        self._rooms.clear(room)
        broken = os.waitstatus_to_exitcode(status)
        if broken:
            raise RuntimeError(f"confinement does not hold: {child.FORBIDDEN.get(broken, broken)}")


def fork() -> int:
    """As os.fork, without what Python does around it, which is for threads: the zygote has one,
    and holds no lock. In a child it would touch 200 pages, and every page touched is copied."""
    return confine.check(int(_libc.fork()), "fork")


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


if __name__ == "__main__":
    main()
