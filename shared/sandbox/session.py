"""Sessions: a state that cells change one by one, and an exact way back.

    with sandbox.session(seed=0) as cells:
        cells.run("x = 1")
        cells.run("x += 1; print(x)")
        cells.rollback(1)               # x is 1 again

Contract: a session is the list of its successful cells. The processes that hold the states between
them (shared/sandbox/cells.py) are a cache of that: the youngest `Limits.states` are kept, within
`Limits.states_memory`. What is not there, because it was dropped for room or because its zygote was
lost, is made again from the recorded cells with the same seed, and the result then says `replayed`.
A replay that does not print what was printed before is an infrastructure error.

A cell that fails, times out or is cancelled leaves the state as it was. `random`, numpy and every
other source of chance draw on from cell to cell, and are rolled back with everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import SandboxError
from shared.sandbox.packets import as_memfd, receive, send
from shared.sandbox.result import CodeError, Outcome, RunResult
from shared.sandbox.watch import BrokenError, Cancel, GoneError, LostError, Watch

if TYPE_CHECKING:
    from shared.sandbox.launcher import Zygote
    from shared.sandbox.pool import Sandbox

_PATIENCE = 20.0  # seconds in which a zygote opens a session or has ended one
_SUCCESS = (Outcome.OK, Outcome.NO_OUTPUT)


@dataclass
class _Cell:
    """A successful cell; `state` is the number of the process that it became, while there is one,
    and `held` how many bytes that holds beyond the state before."""

    code: str
    timeout: float
    printed: str
    state: int | None = None
    held: int = 0


class _Host:
    """A session's processes, on one zygote. State 0 is the empty one."""

    def __init__(self, sandbox: Sandbox, seed: int) -> None:
        """Raises LostError."""
        with sandbox.a_zygote() as zygote:
            self.zygote: Zygote = zygote
            self._sandbox = sandbox
            self.channel = zygote.request({"session": True, "seed": seed}, [])
            with sandbox.changed:
                zygote.sessions += 1
            try:
                self.channel.settimeout(_PATIENCE)
                answer = receive(self.channel)
                if not answer.body or "open" not in (body := answer.json()):
                    raise LostError(body["failed"] if answer.body else "the zygote died")
            except (TimeoutError, LostError) as error:
                self.close()
                raise LostError(str(error)) from error
        self._last = 0

    def next_number(self) -> int:
        self._last += 1
        return self._last

    def ask(self, body: dict[str, object], code: str, watch: Watch) -> socket.socket:
        """Ask for a cell; returns the socket on which its answers arrive. Raises LostError."""
        source = as_memfd(code)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            send(self.channel, body, [source, *watch.descriptors, there.fileno()])
        except OSError as error:
            here.close()
            raise LostError(f"the zygote is gone: {error}") from error
        finally:
            there.close()
            os.close(source)
        return here

    def drop(self, states: list[int]) -> None:
        if states:
            with contextlib.suppress(OSError):  # gone with all of its states
                send(self.channel, {"drop": states})

    def close(self) -> None:
        """Returns when the zygote has reaped every state, or is gone itself."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_WR)
            while receive(self.channel).body:
                pass
        self.channel.close()
        with self._sandbox.changed:
            self.zygote.sessions -= 1
        self._sandbox.retire(self.zygote)


class Session:
    """Made by `Sandbox.session`; use it in a `with` block. Cells run one after the other."""

    def __init__(self, sandbox: Sandbox, seed: int) -> None:
        self._sandbox, self._seed = sandbox, seed
        self._cells: list[_Cell] = []
        self._host: _Host | None = None
        self._open = False
        self._turn = threading.Lock()  # a cancelled cell may still be dying when the next one comes

    # ---- life ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Fork state 0. Raises SandboxError if the sandbox is not open or fails."""
        with Cancel() as cancel, self._sandbox.admitted(cancel):
            try:
                self._host = _Host(self._sandbox, self._seed)
            except LostError as error:
                raise SandboxError(f"A session could not be started: {error}") from error
        self._open = True

    def close(self) -> None:
        """End every state, after the cell that runs."""
        with self._turn:
            self._open = False
            self._lose()

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
        """Run one cell on the present state; outcomes as for `Sandbox.run`. Raises SandboxError if
        the session is not open."""
        with Cancel() as cancel:
            return self._run(code, timeout, cancel)

    async def arun(self, code: str, *, timeout: float = 10.0) -> RunResult:
        """`run` for an event loop; cancelling it kills the cell and keeps the state before it."""
        return await self._sandbox.in_thread(lambda cancel: self._run(code, timeout, cancel))

    @property
    def depth(self) -> int:
        """How many cells the present state stands on."""
        return len(self._cells)

    def rollback(self, cells: int) -> None:
        """Forget the last `cells` successful cells. Raises ValueError if there are fewer."""
        with self._turn:
            if not 0 <= cells <= self.depth:
                raise ValueError(f"cannot take back {cells} of {self.depth} cells")
            keep = self.depth - cells
            forgotten = [cell.state for cell in self._cells[keep:] if cell.state is not None]
            del self._cells[keep:]
            if self._host is not None:
                self._host.drop(forgotten)

    # ---- inside ----------------------------------------------------------------------------------

    def _run(self, code: str, timeout: float, cancel: Cancel) -> RunResult:
        replayed = False
        with self._turn, self._sandbox.admitted(cancel):
            if not self._open:
                raise SandboxError("The session is not open.", remedy="use it in a `with` block")
            for attempt in range(2):
                try:
                    replayed |= self._catch_up(cancel)
                    result, cell = self._cell(code, timeout, cancel)
                except _DivergedError as error:
                    return self._sandbox.infrastructure_error(str(error))
                except (BrokenError, LostError) as error:
                    self._lose()
                    # A state that was made anew and is gone at once has ended itself.
                    if isinstance(error, BrokenError) or (
                        isinstance(error, GoneError) and attempt and replayed
                    ):
                        return self._broken(str(error), replayed)
                    reason = str(error)
                else:
                    if cell is not None:
                        self._cells.append(cell)
                        self._make_room()
                    return dataclasses.replace(result, replayed=replayed)
        return self._sandbox.infrastructure_error(reason)

    def _catch_up(self, cancel: Cancel) -> bool:
        """Make the present state, where its process is not there: was there anything to do?

        Raises LostError, BrokenError, and _DivergedError where a cell does not do what it did.
        """
        if self._host is None:
            self._host = _Host(self._sandbox, self._seed)
        done = self.depth
        while done and self._cells[done - 1].state is None:
            done -= 1
        missing = self._cells[done:]
        for number, old in enumerate(missing, start=done + 1):
            patience = 2 * old.timeout + 1  # it was quick enough before
            result, again = self._cell(old.code, patience, cancel, depth=number - 1)
            if again is None or again.printed != old.printed:
                what = f"cell {number} of {self.depth} is now {result.outcome}"
                raise _DivergedError(f"the session was lost and could not be replayed: {what}")
            old.state, old.held = again.state, again.held
        return bool(missing)

    def _cell(
        self, code: str, timeout: float, cancel: Cancel, depth: int | None = None
    ) -> tuple[RunResult, _Cell | None]:
        """Run on the state after `depth` cells (all): its result, and what to record of success.

        Raises LostError and BrokenError.
        """
        sandbox, host = self._sandbox, self._host
        assert host is not None
        assert sandbox.tier is not None
        depth = self.depth if depth is None else depth
        number = host.next_number()
        on = self._cells[depth - 1].state if depth else 0
        body: dict[str, object] = {"cell": number, "on": on}
        try:
            with (
                sandbox.a_zygote(host.zygote),
                Watch(
                    sandbox.limits, timeout, cancel.fd, ours=not depth, may_be_kept=True
                ) as watch,
            ):
                with host.ask(body, code, watch) as status:
                    end = watch.until_end(status)
                host.zygote.note(end)
                try:
                    result = watch.result(sandbox.tier, sandbox.hide)
                except LostError as error:
                    raise BrokenError(str(error)) from error
        except BrokenError as error:
            if depth:
                raise  # it started in what earlier cells left
            raise LostError(str(error)) from error  # no model code was there to break anything
        if end.kept and result.outcome in _SUCCESS:
            return result, _Cell(code, timeout, _digest(result), number, end.held)
        host.drop([number])
        if result.outcome in _SUCCESS:  # os._exit(0): no state is left
            fault = CodeError("SystemExit", "the cell ended its process", None, "")
            result = dataclasses.replace(result, outcome=Outcome.MODEL_ERROR, error=fault)
        return result, None

    def _make_room(self) -> None:
        """Drop the oldest processes, but never that of the present state."""
        limits = self._sandbox.limits
        live = [cell for cell in self._cells if cell.state is not None]
        held = sum(cell.held for cell in live)
        dropped: list[int] = []
        while len(live) > 1 and (len(live) > limits.states or held > limits.states_memory):
            oldest = live.pop(0)
            held -= oldest.held
            assert oldest.state is not None
            dropped.append(oldest.state)
            oldest.state = None
        if self._host is not None:
            self._host.drop(dropped)

    def _lose(self) -> None:
        for cell in self._cells:
            cell.state = None
        host, self._host = self._host, None
        if host is not None:
            host.close()

    def _broken(self, reason: str, replayed: bool) -> RunResult:
        """Only the model's own code can have done this."""
        assert self._sandbox.tier is not None
        fault = CodeError("SessionBroken", f"the session's state is gone: {reason}", None, "")
        outcome, tier = Outcome.MODEL_ERROR, self._sandbox.tier
        return RunResult(outcome, "", "", fault, tier, 0.0, 0.0, 0, 0, replayed)


class _DivergedError(Exception):
    """A replayed cell did something else than before."""


def _digest(result: RunResult) -> str:
    text = f"{result.outcome} {result.bytes_cut} {result.stdout}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
