"""The inside of a session: a chain of states, each a process forked from the one before it.

A state waits for a cell, forks, and the child runs it. A cell that succeeds becomes the next state
and waits in its turn; one that fails dies, and the state before it is as it was: rollback is exact.
Files in the session's directory are shared by all states and are not rolled back.

A fork needs the permission of the session's owner (seccomp listener), who gives one per cell.
"""

from __future__ import annotations

import os
import random
import resource
import socket
import types
from typing import NoReturn

from shared.sandbox import child, confine
from shared.sandbox.packets import receive, send

_SOCKET = 4


def serve(module: types.ModuleType, listener: int | None) -> NoReturn:
    """State 0: nothing has run yet. Hands the fork listener to the owner before any cell."""
    owner = _owner()
    send(owner, {"hello": True}, [] if listener is None else [listener])
    if listener is not None:
        os.close(listener)
    while True:
        packet = receive(owner)
        if not packet.fds:
            os._exit(0)
        fds = packet.fds
        code, out, err, facts, following = fds
        draws = random.getstate()  # the fork reseeds `random`
        try:
            pid = os.fork()
        except OSError as error:
            send(owner, {"failed": str(error)}, [])
            pid = -1
        if pid == 0:
            owner.close()
            confine.die_with_parent()
            source = child.read_all(code)
            child.arrange_descriptors(0, out, err, facts, following)
            random.setstate(draws)
            owner = _run_cell(module, source)
            continue
        for fd in fds:
            os.close(fd)
        if pid > 0:
            _, status, usage = os.wait4(pid, 0)
            cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
            send(owner, {"status": status, "cpu": cpu, "memory": memory}, [])


def _owner() -> socket.socket:
    """Family and type are given, because to ask for them is not allowed."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=os.dup(_SOCKET))


def _run_cell(module: types.ModuleType, source: bytes) -> socket.socket:
    """Returns the socket of the new state; a failed cell ends its process here."""
    owner = _owner()
    send(owner, {"hello": True}, [])  # the kernel tells the owner this process's pid
    if not receive(owner).body:  # it holds on to this process now; until then the pid must not die
        os._exit(0)
    os.write(child.FACTS, child.STARTED)
    status = child.run_source(module, source, child.FACTS)
    child.flush()
    if status:
        os._exit(status)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    for fd in (1, 2, child.FACTS):
        os.dup2(0, fd)
    send(owner, {"kept": True, "memory": usage.ru_maxrss * 1024}, [])
    return owner
