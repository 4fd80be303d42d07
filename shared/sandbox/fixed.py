"""What a program takes from chance or from the clock, decided by the run's seed instead.

Same code and seed, same bytes. In the preloaded interpreter, before any run: `install`; in every
run: `seed`. This is no wall: code that asks the kernel itself (ctypes, /proc, time.monotonic) gets
the kernel's answer (docs/sandbox.md lists what is not fixed).

The wall clock stands at EPOCH when a run starts, and every look at it costs a microsecond: so that
a program that waits for the clock ends, and ends at the same look every time. `time.sleep` sleeps,
and moves it. `time.monotonic` stays true, because threads, queues and event loops wait by it.
"""

from __future__ import annotations

import datetime
import os
import random
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

EPOCH = 1_735_689_600  # 2025-01-01T00:00:00Z
_LOOK = 1000  # nanoseconds

_entropy = random.Random()
_unseeded: str | None = None  # what `_entropy` begins with, until something is drawn from it
_now = EPOCH * 10**9  # nanoseconds


def seed(value: int) -> None:
    """Give every source of chance the run's own seed, and set the clock back."""
    global _now, _unseeded
    _now = EPOCH * 10**9
    _unseeded = f"entropy {value}"
    random.seed(value)  # a fork reseeds `random` from the kernel
    if (numpy := sys.modules.get("numpy")) is not None:  # and leaves numpy's as it was
        numpy.random.seed(value % (1 << 32))
    if (sympy := sys.modules.get("sympy.core.random")) is not None:
        sympy.seed(value)


def install() -> None:
    """Replace the sources. After the preload: what was imported by name keeps the true clock."""
    _install_entropy()
    _install_clock()
    _install_dates()


def _urandom(size: int, /) -> bytes:
    """As os.urandom."""
    global _unseeded
    if _unseeded is not None:
        text, _unseeded = _unseeded, None
        _entropy.seed(text)
    return _entropy.randbytes(size)


def _install_entropy() -> None:
    """numpy's unseeded generators draw from `secrets`, and that from random._urandom."""
    os.urandom = random._urandom = _urandom  # type: ignore[attr-defined]
    os.getrandom = lambda size, flags=0: _urandom(size)
    seed_of = random.Random.seed

    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        """As random.Random.seed."""
        seed_of(self, int.from_bytes(_urandom(32), "big") if a is None else a, version)

    random.Random.seed = seed  # type: ignore[method-assign]
    random.seed = random._inst.seed
    uuid._generate_time_safe = uuid._UuidCreate = None  # type: ignore[attr-defined]
    uuid._node = 0x0123456789AB  # type: ignore[attr-defined]


def _look() -> int:
    global _now
    _now += _LOOK
    return _now


def _seconds() -> float:
    return _look() / 1e9


def _install_clock() -> None:
    for name in ("time", "perf_counter", "process_time", "thread_time"):
        _replace(name, _seconds)
        _replace(f"{name}_ns", _look)
    for name in ("gmtime", "localtime", "ctime"):
        _replace(name, _at(getattr(time, name)))
    _replace("asctime", _of(time.asctime, 0))
    _replace("strftime", _of(time.strftime, 1))
    sleep = time.sleep

    def slept(seconds: float, /) -> None:
        """As time.sleep."""
        global _now
        sleep(seconds)
        _now += int(seconds * 1e9)

    _replace("sleep", slept)


def _replace(name: str, function: Callable[..., Any]) -> None:
    setattr(time, name, function)


def _at(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function of an optional time."""
    return lambda seconds=None, /: function(_seconds() if seconds is None else seconds)


def _of(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """For a function whose optional argument at `place` is a broken-down time."""
    return lambda *given: function(*given, *([time.localtime()] if len(given) == place else []))


def _install_dates() -> None:
    """`datetime.datetime` and `datetime.date` with another `now`; true ones are instances too."""

    class Like(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, cls._true) if cls in ours else super_check(cls, instance)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, cls._true) if cls in ours else super_sub(cls, subclass)

    super_check, super_sub = type.__instancecheck__, type.__subclasscheck__

    class date(datetime.date, metaclass=Like):
        _true = datetime.date
        __module__, __qualname__ = "datetime", "date"

        @classmethod
        def today(cls) -> Any:
            return cls.fromtimestamp(_seconds())

        def __repr__(self) -> str:
            return f"{'datetime.' if type(self) in ours else ''}{super().__repr__()}"

    class datetime_(datetime.datetime, metaclass=Like):
        _true = datetime.datetime
        __module__, __qualname__, __name__ = "datetime", "datetime", "datetime"

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(_seconds(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.fromtimestamp(_seconds(), datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return cls.now()

        def date(self) -> Any:
            return date(self.year, self.month, self.day)

        def __repr__(self) -> str:
            return f"{'datetime.' if type(self) in ours else ''}{super().__repr__()}"

    datetime_.__name__ = "datetime"
    ours = (date, datetime_)
    datetime.date, datetime.datetime = date, datetime_  # type: ignore[misc]
