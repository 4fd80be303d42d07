"""What the processes of a jail are confined by, made once: a run only puts it on."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.sandbox import confine
from shared.sandbox.result import Tier
from shared.sandbox.trees import remove_tree


@dataclass(frozen=True, slots=True)
class Jail:
    """`limits` are rlimits beside those that a zygote shares with its forks; `cpu` is the most
    seconds that any of them may be given; `filters` are of system calls: a run's, a session's."""

    tier: Tier
    warden: int  # pid of the parent of all, as they see it
    limits: tuple[tuple[int, int], ...]
    cpu: int
    filters: tuple[bytes, bytes]

    @classmethod
    def make(cls, tier: Tier, limits: Mapping[str, int], warden: int) -> Jail:
        """In the zygote, once all is imported."""
        shared = {
            resource.RLIMIT_FSIZE: limits["file_size"],
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        for which, value in shared.items():
            confine.limit(which, confine.allowed(which, value))
        own = {
            resource.RLIMIT_AS: _address_space() + limits["memory"],
            resource.RLIMIT_NOFILE: limits["open_files"],
        }
        pairs = tuple((which, confine.allowed(which, value)) for which, value in own.items())
        cpu = confine.allowed(resource.RLIMIT_CPU, 1 << 40)
        if tier is Tier.D:
            return cls(tier, warden, pairs, cpu, (b"", b""))
        truncate = tier is Tier.B and confine.landlock_abi() >= confine.TRUNCATE_ABI
        run, session = (
            confine.call_filter(forks=forks, writes=truncate or tier is Tier.A)
            for forks in (False, True)
        )
        return cls(tier, warden, pairs, cpu, (run, session))

    def enter(self, ruleset: int) -> None:
        """Confine the calling process to a room, for good; it still may be told what to do. That
        it gains no privileges and cannot be inspected comes from the warden."""
        if self.tier is not Tier.A:  # there the warden is pid 1, without which nobody lives
            confine.die_with_parent(self.warden)
        if ruleset >= 0:
            confine.restrict(ruleset)

    def lock(self, cpu: int, *, session: bool) -> None:
        """The rest: its share of everything, and the system calls that it has left."""
        for which, value in self.limits:
            confine.limit(which, value)
        confine.limit(resource.RLIMIT_CPU, min(cpu, self.cpu))
        if self.tier is not Tier.D:
            confine.filter_calls(self.filters[session])


@dataclass(frozen=True, slots=True)
class Room:
    """What one run has to itself: its directory, the only place where it may write, and the
    descriptor of a Landlock ruleset that says so (below tier B: -1)."""

    directory: Path | None
    ruleset: int

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory; -1 if there is none."""
        if self.directory is None:
            yield -1
            return
        fd = os.open(self.directory, os.O_PATH | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


class Rooms:
    """`scratch` is where directories are made; None: there are none, and all share one room."""

    def __init__(self, tier: Tier, scratch: Path | None, readable: Sequence[str]) -> None:
        self._landlocked = tier in (Tier.A, Tier.B)
        paths = (*readable, "/dev/null")
        self._rules = confine.rules(paths, ("/dev/null",)) if self._landlocked else []
        self._scratch = scratch
        self.closed = Room(None, confine.ruleset(self._rules) if self._landlocked else -1)

    def furnish(self) -> Room:
        """A new room, which is nobody's yet. One at a time."""
        if self._scratch is None:
            return self.closed
        directory = self._scratch / "next"
        directory.mkdir(mode=0o700)
        if not self._landlocked:
            return Room(directory, -1)
        (own,) = confine.rules((), (str(directory),))
        try:
            return Room(directory, confine.ruleset((*self._rules, own)))
        finally:
            os.close(own[1])

    def assign(self, room: Room) -> Room:
        """The room as that of the one run there is; its directory has the same name every time."""
        if room.directory is None:
            return room
        return Room(room.directory.rename(room.directory.with_name("run")), room.ruleset)

    def clear(self, room: Room) -> None:
        """Remove all that is in it."""
        if room is self.closed:
            return
        if room.directory is not None:
            remove_tree(room.directory)
        if room.ruleset >= 0:
            os.close(room.ruleset)


def _address_space() -> int:
    """Bytes of address space now in use, found without /proc: where a limit begins to bite."""
    low, high = 0, 1 << 40
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    while high - low > 1 << 22:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, 1 << 16).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return high
