"""What a sandbox is asked to do, from outside: it has places, and whoever finds none waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Load:
    """`places`: runs that can be under way at once. `asked`: runs that have been asked for and have
    not ended, those that wait for a place included. `ended`, and `seconds` that they took in all,
    waiting included, only grow."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.asked = self.ended = 0
        self.seconds = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[None]:
        """The block is one run."""
        began = time.monotonic()
        with self._lock:
            self.asked += 1
        try:
            yield
        finally:
            with self._lock:
                self.asked -= 1
                self.ended += 1
                self.seconds += time.monotonic() - began
