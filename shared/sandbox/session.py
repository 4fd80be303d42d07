"""Sessions: a state that cells change one by one, and an exact way back.

    with sandbox.session(seed=0) as cells:
        cells.run("x = 1")
        cells.run("x += 1; print(x)")
        cells.rollback(1)               # x is 1 again

Each state is a process forked from the one before (shared/sandbox/cells.py). A cell that fails,
times out or is cancelled leaves the state as it was. `random` and numpy draw on from cell to cell
and are rolled back with everything else in memory. Threads do not outlive their cell, and files in
the session's directory are not rolled back.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

from shared.errors import SandboxError
from shared.sandbox.packets import Packet, as_memfd, receive, send
from shared.sandbox.result import CodeError, Outcome, RunResult
from shared.sandbox.watch import Cancel, End, LostError, Process, Watch

if TYPE_CHECKING:
    from shared.sandbox.pool import Sandbox, Zygote

_PATIENCE = 20.0  # seconds in which a state answers when it must
_LIFE = 24 * 3600  # RLIMIT_CPU of any one state; the cells' own timeouts are kept from outside
_NOTIF_RECV, _NOTIF_SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # SECCOMP_IOCTL_*, resp flag


class _State:
    """A process that holds one state, and the socket on which it takes the next cell."""

    def __init__(self, sock: socket.socket, process: Process) -> None:
        self.sock, self.process = sock, process

    def close(self) -> None:
        self.process.kill()
        self.process.close()
        self.sock.close()


class Session:
    """Made by `Sandbox.session`; use it in a `with` block. One cell at a time."""

    def __init__(self, sandbox: Sandbox, seed: int) -> None:
        self._sandbox, self._seed = sandbox, seed
        self._states: list[_State] = []
        self._zygote: Zygote | None = None
        self._status: socket.socket | None = None
        self._listener = -1

    # ---- life ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Fork state 0. Raises SandboxError if the sandbox is not open or fails."""
        with Cancel() as cancel:
            zygote = self._sandbox.acquire(cancel)
        zygote.sessions += 1
        self._zygote = zygote
        try:
            self._open_on(zygote)
        except (LostError, OSError, ValueError) as error:
            self.close()
            raise SandboxError(f"A session could not be started: {error}") from error
        finally:
            self._sandbox.release(zygote)

    def _open_on(self, zygote: Zygote) -> None:
        here, there = _pair()
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        with there:
            body: dict[str, object] = {"seed": self._seed, "cpu": _LIFE, "session": True}
            self._status = zygote.request(body, [there.fileno(), null, null, null])
        os.close(null)
        self._status.settimeout(_PATIENCE)
        started = receive(self._status)
        if not started.fds:
            raise LostError(started.body.decode() or "the zygote died")
        self._states.append(_State(here, Process.from_pidfd(started.fds[0])))
        here.settimeout(_PATIENCE)
        hello = receive(here)
        if hello.fds:
            self._listener = hello.fds[0]

    def close(self) -> None:
        """End every state."""
        for state in reversed(self._states):
            state.close()
        self._states.clear()
        if self._listener >= 0:
            os.close(self._listener)
            self._listener = -1
        if self._status is not None:
            with contextlib.suppress(OSError):
                receive(self._status)  # the zygote has reaped them
            self._status.close()
            self._status = None
        if self._zygote is not None:
            self._zygote.sessions -= 1
            self._zygote = None

    def __enter__(self) -> Session:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Session:
        await asyncio.to_thread(self.open)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # ---- cells -----------------------------------------------------------------------------------

    def run(self, code: str, *, timeout: float = 10.0) -> RunResult:
        """Run one cell on the present state; outcomes as for `Sandbox.run`.

        Raises SandboxError if the session is not open or holds `Limits.cells` states.
        """
        with Cancel() as cancel:
            return self._run(code, timeout, cancel)

    async def arun(self, code: str, *, timeout: float = 10.0) -> RunResult:
        """`run` for an event loop; cancelling it kills the cell and keeps the state before it."""
        return await self._sandbox.in_thread(lambda cancel: self._run(code, timeout, cancel))

    @property
    def depth(self) -> int:
        """How many cells the present state stands on."""
        return max(0, len(self._states) - 1)

    def rollback(self, cells: int) -> None:
        """Forget the last `cells` successful cells. Raises ValueError if there are fewer."""
        if not 0 <= cells <= self.depth:
            raise ValueError(f"cannot take back {cells} of {self.depth} cells")
        for _ in range(cells):
            self._states.pop().close()
            receive(self._states[-1].sock)  # the state before has seen it go and waits again

    def _run(self, code: str, timeout: float, cancel: Cancel) -> RunResult:
        sandbox = self._sandbox
        if not self._states:
            raise SandboxError("The session is not open.", remedy="use it in a `with` block")
        if self.depth >= sandbox.limits.cells:
            raise SandboxError(
                f"The session holds Limits.cells={sandbox.limits.cells} states.",
                remedy="roll back, start another session, or raise the limit",
            )
        assert sandbox.tier is not None
        with Watch(sandbox.limits, timeout, cancel.fd) as watch:
            try:
                self._cell(watch, code)
                return watch.result(sandbox.tier, sandbox.hide)
            except (LostError, OSError, ValueError) as error:
                alive = self._zygote is not None and self._zygote.alive
                self.close()
                if not alive:
                    return sandbox.infrastructure_error(f"the zygote died: {error}")
                # Only the states of the model's own code can have done this.
                fault = CodeError(
                    "SessionBroken", f"the session's state is gone: {error}", None, ""
                )
                outcome = Outcome.MODEL_ERROR
                return RunResult(outcome, "", "", fault, sandbox.tier, 0.0, 0.0, 0, 0)

    def _cell(self, watch: Watch, code: str) -> None:
        current = self._states[-1]
        here, there = _pair()
        source = as_memfd(code)
        with there:
            send(current.sock, {"cell": True}, [source, *watch.descriptors, there.fileno()])
        os.close(source)
        watch.give_away()
        watch.on_packet(current.sock, lambda packet: self._from_parent(watch, packet))
        watch.on_packet(here, lambda packet: self._from_cell(watch, here, packet))
        if self._listener >= 0:
            permits = iter([True])
            watch.on_ready(
                self._listener, lambda: _answer_fork(self._listener, next(permits, False))
            )
        kept = False
        try:
            watch.until_end()
            kept = watch.end is not None and watch.end.kept
        finally:
            if watch.process is not None and not kept:
                if watch.end is None:
                    watch.process.kill()
                watch.process.close()
            if not kept:
                here.close()
        if kept:
            assert watch.process is not None
            here.settimeout(_PATIENCE)
            self._states.append(_State(here, watch.process))

    def _from_parent(self, watch: Watch, packet: Packet) -> None:
        """The state before the cell tells how the cell's process ended."""
        packet.close()
        body = packet.json()
        if "status" not in body:
            raise LostError(str(body.get("failed", "no status")))
        watch.end = End(int(body["status"]), float(body["cpu"]), int(body["memory"]))

    def _from_cell(self, watch: Watch, here: socket.socket, packet: Packet) -> None:
        """The cell's own process says that it is there, and then that it is the new state."""
        packet.close()
        if not packet.body:
            watch.selector.unregister(here)  # it has ended; its parent will tell how
            return
        body = packet.json()
        if watch.process is None:
            # The cell waits for our answer, so its pid is its own until we hold a pidfd of it.
            if not packet.sender:
                raise LostError("a cell without a pid")
            watch.started(Process(packet.sender, os.pidfd_open(packet.sender)))
            send(here, {"go": True})
        elif "kept" in body and watch.killed is None:
            watch.end = End(0, watch.process.cpu(), int(body["memory"]), kept=True)


def _pair() -> tuple[socket.socket, socket.socket]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return here, there


def _answer_fork(listener: int, permit: bool) -> None:
    """Let the process that waits for permission to fork go on, or give it EPERM."""
    request = bytearray(80)  # struct seccomp_notif
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, request)
        identity = struct.unpack_from("=Q", request)[0]
        reply = (0, 0, _CONTINUE) if permit else (0, -errno.EPERM, 0)
        fcntl.ioctl(listener, _NOTIF_SEND, bytearray(struct.pack("=QqiI", identity, *reply)))
    except OSError as error:
        if error.errno != errno.ENOENT:  # it died while it waited
            raise
