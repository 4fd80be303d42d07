"""Where a warm interpreter lies in memory, which is what a fork of it costs.

A fork, and the end of the process that it makes, handle every page one by one. A huge page is one
of 512: with everything in huge pages both take half as long (docs/sandbox.md has figures). Huge
pages need 2 MiB that lie together, but arenas (1 MiB each, for objects up to 512 bytes) are mapped
as they are needed, between one library and the next. So they are all asked for beforehand.

It copies the list of mappings, too. A library is five of them, which differ in what may be done to
their pages; of 130 libraries that is more than half of what a fork costs.

Afterwards each page that either side writes is copied, and to look at an object is to write to it:
its references are counted. So from Python 3.12 on they are not.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from types import CodeType
from typing import Any

from shared.sandbox import confine

_HUGE = 21  # a huge page is 1 << 21 bytes
_BLOCK = 496  # bytes of the object made below, rounded as the allocator does
_EVERY = 500  # 242 KiB: some of them lie in every arena
_NOT_COUNTED = 0xFFFFFFFF
_COLLAPSE = 25  # MADV_COLLAPSE


def reserve(size: int) -> list[bytes]:
    """Have `size` bytes of arenas, side by side. They are kept while the result is; drop it when
    they have been filled with something else, and those that are empty go back."""
    blocks = [b""] * (size // _BLOCK)
    for i in range(len(blocks)):
        blocks[i] = bytes(_BLOCK - 48)
    return blocks[::_EVERY]


def settle() -> None:
    """Make forks of this process cheap, now that all is there."""
    gather()
    immortalize()
    join()
    gc.collect()
    gc.freeze()


def gather() -> None:
    """Put all that objects lie in into huge pages, where the kernel does that on request (6.1).
    Where it does not, everything stays as it is."""
    gc.collect()
    for region in {id(value) >> _HUGE for value in gc.get_objects()}:
        confine.libc.madvise(
            ctypes.c_void_p(region << _HUGE), ctypes.c_size_t(1 << _HUGE), _COLLAPSE
        )
    confine.small_pages()  # from here on


def immortalize() -> None:
    """Let nobody count the references to what there is: then an object that is looked at is not
    written to, and its page stays shared. Nothing of it is ever freed. An interpreter has to know
    of such objects (PEP 683: Python 3.12); where it does not, everything stays as it is."""
    if sys.version_info < (3, 12) or "t" in sys.abiflags:  # t: without a GIL, counts are elsewhere
        return
    counts = (ctypes.c_uint32 * (1 << 45)).from_address(mmap.PAGESIZE)  # of all user memory
    for address in _everything():  # a count begins with these four bytes
        counts[(address - mmap.PAGESIZE) >> 2] = _NOT_COUNTED


def _everything() -> set[int]:
    """Addresses of all objects that can be reached from those that the collector knows."""
    reached = gc.get_objects()
    found: set[int] = set()  # made after, and so not among them
    while reached:
        by_address = dict(zip(map(id, reached), reached, strict=True))
        new = by_address.keys() - found
        found |= new
        values = [by_address[address] for address in new]
        reached = gc.get_referents(*values)
        for value in values:
            if isinstance(value, CodeType):  # of which the collector does not know what it holds
                reached += (value.co_consts, value.co_names, value.co_name, value.co_qualname)
    return found


def join() -> None:
    """Make two mappings of each library: what is only read may also be executed, and what the
    linker wrote before it took that right away may be written again. Neighbours that may do the
    same are one. No wall is lost: the code in a jail may call the kernel as it likes. Where the
    kernel refuses, everything stays as it is."""
    for begin, end, rights in _read_only():
        first, last = begin & -mmap.PAGESIZE, (end + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
        confine.libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(last - first), rights)


class _Segment(ctypes.Structure):
    """Elf64_Phdr."""

    _fields_ = (
        ("type", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("offset", ctypes.c_uint64),
        ("vaddr", ctypes.c_uint64), ("paddr", ctypes.c_uint64), ("filesz", ctypes.c_uint64),
        ("memsz", ctypes.c_uint64), ("align", ctypes.c_uint64),
    )  # fmt: skip


class _Library(ctypes.Structure):
    """The head of dl_phdr_info."""

    _fields_ = (
        ("address", ctypes.c_uint64), ("name", ctypes.c_char_p),
        ("segments", ctypes.POINTER(_Segment)), ("n", ctypes.c_uint16),
    )  # fmt: skip


_EACH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Library), ctypes.c_size_t, ctypes.c_void_p)
_LOAD, _RELRO, _READABLE = 1, 0x6474E552, 4  # PT_LOAD, PT_GNU_RELRO, PF_R


def _read_only() -> list[tuple[int, int, int]]:
    """Of all libraries: begin, end, and what may be done there from now on. The jail has no /proc
    to read it from."""
    found = []

    def each(library: Any, size: int, data: int) -> int:
        one = library.contents
        for segment in one.segments[: one.n]:
            begin = one.address + segment.vaddr
            if segment.type == _LOAD and segment.flags == _READABLE:
                rights = mmap.PROT_READ | mmap.PROT_EXEC
            elif segment.type == _RELRO:
                # What is left of a last page belongs to the data after it, and may be written.
                rights = mmap.PROT_READ | mmap.PROT_WRITE
            else:
                continue
            found.append((begin, begin + segment.memsz, rights))
        return 0

    confine.libc.dl_iterate_phdr(_EACH(each), None)
    return found
