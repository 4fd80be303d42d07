"""Who keeps a jail: starts the processes in it, hears them, ends them. Run by `launcher.py`.

Contract:
- It is exec'ed with a clean environment and no descriptors but its control socket and a pidfd of
  the process that owns it. It never runs model code itself, so it never hangs and is never lost.
- It makes the jail and moves into it, then forks the zygote (zygote.py), the warm interpreter of
  which all other processes are copies. It has imported nothing of what they have: what it writes
  has to be copied for nobody.
- A request on the control socket is one packet: JSON plus descriptors. A run has [code, stdout,
  stderr, facts, status] and its answers go to its own status socket: {"started"} with a pidfd, then
  {"status", usage}. A session has [channel], on which its cells are asked for (hosted.py).
- One child is always there for the run that comes next: forked, confined, and as far as it can be
  without knowing the code. A run therefore waits for no fork.
- Every process of the jail is its child, and is known by a pidfd until it is reaped here.
- When its owner dies or closes the control socket it kills every child and exits; so it does if
  the zygote dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shared.sandbox import child, confine, namespaces, zygote
from shared.sandbox.children import Child, ended_facts, peak
from shared.sandbox.hosted import HostedSession
from shared.sandbox.jail import Room, Rooms
from shared.sandbox.packets import SIZE, Packet, pass_on, receive, tell
from shared.sandbox.result import Tier
from shared.sandbox.trees import remove_tree

_ADDR_NO_RANDOMIZE = 0x0040000
_DESCRIPTORS = 1 << 16  # that the warden itself may hold, where the host lets it


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
        warden = Warden(control, owner, config)
    except Exception as error:  # noqa: BLE001  whatever it was, it is reported, and this tier is out
        what = str(error) if isinstance(error, _FailedError) else f"{type(error).__name__}: {error}"
        control.send(json.dumps({"failed": what[:2000]}).encode())
        return
    try:
        warden.serve()
    finally:
        warden.close()


class _FailedError(Exception):
    """The zygote says why."""


class Warden:
    def __init__(self, control: socket.socket, owner: int, config: Mapping[str, Any]) -> None:
        self.control, self.owner = control, owner
        self.children: dict[int, Child] = {}  # by pid
        self.sessions: set[HostedSession] = set()
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self.stopping = self._stale = False
        self.tier, limits = Tier(config["tier"]), config["limits"]
        self.threads: int = limits["threads"]
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("800")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        sys.path[:] = [*map(os.path.realpath, sys.path[1:]), *config["search"]]  # not PYTHONPATH
        os.environ.pop("PYTHONPATH")
        readable = namespaces.interpreter_paths(config["search"])
        scratch = Path("/tmp/sandbox") if self.tier is Tier.A else None
        if self.tier is Tier.A:
            namespaces.enter(readable, str(scratch), limits["scratch"], limits["scratch_files"])
        elif self.tier is Tier.D:
            scratch = Path(tempfile.mkdtemp(prefix="tirgen-sandbox-"))
        confine.drop_capabilities()
        child.arrange_standard()
        self._scratch = scratch
        try:
            self._rooms = Rooms(self.tier, scratch, readable)
        except OSError as error:
            raise RuntimeError(f"confinement does not hold: {error}") from error
        if self.tier is not Tier.D:
            confine.isolate()
        os.chdir("/")
        self._coming: tuple[socket.socket, Room] | None = None  # the spare that is being made
        self._spare: _Spare | None = None
        self._zygote = self._fork_zygote(config)
        if self.tier is not Tier.D:
            room = self._rooms.furnish()
            self._self_check(zygote.CHECK, room)
            closed = Room(room.directory, self._rooms.closed.ruleset)
            self._self_check(zygote.CHECK_SESSION, closed)
            self._rooms.clear(room)
        self.watch(owner, self._stop)
        self.watch(control.fileno(), self._request)
        self.watch(self._zygote.fileno(), self._heard)
        self._prepare()
        self._born()
        shown = str(scratch) if self.tier is Tier.D else None
        control.send(json.dumps({"ready": self.tier, "scratch": shown, "memory": peak()}).encode())

    def _fork_zygote(self, config: Mapping[str, Any]) -> socket.socket:
        """Where it takes orders. Raises _FailedError where it does not come to life."""
        channel, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        warden = os.getpid()
        pid = os.fork()
        if pid == 0:
            channel.close()
            self.control.close()
            os.close(self.owner)
            zygote.be(its, config, warden)
        its.close()
        packet = receive(channel)
        told = packet.json() if packet.body else {"failed": "it ended without a word"}
        if "failed" in told:
            raise _FailedError(told["failed"])
        self.adopt(pid, lambda *_: self._stop()).running = False
        for listener in packet.fds:
            self.watch(listener, partial(confine.permit, listener, self._decide))
        return channel

    def _self_check(self, what: bytes, room: Room) -> None:
        """A tier is what is seen to hold: a confined child tries what it must not be able to do.

        Raises RuntimeError naming what was possible.
        """
        zygote.order(self._zygote, what, room)
        _, status = os.waitpid(zygote.answer(self._zygote), 0)
        if broken := os.waitstatus_to_exitcode(status):
            raise RuntimeError(f"confinement does not hold: {child.FORBIDDEN.get(broken, broken)}")

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
        if self.tier is Tier.D and self._scratch is not None:  # A's ends with its namespace
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
        self._heard()
        zygote.order(self._zygote, zygote.session(seed), self._rooms.closed, sock)
        return zygote.answer(self._zygote)

    def can_fork(self) -> bool:
        """Whether the host lets a process be made, where another says that it could not."""
        self._heard()
        try:
            zygote.order(self._zygote, zygote.NOTHING, self._rooms.closed)
            self.adopt(zygote.answer(self._zygote), lambda *_: None).running = False
        except OSError:
            return False
        return True

    def _prepare(self) -> None:
        """Order the child for the next run. Raises OSError."""
        room = self._rooms.furnish()
        sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            zygote.order(self._zygote, zygote.RUN, room, theirs)
        except OSError:
            sock.close()
            self._rooms.clear(room)
            raise
        finally:
            theirs.close()
        self._coming = sock, room

    def _born(self) -> None:
        """Wait for the child that was ordered, if one was. Raises OSError."""
        if self._coming is None:
            return
        (sock, room), self._coming = self._coming, None
        try:
            process = self.adopt(zygote.answer(self._zygote), lambda *_: self._lost(room))
        except OSError:
            sock.close()
            self._rooms.clear(room)
            raise
        process.running = False
        self._spare = _Spare(process, sock, room)

    def _heard(self) -> None:
        with contextlib.suppress(OSError):  # whoever comes next tries again
            self._born()

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
            spare = self._take_spare()
        except OSError as error:
            tell(status, {"failed": str(error)})
            status.close()
        else:
            self._hand_over(spare, packet.body, given, status)
        for fd in given:
            os.close(fd)
        with contextlib.suppress(OSError):  # whoever comes next tries again
            self._prepare()

    def _take_spare(self) -> _Spare:
        """Raises OSError where there is none and none can be made."""
        with contextlib.suppress(OSError):
            self._born()
        if self._spare is None:
            self._prepare()
            self._born()
        assert self._spare is not None
        spare, self._spare = self._spare, None
        return spare

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


def _fix_addresses() -> None:
    """Start again without address randomisation, where that is allowed: what depends on the order
    of addresses (the repr of an object, a set of objects) is then the same in every zygote."""
    persona = confine.libc.personality(0xFFFFFFFF)
    if not persona & _ADDR_NO_RANDOMIZE and confine.libc.personality(
        persona | _ADDR_NO_RANDOMIZE
    ) not in (-1, persona | _ADDR_NO_RANDOMIZE):
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    main()
