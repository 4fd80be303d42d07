"""The inside of a session: states, each a process forked from the one that it stands on.

A state waits for a cell, forks, and the child runs it. A cell that succeeds becomes a state itself
and waits in its turn; one that fails dies, and the state before it is as it was: rollback is exact.
A session has no writable directory, so memory is all that there is to take back.

Contract with the zygote (hosted.py), at the other end of a state's socket:
- The fork is made beside the state, not below it (CLONE_PARENT): every state is the zygote's own
  child, which alone sees how it ended, and no state is needed for another one to live.
- A new process says hello and waits. Its pid cannot be anyone else's until the zygote, its parent,
  has reaped it; only when the zygote holds a pidfd of it does it let it go on.
- A state that waits is stopped (SIGSTOP): whatever a cell left running in it does nothing.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import random
import resource
import socket
import sys
import threading
import types
from typing import TYPE_CHECKING, NoReturn

from shared.sandbox import child, confine, syscalls
from shared.sandbox.packets import receive, send

if TYPE_CHECKING:
    from shared.sandbox.zygote import Jail

_SOCKET = 4
_CLONE = syscalls.GUARDED.get("clone", -1)
_PR_GET_TID_ADDRESS = 40
_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: the fork needs it
_libc.syscall.restype = ctypes.c_long
_python = ctypes.pythonapi


class ThreadsLeftError(RuntimeError):
    """A fork takes one thread along. Raised into a cell that leaves others running."""

    __module__ = "builtins"  # where the model is shown its name


def serve(jail: Jail, module: types.ModuleType) -> NoReturn:
    """State 0: nothing has run yet."""
    tid = ctypes.c_ulong()
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0):
        tid.value = 0
    state = _own_socket()
    send(state, {"hello": True})
    while True:
        packet = receive(state)
        if not packet.fds:
            os._exit(0)
        fds = packet.fds
        code, out, err, facts, following = fds
        draws = random.getstate()  # the fork reseeds `random`
        try:
            pid = _fork_beside(tid.value)
        except OSError as error:
            send(state, {"failed": str(error)})
            pid = -1
        if pid == 0:
            state.close()
            confine.die_with_parent(jail.zygote)
            source = child.read_all(code)
            child.arrange_descriptors(0, out, err, facts, following)
            random.setstate(draws)
            state = _run_cell(module, source)
            continue
        for fd in fds:
            os.close(fd)


def _own_socket() -> socket.socket:
    """Family and type are given, because to ask for them is not allowed."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=os.dup(_SOCKET))


def _fork_beside(tid: int) -> int:
    """As os.fork, but the child's parent is this process's parent. Raises OSError.

    The hooks are those of os.fork. `tid` is where libc keeps the thread's id (0: unknown), so that
    the child's libc knows its own. What os.fork does besides concerns other threads: none is left.
    """
    child_tid, tls = (tid, 0) if syscalls.MACHINE == "x86_64" else (0, tid)
    flags = confine.FORK_BESIDE
    _python.PyOS_BeforeFork()
    pointers = (None, None, ctypes.c_void_p(child_tid), ctypes.c_void_p(tls))
    pid = int(_libc.syscall(_CLONE, ctypes.c_ulong(flags), *pointers))
    if pid == 0:
        _python.PyOS_AfterFork_Child()
        return 0
    _python.PyOS_AfterFork_Parent()
    return confine.check(pid, "fork")


def _run_cell(module: types.ModuleType, source: bytes) -> socket.socket:
    """Returns the socket of the new state; a failed cell ends its process here."""
    state = _own_socket()
    send(state, {"hello": True})
    if not receive(state).body:
        os._exit(0)
    os.write(child.FACTS, child.STARTED)
    status = child.run_source(module, source, child.FACTS, then=_join_threads)
    child.flush()
    if status:
        os._exit(status)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    for fd in (1, 2, child.FACTS):
        os.dup2(0, fd)
    send(state, {"kept": True, "memory": usage.ru_maxrss * 1024})
    return state


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
