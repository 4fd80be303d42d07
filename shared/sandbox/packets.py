"""JSON packets with descriptors, over SOCK_SEQPACKET: one send is one receive."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIZE = 1 << 16
_ANCILLARY = socket.CMSG_SPACE(8 * 4) + socket.CMSG_SPACE(12)  # 8 descriptors, credentials


@dataclass(frozen=True, slots=True)
class Packet:
    """`sender` is a pid that the kernel vouches for, where the socket has SO_PASSCRED."""

    body: bytes
    fds: list[int]
    sender: int | None = None

    def json(self) -> dict[str, Any]:
        """Raises ValueError where the sender did not send an object."""
        try:
            value = json.loads(self.body)
        except RecursionError as error:  # somebody wants to see it
            raise ValueError("nested too deeply") from error
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def send(to: socket.socket, body: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    pass_on(to, json.dumps(body).encode(), fds)


def pass_on(to: socket.socket, body: bytes, fds: Sequence[int]) -> None:
    """`send` what was received as it is."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    to.sendmsg([body], rights)


def tell(to: socket.socket, body: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """`send` to somebody who may have given up already: then nobody needs to know."""
    with contextlib.suppress(OSError):
        send(to, body, fds)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends; at the first the kernel vouches for who sent."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return here, there


def receive(sock: socket.socket) -> Packet:
    """The next packet; an empty body is the end. Descriptors arrive close-on-exec."""
    try:
        body, ancillary, _, _ = sock.recvmsg(SIZE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return Packet(b"", [])
    fds: list[int] = []
    sender = None
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += descriptors(data)
        elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            sender = struct.unpack("3i", data)[0]
    return Packet(body, fds, sender)


def descriptors(rights: bytes) -> list[int]:
    """What SCM_RIGHTS brought."""
    return list(memoryview(rights[: len(rights) & -4]).cast("i"))


def as_memfd(code: str) -> int:
    """The code as data of any size, behind a descriptor."""
    fd = os.memfd_create("code", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(code.encode("utf-8", "surrogatepass"))
    return fd
