"""Tier A: own user, mount, pid, network, IPC and UTS namespaces, by an ordinary user or root.

Inside there are no host processes, no network, and no files but the interpreter's, read-only, and
one small tmpfs. No helper program is needed (bubblewrap does the same from outside).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.sandbox.confine import check, die_with_parent, libc

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 0x1000, 0x4000, 1 << 18
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_READ_ONLY = struct.pack("=QQQQ", 1, 0, 0, 0)  # mount_attr: MOUNT_ATTR_RDONLY
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def enter(paths: Sequence[str], scratch: str, size: int, files: int) -> None:
    """Move this process into the jail. Returns in a child that is pid 1 there; the caller's own
    process stays outside, waits for the child and exits with it.

    `paths` (files or directories) appear read-only at their own places; `scratch` is a writable
    tmpfs of `size` bytes and `files` inodes. Raises OSError where the kernel or its policy refuses.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
    check(libc.unshare(flags), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")
    child = os.fork()
    if child:
        libc.syscall(436, 0, 0xFFFFFFFF, 0)  # close_range: hold nothing that another waits for
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    die_with_parent(0)  # which has no number in here
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    check(libc.sethostname(b"sandbox", 7), "sethostname")
    _build_root(paths, scratch, size, files)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
    )
    check(result, f"mount {target}")


def _build_root(paths: Sequence[str], scratch: str, size: int, files: int) -> None:
    """A tmpfs becomes the root. It is mounted over /tmp, and pivot_root lifts it away again, so
    that whatever lies in the host's /tmp can still be bound from the old root."""
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=4096,mode=755")
    Path("/tmp/.old").mkdir()
    machine = os.uname().machine
    check(libc.syscall(_PIVOT_ROOT[machine], b"/tmp", b"/tmp/.old"), "pivot_root")
    os.chdir("/")
    for path in (*paths, *_DEVICES):
        _expose(path)
    check(libc.umount2(b"/.old", 2), "umount the old root")  # MNT_DETACH
    Path("/.old").rmdir()
    Path(scratch).mkdir(parents=True, exist_ok=True)
    check(libc.syscall(442, -100, b"/", 0x8000, _READ_ONLY, ctypes.c_size_t(32)), "read-only root")
    options = f"size={size},nr_inodes={files},mode=700"
    _mount("tmpfs", scratch, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)  # stays writable


def _expose(path: str) -> None:
    """Bind `/.old<path>` at `path`; a symbolic link is copied as one."""
    source = Path("/.old" + path)
    target = Path(path)
    if target.exists():
        return  # inside a directory that is there already
    for parent in reversed(target.parents):
        parent.mkdir(exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if not source.exists():
        return
    if source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    _mount(str(source), path, "", _BIND | _REC)


def interpreter_paths(search: Sequence[str]) -> list[str]:
    """What a running interpreter may still read: its library, extensions and shared objects."""
    system = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache"]
    own = [str(Path(sys.base_prefix) / "lib"), *search]
    return sorted({*system, *own}, key=lambda path: (len(Path(path).parts), path))
