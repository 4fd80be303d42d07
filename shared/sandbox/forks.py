"""Forks beside the process that makes them: the new one's parent is the maker's parent.

As os.fork, less what that does for other threads (there are none: `cells._join_threads`), which
in a child would touch 200 pages, and every page touched is copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from shared.sandbox import confine, syscalls

_CLONE = syscalls.GUARDED.get("clone", -1)
_PR_GET_TID_ADDRESS = 40
_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: the fork needs it
_libc.syscall.restype = ctypes.c_long


def beside(flags: int) -> Callable[[], int]:
    """A function that forks: 0 in the new process, its pid in this one. It raises OSError.

    `flags`: confine.OF_SESSION or OF_ZYGOTE, which filters of system calls tell apart.
    """
    tid = ctypes.c_ulong()  # where libc keeps the thread's id; unknown: 0
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0):
        tid.value = 0
    here, tls = ctypes.c_void_p(tid.value), ctypes.c_void_p()
    pointers = (here, tls) if syscalls.MACHINE == "x86_64" else (tls, here)
    arguments = (_CLONE, ctypes.c_ulong(flags), None, None, *pointers)
    return lambda: confine.check(int(_libc.syscall(*arguments)), "fork")
