"""A session as the zygote keeps it: its states, and the one cell that is under way.

The owner asks on the session's channel: {"cell": number, "on": number} with [code, stdout, stderr,
facts, status] makes the state `number` from the state `on`; {"drop": [numbers]} forgets states; the
end of the channel ends the session. Answers about a cell go to its status socket: {"started"} with
a pidfd, then {"status"} of a cell that died, {"kept"} of one that became a state, {"gone"} where
the state to start from is not there any more, {"broken"} where the session's own processes do not
keep to the protocol of cells.py, which only hostile code can bring about: that ends the session.

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

if TYPE_CHECKING:
    from shared.sandbox.zygote import Zygote

_LIFE = 24 * 3600  # RLIMIT_CPU of any one state; the cells' own timeouts are kept from outside
_SANE = 1 << 40  # bytes


@dataclass(eq=False)
class _State:
    process: Child
    sock: socket.socket


@dataclass(eq=False)
class _Cell:
    """Under way: granted its fork, then `process` once it has said hello."""

    number: int
    parent: _State
    sock: socket.socket
    status: socket.socket
    forked: bool = False
    process: Child | None = None


class HostedSession:
    def __init__(self, zygote: Zygote, packet: Packet) -> None:
        self._zygote = zygote
        self._states: dict[int, _State] = {}
        self._cell: _Cell | None = None
        self._alive: set[Child] = set()
        self._channel = socket.socket(fileno=packet.fds[0])
        self._group = 0
        self._ending = False
        zygote.sessions.add(self)
        sock, theirs = pair()
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        try:
            request = {**packet.json(), "cpu": _LIFE}
            pid = zygote.fork(request, None, [theirs.fileno(), null, null, null])
            process = self._adopt(pid)
            os.setpgid(pid, pid)  # before it has run a cell; all that it forks stays in this group
            self._group = pid
        except OSError as error:
            tell(self._channel, {"failed": str(error)})
            sock.close()
            self._end()
            return
        finally:
            os.close(null)
            theirs.close()
        process.running = False
        self._states[0] = _State(process, sock)
        zygote.watch(sock.fileno(), self._first_hello)
        zygote.watch(self._channel.fileno(), self._asked)

    def may_fork(self, pid: int) -> bool:
        """Does a state with this pid wait for the fork of its cell? Says so once."""
        cell = self._cell
        if cell is None or cell.forked or cell.parent.process.pid != pid:
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
        parent = self._states.get(body["on"])
        if parent is None:
            tell(status, {"gone": body["on"]})
            status.close()
        else:
            sock, theirs = pair()
            self._cell = _Cell(body["cell"], parent, sock, status)
            self._zygote.watch(sock.fileno(), self._heard)
            parent.process.signal(signal.SIGCONT)
            try:
                parent.sock.setblocking(False)  # hostile code may have filled it
                send(parent.sock, {"cell": True}, [*given, theirs.fileno()])
            except OSError as error:
                self._broken(str(error))
            finally:
                theirs.close()
        for fd in given:
            os.close(fd)

    # ---- the states' side ------------------------------------------------------------------------

    def _first_hello(self) -> None:
        sock = self._states[0].sock
        self._zygote.unwatch(sock.fileno())
        packet = receive(sock)
        packet.close()
        if packet.body:
            self._states[0].process.signal(signal.SIGSTOP)
            tell(self._channel, {"open": True})
        else:
            tell(self._channel, {"failed": "a session's first process ended before it was ready"})
            self._end()

    def _heard(self) -> None:
        """The cell's process says hello, and then that it is a state. Nothing else is heard."""
        cell = self._cell
        assert cell is not None
        packet = receive(cell.sock)
        packet.close()
        if not packet.body:
            if cell.process is None:
                self._broken("a cell ended before it began")
            else:
                self._zygote.unwatch(cell.sock.fileno())  # its end will be seen
            return
        try:
            body = packet.json()
        except ValueError:
            body = {}
        if cell.process is None and "hello" in body and cell.forked:
            try:
                cell.process = self._adopt(packet.sender or 0)
                if os.getpgid(cell.process.pid) != self._group:
                    raise ChildProcessError("a process of another group")
            except OSError as error:
                self._broken(str(error))
                return
            cell.parent.process.signal(signal.SIGSTOP)
            tell(cell.status, {"started": cell.process.pid}, [cell.process.pidfd])
            with contextlib.suppress(OSError):  # killed already: its end will be seen
                send(cell.sock, {"go": True})
        elif cell.process is not None and "kept" in body:
            cell.process.signal(signal.SIGSTOP)
            cell.process.running = False
            self._zygote.unwatch(cell.sock.fileno())
            self._states[cell.number] = _State(cell.process, cell.sock)
            self._cell = None
            memory = body.get("memory")  # its own claim
            sane = type(memory) is int and 0 <= memory < _SANE
            tell(cell.status, {"kept": True, "memory": memory if sane else 0})
            cell.status.close()
        elif "failed" in body and not self._zygote.can_fork():
            tell(cell.status, {"failed": "this host lets no process be made"})
            self._end()
        else:
            self._broken(str(body.get("failed", "a process of the session talks nonsense"))[:500])

    def _adopt(self, pid: int) -> Child:
        def ended(status: int, usage: resource.struct_rusage) -> None:
            self._ended(process, status, usage)

        process = self._zygote.adopt(pid, ended)
        self._alive.add(process)
        return process

    def _ended(self, process: Child, status: int, usage: resource.struct_rusage) -> None:
        self._alive.discard(process)
        for number, state in list(self._states.items()):
            if state.process is process:
                self._close(self._states.pop(number).sock)
        cell = self._cell
        if cell is not None and cell.process is process:
            self._cell = None
            self._close(cell.sock)
            tell(cell.status, ended_facts(status, usage))
            cell.status.close()
        elif cell is not None and cell.process is None and cell.parent.process is process:
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
        self._zygote.unwatch(self._channel.fileno())
        if self._cell is not None:
            self._close(self._cell.sock)
            self._cell.status.close()
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
        self._zygote.sessions.discard(self)
        self._channel.close()  # the owner sees that all is over

    def _close(self, sock: socket.socket) -> None:
        self._zygote.unwatch(sock.fileno())
        sock.close()
