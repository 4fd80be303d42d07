"""The warm interpreter that runs are forked from. It does nothing else.

Contract:
- The warden (warden.py) forks it before anything is imported; it imports and warms what runs will
  need, and says {"ready"} with the listener of `confine.supervise`, or {"failed"}.
- From then on a packet on its channel (see `order`) is one fork, answered by the pid, or minus an
  errno. The new process is no child of this one but the warden's own (CLONE_PARENT).
- It never runs model code itself, so it never hangs and is never lost. It ends with the warden.

Whatever it writes between two forks lies in a page that has to be copied, and in a huge page that
falls apart, which makes the next fork dearer. So what can be done elsewhere is not done here.
"""

from __future__ import annotations

import errno
import importlib
import os
import site
import socket
import types
from collections.abc import Mapping
from typing import Any, NoReturn

from shared.sandbox import child, confine, fixed, forks, pages
from shared.sandbox.jail import Jail, Room
from shared.sandbox.packets import descriptors, send
from shared.sandbox.result import Tier

_OBJECTS = 48 << 20  # bytes that what is preloaded may take, less what is no small object
_SPACE = socket.CMSG_SPACE(3 * 4)
_SESSION = b"session="
_SOCKET, _RULESET, _DIRECTORY = b"socket", b"ruleset", b"directory"


def be(channel: socket.socket, config: Mapping[str, Any], warden: int) -> NoReturn:
    """Become the zygote, in a process that was forked for it. Never returns."""
    try:
        try:
            tier = Tier(config["tier"])
            if tier is not Tier.A:  # where nobody outlives the warden
                confine.die_with_parent(warden)
            warm(config["preload"], config["warmup"])
            fixed.install()
            child.prepare()
            jail = Jail.make(tier, config["limits"], warden)
            listeners: list[int] = []
            if tier is not Tier.D:
                listeners.append(confine.supervise())
            pages.settle()
        except Exception as error:  # noqa: BLE001  whatever it was, it is reported
            send(channel, {"failed": f"{type(error).__name__}: {error}"[:2000]})
        else:
            send(channel, {"ready": True}, listeners)
            for listener in listeners:
                os.close(listener)
            _serve(channel, jail)
    finally:
        os._exit(70)


def warm(modules: list[str], source: str) -> None:
    """Import, then compute once: the first sympy operation costs ten times the second."""
    kept = pages.reserve(_OBJECTS)
    for name in modules:
        importlib.import_module(name)
    site.setquit()  # `exit` and `quit`, which -S leaves out
    scope = types.ModuleType("warmup")
    exec(compile(source, "<warmup>", "exec"), scope.__dict__)  # noqa: S102  our own text
    del kept, scope


def _serve(channel: socket.socket, jail: Jail) -> None:
    fork = forks.beside(confine.OF_ZYGOTE)
    while True:
        body, ancillary, _, _ = channel.recvmsg(1024, _SPACE, socket.MSG_CMSG_CLOEXEC)
        fds = descriptors(ancillary[0][2]) if ancillary else []
        if not body:
            return
        try:
            pid = fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            _begin(jail, body, fds)
        for fd in fds:
            os.close(fd)
        channel.send(b"%d" % pid)


# ---- what the warden asks for, and what the new process makes of it ------------------------------


RUN, CHECK, CHECK_SESSION, NOTHING = b"run", b"check", b"check-session", b"nothing"


def session(seed: int) -> bytes:
    return b"%b%d" % (_SESSION, seed)


def order(
    channel: socket.socket, what: bytes, room: Room, sock: socket.socket | None = None
) -> None:
    """Ask for a process in `room`: a RUN or a `session`'s first state, which is told what to do on
    `sock`; one that tries what it must not be able to do (CHECK); one that ends at once (NOTHING).
    """
    with room.opened() as directory:
        given = {_SOCKET: -1 if sock is None else sock.fileno(), _RULESET: room.ruleset,
                 _DIRECTORY: directory}  # fmt: skip
        there = {name: fd for name, fd in given.items() if fd >= 0}
        socket.send_fds(channel, [b" ".join((what, *there))], list(there.values()))


def answer(channel: socket.socket) -> int:
    """The pid of what was ordered. Raises OSError where it could not be made."""
    told = int(channel.recv(32) or -errno.ESRCH)
    if told < 0:
        raise OSError(-told, os.strerror(-told))
    return told


def _begin(jail: Jail, body: bytes, fds: list[int]) -> NoReturn:
    leave, status = os._exit, 70
    try:
        what, *names = body.split()
        given = dict(zip(names, fds, strict=True))
        ruleset, directory = given.get(_RULESET, -1), given.get(_DIRECTORY, -1)
        if directory >= 0:
            os.fchdir(directory)
        if what == NOTHING:
            status = 0
        elif what in (CHECK, CHECK_SESSION):
            is_session = what == CHECK_SESSION
            status = child.try_forbidden(jail, ruleset, directory >= 0, session=is_session)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=given[_SOCKET])
            if what == RUN:
                child.wait(jail, ruleset, sock)
            child.host(jail, ruleset, int(what.removeprefix(_SESSION)), sock)
    finally:
        leave(status)
