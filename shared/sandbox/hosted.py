"""A session as the warden keeps it: its states, and the one cell that is under way.

The owner asks on the session's channel: {"cell": number, "on": number} with [code, stdout, stderr,
facts, status] makes the state `number` from the state `on`; {"drop": [numbers]} forgets states; the
end of the channel ends the session. Answers about a cell go to its status socket: {"started"} with
a pidfd and the CPU seconds that its process has used before, then {"status"} of a cell that died,
{"kept"} of one that became a state, {"gone"} where the state to start from is not there any more,
{"broken"} where the session's own processes do not keep to the protocol of cells.py, which only
hostile code can bring about: that ends the session.

All processes of a session are in one process group, so that one kill reaches those too that never
said hello. States that wait are stopped.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.sandbox.children import Child, ended_facts
from shared.sandbox.packets import Packet, pair, receive, send, tell
from shared.sandbox.result import Tier

if TYPE_CHECKING:
    from shared.sandbox.warden import Warden

_SANE = 1 << 40  # bytes


@dataclass(eq=False)
class _State:
    process: Child
    sock: socket.socket


@dataclass(eq=False)
class _Cell:
    """Under way in `runner`, which was the state `on`: it is granted its fork, the copy says hello
    on `copy` and is that state, and then the cell is `told` what `fds` (code, stdout, stderr,
    facts) say."""

    number: int
    on: int
    runner: _State
    copy: socket.socket
    status: socket.socket
    fds: list[int]
    forked: bool = False
    told: bool = False

    def close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class HostedSession:
    def __init__(self, warden: Warden, packet: Packet) -> None:
        self._warden = warden
        self._states: dict[int, _State] = {}
        self._cell: _Cell | None = None
        self._alive: set[Child] = set()
        self._channel = socket.socket(fileno=packet.fds[0])
        self._group = 0
        self._ending = False
        warden.sessions.add(self)
        sock, theirs = pair()
        try:
            pid = warden.fork_session(packet.json()["seed"], theirs)
            process = self._adopt(pid)
            os.setpgid(pid, pid)  # before it has run a cell; all that it forks stays in this group
            self._group = pid
        except OSError as error:
            tell(self._channel, {"failed": str(error)})
            sock.close()
            self._end()
            return
        finally:
            theirs.close()
        process.running = False
        self._states[0] = _State(process, sock)
        warden.watch(sock.fileno(), self._first_hello)
        warden.watch(self._channel.fileno(), self._asked)

    def may_fork(self, pid: int) -> bool:
        """Does a state with this pid wait for its fork? Says so once."""
        cell = self._cell
        if cell is None or cell.forked or cell.runner.process.pid != pid:
            return False
        cell.forked = True
        return True

    # ---- the owner's side ------------------------------------------------------------------------

    def _asked(self) -> None:
        packet = receive(self._channel)
        body: dict[str, Any] = packet.json() if packet.body else {}
        if "cell" in body:
            self._start(body, packet.fds)
        elif "drop" in body:
            for number in body["drop"]:
                if (state := self._states.pop(number, None)) is not None:
                    self._close(state.sock)
                    state.process.signal(signal.SIGKILL)
        else:
            self._end()

    def _start(self, body: dict[str, Any], fds: list[int]) -> None:
        *given, status_fd = fds
        status = socket.socket(fileno=status_fd)
        runner = self._states.get(body["on"])
        if runner is None:
            tell(status, {"gone": body["on"]})
            status.close()
            for fd in given:
                os.close(fd)
            return
        copy, theirs = pair()
        self._cell = _Cell(body["cell"], body["on"], runner, copy, status, given)
        self._cell.forked = self._warden.tier is Tier.D  # where nobody is asked
        self._warden.watch(copy.fileno(), self._copied)
        self._warden.watch(runner.sock.fileno(), self._heard)
        runner.process.signal(signal.SIGCONT)
        try:
            runner.sock.setblocking(False)  # hostile code may have filled it
            send(runner.sock, {"copy": True}, [theirs.fileno()])
        except OSError as error:
            self._broken(str(error))
        finally:
            theirs.close()

    # ---- the states' side ------------------------------------------------------------------------

    def _first_hello(self) -> None:
        sock = self._states[0].sock
        self._warden.unwatch(sock.fileno())
        packet = receive(sock)
        packet.close()
        if packet.body:
            self._states[0].process.signal(signal.SIGSTOP)
            tell(self._channel, {"open": True})
        else:
            tell(self._channel, {"failed": "a session's first process ended before it was ready"})
            self._end()

    def _copied(self) -> None:
        """The copy says hello: it is the state now, and the cell may begin."""
        cell = self._cell
        assert cell is not None
        packet = receive(cell.copy)
        packet.close()
        self._warden.unwatch(cell.copy.fileno())
        try:
            if "hello" not in packet.json() or not cell.forked:
                raise ValueError
        except ValueError:
            what = "talks nonsense" if packet.body else "ended before it began"
            self._broken(f"a process of the session {what}")
            return
        runner = cell.runner.process
        try:
            process = self._adopt(packet.sender or 0)
            if os.getpgid(process.pid) != self._group:
                raise ChildProcessError("a process of another group")
        except OSError as error:
            self._broken(str(error))
            return
        process.signal(signal.SIGSTOP)
        process.running = False
        self._states[cell.on] = _State(process, cell.copy)
        runner.running, runner.threads, cell.told = True, 0, True
        tell(cell.status, {"started": runner.pid, "cpu": runner.cpu()}, [runner.pidfd])
        with contextlib.suppress(OSError):  # killed already: its end will be seen
            send(cell.runner.sock, {"cell": True}, cell.fds)
        cell.close_fds()

    def _heard(self) -> None:
        """The runner says that it could not fork, or that it is the next state. Nothing else."""
        cell = self._cell
        assert cell is not None
        packet = receive(cell.runner.sock)
        packet.close()
        if not packet.body:
            self._warden.unwatch(cell.runner.sock.fileno())  # its end will be seen
            return
        try:
            body = packet.json()
        except ValueError:
            body = {}
        if cell.told and "kept" in body:
            runner = cell.runner.process
            runner.signal(signal.SIGSTOP)
            runner.running = False
            self._warden.unwatch(cell.runner.sock.fileno())
            self._states[cell.number] = cell.runner
            self._cell = None
            memory = body.get("memory")  # its own claim
            sane = type(memory) is int and 0 <= memory < _SANE
            tell(cell.status, {"kept": True, "memory": memory if sane else 0})
            cell.status.close()
        elif "failed" in body and not self._warden.can_fork():
            tell(cell.status, {"failed": "this host lets no process be made"})
            self._end()
        else:
            self._broken(str(body.get("failed", "a process of the session talks nonsense"))[:500])

    def _adopt(self, pid: int) -> Child:
        def ended(status: int, usage: resource.struct_rusage) -> None:
            self._ended(process, status, usage)

        process = self._warden.adopt(pid, ended)
        self._alive.add(process)
        return process

    def _ended(self, process: Child, status: int, usage: resource.struct_rusage) -> None:
        self._alive.discard(process)
        for number, state in list(self._states.items()):
            if state.process is process:
                self._close(self._states.pop(number).sock)
        cell = self._cell
        if cell is not None and cell.runner.process is process:
            if cell.told:
                self._cell = None
                self._close(cell.runner.sock)
                tell(cell.status, ended_facts(status, usage))
                cell.status.close()
            else:
                self._broken("the state before the cell ended")
        if self._ending and not self._alive:
            self._bury()

    # ---- the end ---------------------------------------------------------------------------------

    def _broken(self, reason: str) -> None:
        assert self._cell is not None
        tell(self._cell.status, {"broken": reason})
        self._end()

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._warden.unwatch(self._channel.fileno())
        if (cell := self._cell) is not None:
            self._close(cell.runner.sock)
            self._close(cell.copy)
            cell.status.close()
            cell.close_fds()
            self._cell = None
        for process in self._alive:
            process.signal(signal.SIGKILL)
        if not self._alive:
            self._bury()

    def _bury(self) -> None:
        """All known processes are reaped; now those that never said hello."""
        with contextlib.suppress(ChildProcessError):
            while self._group:
                os.waitid(os.P_PGID, self._group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.killpg(self._group, signal.SIGKILL)
                os.waitpid(-self._group, 0)
        for state in self._states.values():
            self._close(state.sock)
        self._warden.sessions.discard(self)
        self._channel.close()  # the owner sees that all is over

    def _close(self, sock: socket.socket) -> None:
        self._warden.unwatch(sock.fileno())
        sock.close()
