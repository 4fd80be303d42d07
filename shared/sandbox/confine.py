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


def limit(memory: int, file_size: int, open_files: int, cpu: int) -> None:
    """Hard rlimits. `memory` is the whole address space, bytes; `cpu` whole seconds."""
    for which, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
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


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Only `readable` may be read and only `writable` written; no TCP (ABI 4), no signals and no
    abstract sockets outwards (ABI 6). Paths that do not exist are skipped."""
    abi = landlock_abi()
    handled = (1 << _FS_RIGHTS.get(abi, 16)) - 1
    truncate = _TRUNCATE if abi >= TRUNCATE_ABI else 0
    attributes = struct.pack("=Q", handled)
    if abi >= 4:
        attributes += struct.pack("=Q", 3)  # bind and connect
    if abi >= 6:
        attributes += struct.pack("=Q", 3)  # abstract unix sockets, signals
    ruleset = check(
        libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock ruleset"
    )
    for paths, rights in ((readable, _READ), (writable, _READ | _WRITE | truncate)):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            granted = rights if os.path.isdir(path) else rights & _FILE_ONLY  # noqa: PTH112
            rule = struct.pack("=Qi", granted, fd)
            check(libc.syscall(445, ruleset, 1, rule, 0), f"landlock rule {path}")
            os.close(fd)
    check(libc.syscall(446, ruleset, 0), "landlock restrict")
    os.close(ruleset)


# ---- seccomp: hand-assembled classic BPF ---------------------------------------------------------

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _NOTIFY, _KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
_EPERM, _EROFS, _ENOSYS = 0x00050000 | 1, 0x00050000 | 30, 0x00050000 | 38
_NR, _ARCH = 0, 4
_CLONE_VM, _CLONE_THREAD, CLONE_PARENT = 0x100, 0x10000, 0x8000
_CLONE_NEW = 0x7E020080  # any namespace
CLONE_TID = 0x1000000 | 0x200000  # CHILD_SETTID, CHILD_CLEARTID: what libc's fork asks for
FORK_BESIDE = CLONE_PARENT | CLONE_TID | signal.SIGCHLD  # the one fork that a session has
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FION* FIO*CLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_?ETFD, F_?ETFL, F_DUPFD_CLOEXEC: no locks, no leases
_CHANGES = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR (O_TMPFILE has it), O_CREAT, O_TRUNC

_Instruction = tuple[int, int, int, int]


def _argument(index: int) -> int:
    return 16 + 8 * index  # offset of its low half in seccomp_data (little endian)


def _ret(value: int) -> _Instruction:
    return (_RETURN, 0, 0, value)


def _block(name: str, *body: _Instruction) -> list[_Instruction]:
    """`body` for the call `name`, which must return; every jump stays inside its block."""
    return [(_EQUAL, 0, len(body), syscalls.GUARDED[name]), *body]


def _one_of(name: str, argument: int, values: tuple[int, ...]) -> list[_Instruction]:
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return _block(name, (_LOAD, 0, 0, _argument(argument)), *tests, _ret(_EPERM), _ret(_ALLOW))


def _program(forks: bool, writes: bool) -> list[_Instruction]:
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, syscalls.AUDIT_ARCH),
        _ret(_KILL),
        (_LOAD, 0, 0, _NR),
    ]
    if syscalls.MACHINE == "x86_64":  # the x32 calls have other numbers and the same arch
        program += [(_GREATER_EQUAL, 0, 1, 0x40000000), _ret(_EPERM)]
    program += _block("clone3", _ret(_ENOSYS))  # flags lie in memory; libc falls back to clone
    program += _block(
        "clone",
        (_LOAD, 0, 0, _argument(0)),
        (_ANY_BIT, 4, 0, _CLONE_NEW),
        (_EQUAL, 2, 0, FORK_BESIDE if forks else _CLONE_NEW),  # the latter was refused above
        (_ANY_BIT, 0, 2, _CLONE_THREAD),
        (_ANY_BIT, 0, 1, _CLONE_VM),
        _ret(_ALLOW),  # as far as this filter goes; `supervise` has counted it
        _ret(_EPERM),
    )
    program += _one_of("ioctl", 1, _IOCTLS)
    program += _one_of("fcntl", 1, _FCNTLS)
    program += _one_of("prlimit64", 0, (0, os.getpid()))
    for name, argument in (("open", 1), ("openat", 2)):
        if name in syscalls.GUARDED:
            test = (_ANY_BIT, 0, 1, 0 if writes else _CHANGES)
            program += _block(
                name, (_LOAD, 0, 0, _argument(argument)), test, _ret(_EROFS), _ret(_ALLOW)
            )
    if forks:
        program += _block(
            "prctl",
            (_LOAD, 0, 0, _argument(0)),
            (_EQUAL, 0, 2, _PR_SET_PDEATHSIG),  # to set it, never to clear it
            (_LOAD, 0, 0, _argument(1)),
            (_EQUAL, 3, 2, signal.SIGKILL),
            (_EQUAL, 2, 0, _PR_SET_NAME),
            (_EQUAL, 1, 0, _PR_GET_NAME),
            _ret(_EPERM),
            _ret(_ALLOW),
        )
        for name in ("sendmsg", "recvmsg"):
            program += _block(name, _ret(_ALLOW))
    else:
        program += _one_of("prctl", 0, (_PR_SET_NAME, _PR_GET_NAME))
        program += _one_of("tgkill", 0, (os.getpid(),))  # abort() and raise()
    allowed = sorted((syscalls.ALLOWED | (syscalls.CHANGING if writes else {})).values())
    tests = [(_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    return [*program, *tests, _ret(_EPERM), _ret(_ALLOW)]


def _install(program: list[_Instruction], flags: int) -> int:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    return check(libc.syscall(syscalls.SECCOMP, 1, flags, fprog), "seccomp")


def seccomp(*, forks: bool, writes: bool) -> None:
    """Only the calls of `syscalls` from here on. `forks`: a session may fork; `writes`: files may
    be opened for writing and changed, as far as other walls let it."""
    _install(_program(forks, writes), 0)


def supervise() -> int:
    """From here on, starting a thread and forking beside oneself (CLONE_PARENT) wait, in every
    process forked from this one, for the holder of the returned descriptor (see `permit`). After
    `isolate`."""
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 5, syscalls.AUDIT_ARCH),
        (_LOAD, 0, 0, _NR),
        (_EQUAL, 0, 3, syscalls.GUARDED["clone"]),
        (_LOAD, 0, 0, _argument(0)),
        (_ANY_BIT, 0, 1, _CLONE_THREAD | CLONE_PARENT),
        _ret(_NOTIFY),
        _ret(_ALLOW),
    ]
    listener = _install(program, 1 << 3)  # SECCOMP_FILTER_FLAG_NEW_LISTENER
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
