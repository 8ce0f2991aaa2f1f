"""A server end of the attach protocol, scripted by the test that uses it."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable
from types import TracebackType

from kvstore.local.attach import (
    Attached,
    AttachRequest,
    ErrorReply,
    ExtentReply,
    Request,
    decode_request,
    encode_reply,
)

EXTENT_BYTES = 1 << 16
SESSION = b"s" * 16
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK_GROW = 0x0002 | 0x0004


def sealed_memfd(nbytes: int = EXTENT_BYTES, *, seals: int = _F_SEAL_SHRINK_GROW) -> int:
    descriptor = os.memfd_create("extent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    if seals:
        fcntl.fcntl(descriptor, _F_ADD_SEALS, seals)
    return descriptor


Answer = Callable[[socket.socket, Request], None]


class AttachServer:
    """Serves one connection after the other; `answer` decides what each request gets."""

    def __init__(self, path: str, answer: Answer | None = None) -> None:
        self.path = path
        self.extents: dict[int, int] = {}
        self.answer = answer or self.usual
        self.ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def usual(self, connection: socket.socket, request: Request) -> None:
        if isinstance(request, AttachRequest):
            connection.send(encode_reply(Attached(SESSION, b"e1", EXTENT_BYTES, "default")))
        elif request.extent == 13:
            connection.send(encode_reply(ErrorReply("BAD_REQUEST", "not yours")))
        else:
            descriptor = self.extents.setdefault(request.extent, sealed_memfd())
            reply = encode_reply(ExtentReply(request.extent, EXTENT_BYTES))
            socket.send_fds(connection, [reply], [descriptor])

    def __enter__(self) -> AttachServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        for descriptor in self.extents.values():
            os.close(descriptor)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                while True:
                    datagram = connection.recv(4096)
                    if not datagram:
                        break
                    self.answer(connection, decode_request(datagram))
            self.ended.set()
