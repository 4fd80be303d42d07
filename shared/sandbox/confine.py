"""Confinement of one process by itself: capabilities, rlimits, Landlock, seccomp. No privileges.

Runs inside the zygote's children, so: standard library only. Every step either takes hold or raises
OSError; nothing is skipped here. Which steps a tier has is decided by the caller.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterable

from shared.sandbox import syscalls

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_GET_NAME = 1, 4, 15, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE = 38, 41


def check(result: int, what: str) -> int:
    """Raises OSError for a libc call that returned -1."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def die_with_parent(parent: int) -> None:
    """`parent`: its pid as this process must see it; if it is another by now, it is too late."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(70)


def small_pages() -> None:
    """No transparent huge pages: a page fault then stands for one page of memory."""
    _prctl(_PR_SET_THP_DISABLE, 1)


def drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    check(libc.capset(header, bytes(24)), "capset")


def allowed(which: int, value: int) -> int:
    """`value` for an rlimit, or less where the host allows less."""
    _, hard = resource.getrlimit(which)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def limit(which: int, value: int) -> None:
    """A hard rlimit."""
    resource.setrlimit(which, (value, value))


def isolate() -> None:
    """No new privileges; no ptrace or /proc access from processes of the same user."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)


# ---- Landlock (linux/landlock.h) ----------------------------------------------------------------

_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
# WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8
_TRUNCATE = 1 << 14
TRUNCATE_ABI = 3  # from here on Landlock also minds truncation
_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # ABI -> number of file-system rights
_FILE_ONLY = 1 << 1 | 1 << 2 | _TRUNCATE


def landlock_abi() -> int:
    """0 where the kernel has no Landlock."""
    return max(0, int(libc.syscall(444, None, ctypes.c_size_t(0), 1)))


Rule = tuple[int, int]  # rights, and a descriptor of the path that has them


def rules(readable: Iterable[str], writable: Iterable[str] = ()) -> list[Rule]:
    """What `ruleset` takes. Paths that do not exist are skipped."""
    truncate = _TRUNCATE if landlock_abi() >= TRUNCATE_ABI else 0
    found = []
    for paths, rights in ((readable, _READ), (writable, _READ | _WRITE | truncate)):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            found.append((rights if os.path.isdir(path) else rights & _FILE_ONLY, fd))  # noqa: PTH112
    return found


def ruleset(rules: Iterable[Rule]) -> int:
    """A descriptor for `restrict`: what has a rule may be used so, and nothing else; no TCP
    (ABI 4), no signals and no abstract sockets outwards (ABI 6)."""
    abi = landlock_abi()
    attributes = struct.pack("=Q", (1 << _FS_RIGHTS.get(abi, 16)) - 1)
    if abi >= 4:
        attributes += struct.pack("=Q", 3)  # bind and connect
    if abi >= 6:
        attributes += struct.pack("=Q", 3)  # abstract unix sockets, signals
    made = check(
        libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock ruleset"
    )
    os.set_inheritable(made, False)
    for rights, fd in rules:
        check(libc.syscall(445, made, 1, struct.pack("=Qi", rights, fd), 0), "landlock rule")
    return made


def restrict(ruleset: int) -> None:
    """Landlock, for this process and for good. After `isolate`."""
    check(libc.syscall(446, ruleset, 0), "landlock restrict")


# ---- seccomp: hand-assembled classic BPF ---------------------------------------------------------

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _NOTIFY, _KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
_EPERM, _EROFS, _ENOSYS = 0x00050000 | 1, 0x00050000 | 30, 0x00050000 | 38
_NR, _ARCH = 0, 4
_CLONE_VM, _CLONE_THREAD, _CLONE_PARENT = 0x100, 0x10000, 0x8000
_CLONE_NEW = 0x7E020080  # any namespace
_SET_TID, _CLEAR_TID = 0x1000000, 0x200000  # the former tells the new one's libc who it is
# The two forks that there are, see forks.py.
OF_SESSION = _CLONE_PARENT | _SET_TID | _CLEAR_TID | signal.SIGCHLD
OF_ZYGOTE = _CLONE_PARENT | _SET_TID | signal.SIGCHLD
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FION* FIO*CLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_?ETFD, F_?ETFL, F_DUPFD_CLOEXEC: no locks, no leases
_CHANGES = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR (O_TMPFILE has it), O_CREAT, O_TRUNC
_OWN_PID = 0xFFFF_FFF0  # no pid, and no other number of a filter: in its place comes the real one

_Instruction = tuple[int, int, int, int]
_Body = list[_Instruction]  # of one system call: returns, and jumps only inside itself


def _argument(index: int) -> int:
    return 16 + 8 * index  # offset of its low half in seccomp_data (little endian)


def _ret(value: int) -> _Instruction:
    return (_RETURN, 0, 0, value)


def _one_of(argument: int, values: tuple[int, ...]) -> _Body:
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(_LOAD, 0, 0, _argument(argument)), *tests, _ret(_EPERM), _ret(_ALLOW)]


def _guarded(forks: bool, writes: bool) -> dict[str, _Body]:
    """Calls whose arguments decide."""
    bodies = {
        "clone3": [_ret(_ENOSYS)],  # flags lie in memory; libc falls back to clone
        "clone": [
            (_LOAD, 0, 0, _argument(0)),
            (_ANY_BIT, 4, 0, _CLONE_NEW),
            (_EQUAL, 2, 0, OF_SESSION if forks else _CLONE_NEW),  # the latter was refused above
            (_ANY_BIT, 0, 2, _CLONE_THREAD),
            (_ANY_BIT, 0, 1, _CLONE_VM),
            _ret(_ALLOW),  # as far as this filter goes; `supervise` has counted it
            _ret(_EPERM),
        ],
        "ioctl": _one_of(1, _IOCTLS),
        "fcntl": _one_of(1, _FCNTLS),
        "prlimit64": _one_of(0, (0, _OWN_PID)),
    }
    for name, argument in (("open", 1), ("openat", 2)):
        test = (_ANY_BIT, 0, 1, 0 if writes else _CHANGES)
        bodies[name] = [(_LOAD, 0, 0, _argument(argument)), test, _ret(_EROFS), _ret(_ALLOW)]
    if not forks:
        bodies["prctl"] = _one_of(0, (_PR_SET_NAME, _PR_GET_NAME))
        bodies["tgkill"] = _one_of(0, (_OWN_PID,))  # abort() and raise()
        return bodies
    bodies["prctl"] = [
        (_LOAD, 0, 0, _argument(0)),
        (_EQUAL, 0, 2, _PR_SET_PDEATHSIG),  # to set it, never to clear it
        (_LOAD, 0, 0, _argument(1)),
        (_EQUAL, 3, 2, signal.SIGKILL),
        (_EQUAL, 2, 0, _PR_SET_NAME),
        (_EQUAL, 1, 0, _PR_GET_NAME),
        _ret(_EPERM),
        _ret(_ALLOW),
    ]
    return bodies | {"sendmsg": [_ret(_ALLOW)], "recvmsg": [_ret(_ALLOW)]}


def _program(forks: bool, writes: bool) -> _Body:
    """Every call of the tables by its body, and all others refused: those of x32, which has the
    same architecture and numbers from 1 << 30 on, among them."""
    allowed = syscalls.ALLOWED | (syscalls.CHANGING if writes else {})
    bodies = {number: [_ret(_ALLOW)] for number in allowed.values()}
    for name, body in _guarded(forks, writes).items():
        if name in syscalls.GUARDED:  # by this architecture
            bodies[syscalls.GUARDED[name]] = body
    refused = [_ret(_EPERM)]
    steps = [(0, bodies.get(0, refused))]
    for number in range(1, max(bodies) + 2):
        body = bodies.get(number, refused)
        if body != steps[-1][1]:
            steps.append((number, body))
    return [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, syscalls.AUDIT_ARCH),
        _ret(_KILL),
        (_LOAD, 0, 0, _NR),
        *_search(steps),
    ]


def _search(steps: list[tuple[int, _Body]]) -> _Body:
    """The body of the last step that is not above the number, by halves: the kernel walks through
    a new filter once for every call there is, so its depth is what it costs to install."""
    if len(steps) == 1:
        return steps[0][1]
    middle = len(steps) // 2
    below, above = _search(steps[:middle]), _search(steps[middle:])
    return [(_GREATER_EQUAL, len(below), 0, steps[middle][0]), *below, *above]


def _assemble(program: _Body) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _install(program: bytes, flags: int) -> int:
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    return check(libc.syscall(syscalls.SECCOMP, 1, flags, fprog), "seccomp")


def call_filter(*, forks: bool, writes: bool) -> bytes:
    """For `filter_calls`: only the calls of `syscalls`. `forks`: a session may fork; `writes`:
    files may be opened for writing and changed, as far as other walls let it."""
    return _assemble(_program(forks, writes))


def filter_calls(program: bytes) -> None:
    """Seccomp, for this process and for good. After `isolate`."""
    own = struct.pack("=I", os.getpid())
    _install(program.replace(struct.pack("=I", _OWN_PID), own), 0)


def supervise() -> int:
    """From here on, starting a thread and forking beside oneself (CLONE_PARENT) wait, in every
    process forked from this one, for the holder of the returned descriptor (see `permit`). Only the
    zygote's own forks do not; `call_filter` leaves them to nobody else. After `isolate`."""
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 6, syscalls.AUDIT_ARCH),
        (_LOAD, 0, 0, _NR),
        (_EQUAL, 0, 4, syscalls.GUARDED["clone"]),
        (_LOAD, 0, 0, _argument(0)),
        (_EQUAL, 2, 0, OF_ZYGOTE),
        (_ANY_BIT, 0, 1, _CLONE_THREAD | _CLONE_PARENT),
        _ret(_NOTIFY),
        _ret(_ALLOW),
    ]
    listener = _install(_assemble(program), 1 << 3)  # SECCOMP_FILTER_FLAG_NEW_LISTENER
    os.set_inheritable(listener, False)
    return listener


_NOTIF_RECV, _NOTIF_SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # SECCOMP_IOCTL_*, resp flag


def permit(listener: int, decide: Callable[[int, bool], bool]) -> None:
    """Answer the call that waits: `decide(thread id, is a thread)`; a refused one gets EAGAIN."""
    request = bytearray(80)  # struct seccomp_notif: id, pid, flags, then struct seccomp_data
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, request)
        identity, pid = struct.unpack_from("=QI", request)
        (flags,) = struct.unpack_from("=Q", request, 16 + _argument(0))
        granted = decide(pid, bool(flags & _CLONE_THREAD))
        reply = (0, 0, _CONTINUE) if granted else (0, -errno.EAGAIN, 0)
        fcntl.ioctl(listener, _NOTIF_SEND, bytearray(struct.pack("=QqiI", identity, *reply)))
    except OSError as error:
        if error.errno != errno.ENOENT:  # it died while it waited
            raise
