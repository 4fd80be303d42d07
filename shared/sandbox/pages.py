"""Where a warm interpreter lies in memory, which is what a fork of it costs.

A fork, and the end of the process that it makes, handle every page one by one. A huge page is one
of 512: with everything in huge pages both take half as long (docs/sandbox.md has figures). Huge
pages need 2 MiB that lie together, but arenas (1 MiB each, for objects up to 512 bytes) are mapped
as they are needed, between one library and the next. So they are all asked for beforehand.
"""

from __future__ import annotations

import ctypes
import gc

from shared.sandbox import confine

_HUGE = 21  # a huge page is 1 << 21 bytes
_BLOCK = 496  # bytes of the object made below, rounded as the allocator does
_EVERY = 500  # 242 KiB: some of them lie in every arena
_COLLAPSE = 25  # MADV_COLLAPSE


def reserve(size: int) -> list[bytes]:
    """Have `size` bytes of arenas, side by side. They are kept while the result is; drop it when
    they have been filled with something else, and those that are empty go back."""
    blocks = [b""] * (size // _BLOCK)
    for i in range(len(blocks)):
        blocks[i] = bytes(_BLOCK - 48)
    return blocks[::_EVERY]


def gather() -> None:
    """Put all that objects lie in into huge pages, where the kernel does that on request (6.1).
    Where it does not, everything stays as it is."""
    gc.collect()
    for region in {id(value) >> _HUGE for value in gc.get_objects()}:
        confine.libc.madvise(
            ctypes.c_void_p(region << _HUGE), ctypes.c_size_t(1 << _HUGE), _COLLAPSE
        )
    confine.small_pages()  # from here on
