"""Logs for machines. The ids of what is being worked on travel with the context.

    with about(run="first", item=7, attempt=1):
        log.warning("...")      # JSON: {..., "run": "first", "item": 7, "attempt": 1}

A line has `time` (UTC, by this host's clock), `level`, `logger`, `message`, `host`, `process`, the
ids, whatever the call passed as `extra`, and `error` with the traceback of an exception.
"""

from __future__ import annotations

import contextvars
import json
import logging
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TextIO

PROGRAMS = ("shared", "tirgen", "rl")  # whose own events are logged, not only their warnings

_ids: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "ids", default=MappingProxyType({})
)
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def about(**ids: object) -> Iterator[None]:
    """Every line that is logged in this block, and in tasks that it starts, carries these ids."""
    token = _ids.set({**_ids.get(), **ids})
    try:
        yield
    finally:
        _ids.reset(token)


def ids() -> Mapping[str, object]:
    """Those of this context."""
    return _ids.get()


class JsonFormatter(logging.Formatter):
    """One object a line. What cannot be JSON is written as its repr; a text cannot break a line."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _KNOWN}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "host": socket.gethostname(),
            "process": record.process,
            **_ids.get(),
            **extra,
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=repr)


def log_json(stream: TextIO = sys.stderr) -> None:
    """Lines of JSON from now on, of this process and its later children: all that our own programs
    do, and warnings of everybody else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in PROGRAMS:
        logging.getLogger(name).setLevel(logging.INFO)
