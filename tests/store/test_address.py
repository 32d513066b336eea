"""Which servers may be asked, and which key goes where."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from kdcli.errors import ConfigError
from kdcli.store.address import Server, read_key


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/v1",
        "http://localhost:8000",
        "http://[::1]:8000/v1",
        "https://api.example.org/v1",
        "https://93.184.215.14/v1/",
    ],
)
def test_this_machine_and_public_servers_over_tls_may_be_asked(url: str) -> None:
    assert Server.of(url).url == url.rstrip("/")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://api.example.org/v1", "over https:// only"),
        ("http://93.184.215.14/v1", "over https:// only"),
        ("http://10.1.2.3:8000/v1", "allow_private=true"),
        ("https://192.168.0.7/v1", "allow_private=true"),
        ("https://100.64.0.1/v1", "allow_private=true"),
        ("https://[fd12::1]/v1", "allow_private=true"),
        ("https://169.254.169.254/v1", "link-local"),
        ("https://[::ffff:169.254.169.254]/v1", "link-local"),
        ("https://[fe80::1]/v1", "link-local"),
        ("https://[fd00:ec2::254]/v1", "link-local"),
        ("https://metadata.google.internal/v1", "metadata"),
        ("https://METADATA.google.internal./v1", "metadata"),
        ("https://0.0.0.0/v1", "no address of a server"),
        ("https://someone:secret@example.org/v1", "api_key_env"),
        ("ftp://example.org/v1", "no address of a server"),
        ("file:///etc/passwd", "no address of a server"),
        ("example.org", "no address of a server"),
        ("http://127.0.0.1:99999/v1", "port"),
        ("https://example.org/v1?key=1", "no \\?"),
    ],
)
def test_others_are_refused_and_no_password_is_repeated(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Server.of(url, where="teacher.url")
    assert str(caught.value).startswith("teacher.url: ")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://10.1.2.3:8000/v1", "http://gpu-box:8000/v1"])
def test_a_private_network_is_asked_where_that_is_allowed(url: str) -> None:
    assert Server.of(url, allow_private=True).url == url


@pytest.mark.parametrize("url", ["https://169.254.169.254/", "https://[fd00:ec2::254]/", "https://metadata/"])
def test_metadata_is_asked_nowhere(url: str) -> None:
    with pytest.raises(ConfigError):
        Server.of(url, allow_private=True)


def names(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every name lead to these."""

    def found(host: str, port: int, **more: Any) -> list[Any]:
        del host, more
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "0.0.0.0"])
def test_a_name_is_checked_by_where_it_leads_each_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server.of("https://api.example.org/v1")
    names(monkeypatch, "93.184.215.14")
    assert server.resolve() == "93.184.215.14"
    names(monkeypatch, "93.184.215.14", address)  # moved since, or one of several
    with pytest.raises(ConfigError, match=r"api\.example\.org"):
        server.resolve()


def test_a_private_name_that_leads_outside_needs_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server.of("http://gpu-box:8000/v1", allow_private=True)
    names(monkeypatch, "10.0.0.1")
    assert server.resolve() == "10.0.0.1"
    names(monkeypatch, "93.184.215.14")
    with pytest.raises(ConfigError, match="https"):
        server.resolve()


KEY = "horse-staple"


@pytest.mark.parametrize(
    ("variable", "url", "bound", "ok"),
    [
        ("MY_KEY", "https://example.org/v1", None, True),
        ("MY_KEY", "http://127.0.0.1:8000/v1", None, True),
        ("MY_KEY", "http://gpu-box:8000/v1", None, False),
        ("MY_KEY", "https://example.org/v1", "example.com", False),
        ("OPENAI_API_KEY", "https://api.openai.com/v1", None, True),
        ("OPENAI_API_KEY", "https://example.org/v1", None, False),
        ("OPENAI_API_KEY", "https://example.org/v1", "example.org", True),
    ],
)
def test_a_key_goes_to_its_own_host(
    variable: str, url: str, bound: str | None, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, KEY)
    monkeypatch.delenv(f"{variable}_HOST", raising=False)
    if bound:
        monkeypatch.setenv(f"{variable}_HOST", bound)
    server = Server.of(url, allow_private=True)
    if ok:
        assert read_key(variable, server) == KEY
    else:
        with pytest.raises(ConfigError) as caught:
            read_key(variable, server)
        assert KEY not in str(caught.value)
