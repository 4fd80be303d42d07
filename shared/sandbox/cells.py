"""The inside of a session: states, and the one process that goes from state to state.

A state that is asked for a cell first leaves a copy of itself behind: that is the state from then
on. Then it runs the cell itself. If the cell succeeds it is the next state and waits in its turn;
if it fails it dies, and the copy is as it was: rollback is exact. A session has no writable
directory, so memory is all that there is to take back.

It is not the copy that runs the cell, because a fork of a fork of a fork takes the kernel longer
and longer (its anon_vma chains): at a depth of 30 five times as long.

Contract with the warden (hosted.py), at the other end of a state's socket:
- The fork is made beside the state, not below it (CLONE_PARENT): every state is the warden's own
  child, which alone sees how it ended, and no state is needed for another one to live.
- A new process says hello and waits. Its pid cannot be anyone else's until the warden, its parent,
  has reaped it. Only when the warden holds a pidfd of the copy, and has stopped it, does it say
  which cell is to be run: no copy ever knows.
- A state that waits is stopped (SIGSTOP): whatever a cell left running in it does nothing.
"""

from __future__ import annotations

import _thread
import os
import resource
import socket
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from shared.sandbox import child, confine
from shared.sandbox.packets import receive, send
from shared.sandbox.result import Tier

if TYPE_CHECKING:
    from shared.sandbox.jail import Jail

_SOCKET = 4


class ThreadsLeftError(RuntimeError):
    """A fork takes one thread along. Raised into a cell that leaves others running."""

    __module__ = "builtins"  # where the model is shown its name


def serve(jail: Jail, fork: Callable[[], int], module: types.ModuleType) -> NoReturn:
    """State 0: nothing has run yet."""
    state = _own_socket()
    send(state, {"hello": True})
    while True:
        packet = receive(state)
        if not packet.fds:
            os._exit(0)
        if len(packet.fds) == 1:
            state = _leave_copy(jail, fork, state, packet.fds[0])
        else:
            state.detach()  # it is closed with all that cells have opened, which copies would share
            _run_cell(module, packet.fds)
            state = _own_socket()
            usage = resource.getrusage(resource.RUSAGE_SELF)
            send(state, {"kept": True, "memory": usage.ru_maxrss * 1024})


def _leave_copy(
    jail: Jail, fork: Callable[[], int], state: socket.socket, following: int
) -> socket.socket:
    """The socket of the process that returns: in the copy it is `following`."""
    try:
        pid = fork()
    except OSError as error:
        send(state, {"failed": str(error)})
        pid = -1
    if pid == 0:
        state.close()
        if jail.tier is not Tier.A:  # as in Jail.enter
            confine.die_with_parent(jail.warden)
        os.dup2(following, _SOCKET)
        state = _own_socket()
        send(state, {"hello": True})
    os.close(following)
    return state


def _own_socket() -> socket.socket:
    """Family and type are given, because to ask for them is not allowed."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=os.dup(_SOCKET))


def _run_cell(module: types.ModuleType, fds: Sequence[int]) -> None:
    """`fds`: code, stdout, stderr, facts. Returns in what is the next state; a failed cell ends its
    process here."""
    code, *streams = fds
    source = child.read_all(code)
    for target, fd in enumerate(streams, start=1):
        os.dup2(fd, target, inheritable=target <= 2)
    os.closerange(_SOCKET + 1, 1 << 16)
    os.write(child.FACTS, child.STARTED)
    status = child.run_source(module, source, child.FACTS, then=_join_threads)
    child.flush()
    if status:
        os._exit(status)
    for fd in (1, 2, child.FACTS):
        os.dup2(0, fd)


def _join_threads() -> None:
    """Wait for threads as an interpreter does at its end; ThreadsLeftError for the others."""
    if (pools := sys.modules.get("concurrent.futures.thread")) is not None:
        pools._python_exit()  # ends the idle workers of every executor, as at the end
        vars(pools)["_shutdown"] = False  # but this was not the end
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    if left := _thread._count():
        raise ThreadsLeftError(f"the cell left {left} threads running; end and join them")
