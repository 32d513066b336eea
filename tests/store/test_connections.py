"""One exchange: within its time and its bytes, over TLS of the name, on a connection to a checked address."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdcli.errors import ConfigError
from kdcli.store.address import Server
from kdcli.store.connections import Connections, Reply, TooLongError

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
Talk = Callable[[socket.socket], None]


@contextmanager
def talking(talk: Talk, context: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[int]]]:
    """A server that does `talk` with each connection; its port, and one entry per connection."""
    listening = socket.create_server(("127.0.0.1", 0))
    opened: list[int] = []

    def serve() -> None:
        while True:
            try:
                one, _ = listening.accept()
            except OSError:
                return
            opened.append(1)
            threading.Thread(target=one_of, args=(one,), daemon=True).start()

    def one_of(one: socket.socket) -> None:
        try:
            with context.wrap_socket(one, server_side=True) if context else one as spoken:
                talk(spoken)
        except OSError:
            pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listening.getsockname()[1], opened
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def saying(*pieces: bytes, pause: float = 0.0) -> Talk:
    def talk(one: socket.socket) -> None:
        while one.recv(65536):
            for piece in pieces:
                one.sendall(piece)
                time.sleep(pause)

    return talk


def connections(port: int, url: str = "http://127.0.0.1", kept: int = 2) -> Connections:
    return Connections(Server.of(f"{url}:{port}"), kept=kept)


def post(own: Connections, seconds: float = 5.0, max_bytes: int = 1000) -> Reply:
    return own.post("/v1/x", {"Host": "h"}, b"{}", seconds=seconds, max_bytes=max_bytes)


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD,
    ],
    ids=["length", "chunked", "continue"],
)
def test_connections_are_kept_after_whole_answers(answer: bytes) -> None:
    with talking(saying(answer)) as (port, opened):
        own = connections(port)
        assert [post(own).content for _ in range(3)] == [b"{}"] * 3
        assert len(opened) == 1
        own.close()
        assert post(own).status == 200 and len(opened) == 2


def test_an_answer_that_ends_with_its_connection_is_read_and_another_is_opened() -> None:
    def talk(one: socket.socket) -> None:
        one.recv(65536)
        one.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}")

    with talking(talk) as (port, opened):
        own = connections(port)
        assert [post(own).content for _ in range(2)] == [b"{}"] * 2
        assert len(opened) == 2


@pytest.mark.parametrize(
    "pieces",
    [
        [b"x"] * 999,
        [b"HTTP/1.1 200 OK\r\n", *[b"A: b\r\n"] * 99],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", *[b"x"] * 999],
    ],
    ids=["status", "headers", "body"],
)
def test_time_is_up_however_slowly_bytes_drip(pieces: list[bytes]) -> None:
    with talking(saying(*pieces, pause=0.2)) as (port, _):
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            post(connections(port), seconds=0.4)
        assert 0.3 < time.monotonic() - begun < 10


def test_a_connection_that_accepts_nothing_is_not_waited_for() -> None:
    with talking(lambda one: time.sleep(30)) as (port, _):
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            connections(port).post("/", {}, b"x" * (64 << 20), seconds=0.4, max_bytes=10)
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 1001\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n", b"\r\n"],
    ids=["length", "chunked", "open"],
)
def test_no_more_bytes_are_read_than_are_allowed(head: bytes) -> None:
    with talking(saying(b"HTTP/1.1 200 OK\r\n" + head + b"x" * 1001 + b"\r\n0\r\n\r\n")) as (port, opened):
        own = connections(port)
        for _ in range(2):
            with pytest.raises(TooLongError):
                post(own, max_bytes=1000)
        assert len(opened) == 2, "what is left of an answer is never taken for the next one"


def test_what_nobody_asked_for_is_not_taken_for_the_next_answer() -> None:
    with talking(saying(GOOD + b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ninjected!")) as (port, opened):
        own = connections(port)
        assert [post(own).content for _ in range(3)] == [b"{}"] * 3
        assert len(opened) >= 1


@pytest.mark.parametrize("answer", [GOOD[:-1], GOOD[:9], b"SSH-2.0-OpenSSH_9\r\n", b""], ids=len)
def test_what_is_no_whole_answer_is_a_failure(answer: bytes) -> None:
    def talk(one: socket.socket) -> None:
        one.recv(65536)
        one.sendall(answer)

    with talking(talk) as (port, _), pytest.raises((http.client.HTTPException, ConnectionError)):
        post(connections(port))


def test_a_header_that_would_begin_another_is_refused_without_repeating_it() -> None:
    with talking(saying(GOOD)) as (port, _), pytest.raises(ValueError, match="holds what no header may") as caught:
        connections(port).post("/", {"Authorization": "Bearer a\r\nHost: b"}, b"", seconds=5, max_bytes=10)
    assert "Bearer" not in str(caught.value)


def test_a_name_is_checked_whenever_a_connection_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads here first, and to a cloud's metadata service later."""
    found = "127.0.0.1"

    def getaddrinfo(host: str, port: int, *args: object, **settings: object) -> list[object]:
        return [(2, 1, 6, "", (found if host == "localhost" else host, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with talking(saying(GOOD)) as (port, opened):
        own = connections(port, "http://localhost")
        assert post(own).status == 200
        found = "169.254.169.254"
        assert post(own).status == 200, "a connection stays where it was checked"
        own.close()
        with pytest.raises(ConfigError, match="link-local"):
            post(own)
        assert len(opened) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the name localhost alone, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", folder / "key", "-out", folder / "cert"], check=True, capture_output=True)
    return folder / "cert", folder / "key"


@pytest.fixture
def context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_certificates_are_those_of_the_name_though_an_address_is_connected_to(
    certificate: tuple[Path, Path], context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    with talking(saying(GOOD), context) as (port, opened):
        with pytest.raises(ssl.SSLCertVerificationError):
            post(connections(port, "https://localhost"))  # signed by nobody that is trusted
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        trusting = connections(port, "https://localhost")
        assert [post(trusting).content for _ in range(3)] == [b"{}"] * 3
        assert len(opened) == 2, "TLS connections are kept too"
        with pytest.raises(ssl.SSLCertVerificationError):
            post(connections(port, "https://127.0.0.1"))  # another name


def test_a_handshake_is_not_waited_for_without_end() -> None:
    with talking(lambda one: time.sleep(30)) as (port, _):
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            post(connections(port, "https://localhost"), seconds=0.4)
        assert time.monotonic() - begun < 10
