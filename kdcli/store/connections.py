"""Kept-alive connections to one server: pinned to checked addresses, each exchange within its time and its bytes.

Answers are read by the standard library's `http.client`, since all layers above it run in the one interpreter that 64
threads share: a whole question costs 0.32 ms of CPU so, 1.33 over httpx2, and urllib3's exchange alone 0.59.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kdcli.store.address import Server

LONGEST_IDLE = 30.0  # seconds after which a connection is not used again: routers forget it without a word


class TooLongError(OSError):
    """An answer of more bytes than were allowed."""


@dataclass(frozen=True)
class Reply:
    """What a server sent back, whole."""

    status: int
    headers: Mapping[str, str]  # `get` takes a name in any case
    content: bytes


class Connections:
    """Threads may share it. At most `kept` connections wait for the next exchange.

    The server's name is resolved and checked whenever a connection is opened, and what was checked is connected to, as
    a number; certificates are still those of the name. Redirects are handed back, not followed, and variables that
    name proxies or certificates for other programs are not read (SSL_CERT_FILE is OpenSSL's own).
    """

    def __init__(self, server: Server, *, kept: int) -> None:
        self.server = server
        self.kept = kept
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()

    def post(self, path: str, headers: Mapping[str, str], body: bytes, *, seconds: float, max_bytes: int) -> Reply:
        """One exchange, which ends after `seconds` however slowly bytes drip in.

        Where the server closed a kept connection before it sent a byte of an answer, another is opened, once. Raises
        OSError (TimeoutError when time is up, TooLongError) or http.client.HTTPException.
        """
        end = time.monotonic() + seconds
        connection = self._taken()
        if connection is not None:
            try:
                return self._exchanged(connection, path, headers, body, end, max_bytes)
            except (ConnectionError, ssl.SSLEOFError):
                if connection.heard:
                    raise
        return self._exchanged(self._opened(end), path, headers, body, end, max_bytes)

    def close(self) -> None:
        """Close what is not in use; what is in use closes when its exchange ends, or is kept for a next one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.shut()

    def _exchanged(
        self, connection: _Connection, path: str, headers: Mapping[str, str], body: bytes, end: float, max_bytes: int
    ) -> Reply:
        kept = False
        try:
            reply, kept = connection.exchange(path, headers, body, end, max_bytes)
        finally:
            if not kept or not self._put_back(connection):
                connection.shut()
        return reply

    def _taken(self) -> _Connection | None:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None or connection.silent():
                return connection
            connection.shut()

    def _put_back(self, connection: _Connection) -> bool:
        with self._lock:
            if len(self._idle) >= self.kept:
                return False
            self._idle.append(connection)
            return True

    def _opened(self, end: float) -> _Connection:
        address = self.server.resolve()
        plain = socket.create_connection((address, self.server.port), _left(end))
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self.server.secure:
                return _Connection(plain)
            plain.settimeout(_left(end))
            return _Connection(self._tls.wrap_socket(plain, server_hostname=self.server.host))
        except BaseException:
            plain.close()
            raise

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context


class _Connection:
    """One socket, spoken HTTP/1.1 over."""

    def __init__(self, plain: socket.socket) -> None:
        self.socket = plain
        self.heard = False  # a byte of the answer at hand
        self.used = time.monotonic()
        self._end = 0.0

    def exchange(
        self, path: str, headers: Mapping[str, str], body: bytes, end: float, max_bytes: int
    ) -> tuple[Reply, bool]:
        """The answer, and whether the connection may be used again."""
        self._end, self.heard = end, False
        self.socket.settimeout(_left(end))
        self.socket.sendall(_head(path, headers, len(body)) + body)
        response = http.client.HTTPResponse(self, method="POST")  # pyright: ignore[reportArgumentType]
        response.begin()
        declared = response.length
        if declared is not None and declared > max_bytes:
            raise TooLongError(f"an answer of {declared:,} bytes")
        if declared is not None:
            content = response.read()  # raises IncompleteRead where the connection was cut
        else:
            content = response.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise TooLongError(f"an answer of more than {max_bytes:,} bytes")
        kept = response.isclosed() and not response.will_close
        self.used = time.monotonic()
        return Reply(response.status, response.headers, content), kept  # pyright: ignore[reportArgumentType]

    def silent(self) -> bool:
        """Whether it may be used again: it waited for seconds only, and nothing came since the last answer, neither
        its end nor what nobody asked for."""
        if time.monotonic() - self.used > LONGEST_IDLE:
            return False
        look = select.poll()  # select() takes no file number above 1023
        look.register(self.socket, select.POLLIN)
        return not look.poll(0)

    def shut(self) -> None:
        self.socket.close()

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `HTTPResponse` reads from."""
        assert mode == "rb", mode
        return io.BufferedReader(_Received(self), 65536)

    def receive(self, buffer: Any) -> int:
        self.socket.settimeout(_left(self._end))
        number = self.socket.recv_into(buffer)
        self.heard |= number > 0
        return number


class _Received(io.RawIOBase):
    """The bytes that a connection receives, each wait for them no longer than its time."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._connection.receive(buffer)


def _head(path: str, headers: Mapping[str, str], length: int) -> bytes:
    """The request before its body; one packet with it."""
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    if any(not line.isascii() or not line.isprintable() for line in lines):
        raise ValueError("a header holds what no header may")  # and is not repeated: it may be a key
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode("ascii")


def _left(end: float) -> float:
    """Seconds until `end`. Raises TimeoutError where there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the answer was not complete in time")
    return left
