"""The life of one run, after the fork: confine, seed, execute, report, exit.

What the model's code can reach in here it may change; nothing in here is trusted by anyone outside.
The outcome is judged by the exit status that the warden's `wait4` sees. `facts` (the exception) are
read as a claim of the run about itself.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import fcntl
import io
import json
import linecache
import logging
import os
import socket
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from shared.sandbox import cells, confine, fixed, forks
from shared.sandbox.packets import receive
from shared.sandbox.result import Tier

if TYPE_CHECKING:
    from shared.sandbox.jail import Jail

NAME = "<code>"
FACTS = 3  # descriptor; 0 to 2 are the standard streams, 4 is a session's socket
STARTED = b"R"  # first byte of the facts: the confinement holds, what follows is the model's own
_MAX_FACTS = 48 << 10
_LIFE = 24 * 3600  # RLIMIT_CPU of any one state; the cells' own timeouts are kept from outside


def wait(jail: Jail, ruleset: int, sock: socket.socket) -> NoReturn:
    """A run, from its fork to its end, forked before anybody has asked for it. On `sock` comes the
    request, with code, stdout, stderr, facts. Never returns, whatever happens: the caller's stack
    is the zygote's. An error before the model's code starts is told in place of STARTED."""
    leave, status, facts = os._exit, 70, -1  # by names that model code does not reach
    try:
        jail.enter(ruleset)
        arrange_descriptors(0, 1, 2, sock.fileno())  # all others are the zygote's
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=os.dup(3))
        rehearse()
        packet = receive(sock)
        if not packet.fds:
            leave(0)  # not needed any more
        code, out, err, facts = packet.fds
        request, source = packet.json(), read_all(code)
        arrange_descriptors(0, out, err, facts)
        facts = FACTS
        fixed.seed(request["seed"])
        jail.lock(request["cpu"], session=False)
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        os.write(facts, STARTED)
        status = _execute(module, source)
    except BaseException as error:  # noqa: BLE001  last resort of a process that must not go on
        os.write(facts, f"E{type(error).__name__}: {error}".encode())
    finally:
        leave(status)


def host(jail: Jail, ruleset: int, seed: int, sock: socket.socket) -> NoReturn:
    """State 0 of a session, from its fork on; `sock` is where it is told what to do."""
    leave = os._exit
    try:
        jail.enter(ruleset)
        arrange_descriptors(0, 0, 0, 0, sock.fileno())
        fork = forks.beside(confine.OF_SESSION)  # which asks the kernel what `lock` forbids to ask
        fixed.seed(seed)
        jail.lock(_LIFE, session=True)
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        cells.serve(jail, fork, module)
    finally:
        leave(70)


def rehearse() -> None:
    """Do what every run does, to no effect. A page that is written is copied then, and that takes
    more time than all else: better while nobody waits."""
    fixed.seed(0)
    run_source(types.ModuleType("__main__"), b"print(0)", 2)
    flush()


def _execute(module: types.ModuleType, source: bytes) -> int:
    """Run a whole program in `module`, and end it as an interpreter would. Its exit status."""
    status = run_source(module, source, FACTS)
    with contextlib.suppress(BaseException):  # what exit handlers raise changes nothing
        if _work_at_exit() != _NO_WORK:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at exit
            atexit._run_exitfuncs()
    flush()
    return status


_NO_WORK: list[int] = []  # `_work_at_exit` of a zygote: then its runs need not go through all of it


def _work_at_exit() -> list[int]:
    """Numbers that change with every thread, exit handler, finaliser and log that code adds."""
    return [
        _thread._count(),
        len(threading._threading_atexits),  # type: ignore[attr-defined]
        atexit._ncallbacks(),
        len(weakref.finalize._registry),  # type: ignore[attr-defined]
        len(logging._handlerList),  # type: ignore[attr-defined]
    ]


def run_source(
    module: types.ModuleType, source: bytes, facts: int, then: Callable[[], None] | None = None
) -> int:
    """Exit status of the program, with `then` at its end: 0, 1 for an uncaught exception, or what
    it asked for."""
    try:
        text = source.decode("utf-8", "surrogatepass")
        linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)
        exec(compile(text, NAME, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        if then is not None:
            then()
    except SystemExit as error:
        if error.code is None or error.code == 0:
            return 0
        if isinstance(error.code, int):
            _report(facts, error)
            return error.code & 0xFF or 1
        _report(facts, error)
        return 1
    except BaseException as error:  # noqa: BLE001  everything that model code raises is its result
        _report(facts, error)
        return 1
    return 0


def _report(facts: int, error: BaseException) -> None:
    """Type, message, line and traceback of an exception, to the facts pipe and to stderr."""
    try:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == NAME]
        final = "".join(traceback.format_exception_only(type(error), error)).rstrip("\n")
        shown = "".join(traceback.format_list(frames))
        head = "Traceback (most recent call last):\n" if frames else ""
        if isinstance(error, SyntaxError) and error.filename == NAME:
            line = error.lineno
            message = str(error.msg)
        else:
            line = frames[-1].lineno if frames else None
            message = str(error)
        text = f"{head}{shown}{final}"
        body = {
            "type": type(error).__name__[:200],
            "message": message[-8000:],
            "line": line,
            "traceback": text[-16000:],
        }
        sys.stderr.write(text[-16000:] + "\n")
    except BaseException as second:  # noqa: BLE001  its __str__ may raise anything, or memory is out
        body = {"type": type(error).__name__[:200], "message": type(second).__name__, "line": None,
                "traceback": ""}  # fmt: skip
    with contextlib.suppress(OSError):  # it has closed it
        os.write(facts, json.dumps(body).encode()[:_MAX_FACTS])


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: BLE001  replaced by the code: its own loss
            continue


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def arrange_descriptors(*fds: int) -> None:
    """Make `fds` the descriptors 0, 1, 2, …, and close every other one."""
    lifted = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(fds)) for fd in fds]
    for target, fd in enumerate(lifted):
        os.dup2(fd, target, inheritable=target <= 2)
    os.closerange(len(fds), 1 << 16)


# ---- in the zygote, for all runs ----------------------------------------------------------------


def arrange_standard() -> None:
    """Standard input is /dev/null, of the jail and not of the host."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)


def prepare() -> None:
    """Once all is imported: what runs would otherwise do each."""
    _open_streams()
    _NO_WORK[:] = _work_at_exit()
    rehearse()


def _open_streams() -> None:
    """Text streams on 0, 1 and 2. What cannot be encoded is written as an escape, never an error;
    lines are passed on at once, so that a run that is killed keeps what it printed."""
    source, sink = os.pipe()  # as a run's will be: a stream remembers whether it can be rewound
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for name, fd in (("stdout", 1), ("stderr", 2)):
        before = os.dup(fd)
        os.dup2(sink, fd)
        raw = io.FileIO(fd, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        stream.seekable()
        os.dup2(before, fd)
        os.close(before)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.close(source)
    os.close(sink)


# ---- the self-check of a tier -------------------------------------------------------------------

FORBIDDEN = {
    10: "a socket could be made",
    11: "a process could be made",
    12: "a program could be started",
    13: "/etc could be listed",
    14: "a file could be made outside of the run's own directory",
    15: "another process could be signalled",
    16: "the run's own directory is not writable",
    17: "the confinement could not be applied",
    18: "a session could make a file",
}


def try_forbidden(jail: Jail, ruleset: int, in_own: bool, *, session: bool) -> int:
    """Confine this process, then try to break out. Returns 0 or a key of FORBIDDEN. `in_own`: the
    working directory is one that a run may write in, and a session may not."""
    try:
        jail.enter(ruleset)
        jail.lock(10, session=session)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
        return 17
    attempts: list[tuple[int, Callable[[], object]]] = [
        (10, lambda: socket.socket(socket.AF_INET)),
        (11, os.fork),
        (12, lambda: os.execv("/bin/true", ["true"])),
        (14, lambda: _create(Path("/tmp/outside"))),
        (15, lambda: os.kill(os.getppid(), 0)),
    ]
    if jail.tier is not Tier.C:
        attempts += [(13, lambda: os.listdir("/etc"))]  # noqa: PTH208
    if in_own:
        attempts += [(14, lambda: _create(Path("../outside")))]
        if session:
            attempts += [(18, lambda: _create(Path("inside")))]
    for number, attempt in attempts:
        try:
            attempt()
        except OSError:
            continue
        return number
    if in_own and not session:
        try:
            _create(Path("inside"))
        except OSError:
            return 16
    return 0


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
