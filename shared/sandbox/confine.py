"""Confinement of one process by itself: capabilities, rlimits, Landlock, seccomp. No privileges.

Runs inside the zygote's children, so: standard library only. Every step either takes hold or raises
OSError; nothing is skipped here. Which steps a tier has is decided by the caller.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Iterable

from shared.sandbox import syscalls

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_GET_NAME = 1, 4, 15, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 38, 36


def check(result: int, what: str) -> int:
    """Raises OSError for a libc call that returned -1."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


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
    truncate = _TRUNCATE if abi >= 3 else 0
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
_EPERM, _ENOSYS = 0x00050000 | 1, 0x00050000 | 38
_NR, _ARCH = 0, 4
_CLONE_THREAD, _CLONE_VM = 0x10000, 0x100
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FION* FIO*CLEX

_Instruction = tuple[int, int, int, int]


def _argument(index: int) -> int:
    return 16 + 8 * index  # offset of its low half in seccomp_data (little endian)


def _program(forks: bool) -> list[_Instruction]:
    """Blocks of (test the number, test arguments, return); every jump stays inside its block."""
    guarded = syscalls.GUARDED

    def ret(value: int) -> _Instruction:
        return (_RETURN, 0, 0, value)

    def block(name: str, *body: _Instruction) -> list[_Instruction]:
        return [(_EQUAL, 0, len(body), guarded[name]), *body]

    def one_of(name: str, argument: int, values: tuple[int, ...]) -> list[_Instruction]:
        tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        return block(name, (_LOAD, 0, 0, _argument(argument)), *tests, ret(_EPERM), ret(_ALLOW))

    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, syscalls.AUDIT_ARCH),
        ret(_KILL),
        (_LOAD, 0, 0, _NR),
    ]
    if syscalls.MACHINE == "x86_64":  # the x32 calls have other numbers and the same arch
        program += [(_GREATER_EQUAL, 0, 1, 0x40000000), ret(_EPERM)]
    program += block("clone3", ret(_ENOSYS))  # its flags lie in memory; libc falls back to clone
    program += block(
        "clone",
        (_LOAD, 0, 0, _argument(0)),
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        ret(_ALLOW),
        (_ANY_BIT, 0, 1, _CLONE_VM),
        ret(_EPERM),
        ret(_NOTIFY if forks else _EPERM),
    )
    program += one_of("ioctl", 1, _IOCTLS)
    program += one_of("prlimit64", 0, (0, os.getpid()))
    if forks:
        program += block(
            "prctl",
            (_LOAD, 0, 0, _argument(0)),
            (_EQUAL, 0, 2, _PR_SET_PDEATHSIG),  # to set it, never to clear it
            (_LOAD, 0, 0, _argument(1)),
            (_EQUAL, 3, 2, signal.SIGKILL),
            (_EQUAL, 2, 0, _PR_SET_NAME),
            (_EQUAL, 1, 0, _PR_GET_NAME),
            ret(_EPERM),
            ret(_ALLOW),
        )
        for name in ("wait4", "sendmsg", "recvmsg"):
            program += block(name, ret(_ALLOW))
    else:
        program += one_of("prctl", 0, (_PR_SET_NAME, _PR_GET_NAME))
        program += one_of("tgkill", 0, (os.getpid(),))  # abort() and raise()
    allowed = sorted(syscalls.ALLOWED.values())
    tests = [(_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    return [*program, *tests, ret(_EPERM), ret(_ALLOW)]


def seccomp(forks: bool) -> int | None:
    """Install the filter. `forks`: a fork waits for the permission of whoever holds the returned
    listener; without it no process can be made at all and None is returned."""
    instructions = _program(forks)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    flags = 1 << 3 if forks else 0  # SECCOMP_FILTER_FLAG_NEW_LISTENER
    result = check(libc.syscall(syscalls.SECCOMP, 1, flags, fprog), "seccomp")
    return result if forks else None
