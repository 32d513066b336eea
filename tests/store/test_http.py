"""What of HTTP is not seen through a teacher: waits, names that lead elsewhere, certificates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest

from kdcli.errors import KDError
from kdcli.store.http import Client, Question, _retry_after


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("", None), ("soon", None), ("-1", None), ("inf", None), ("nan", None)],
)
def test_retry_after_in_seconds(value: str, seconds: float | None) -> None:
    assert _retry_after(httpx2.Headers({"retry-after": value})) == seconds


@pytest.mark.parametrize(("ahead", "least"), [(30, 28.0), (-30, None)])
def test_retry_after_as_a_date(ahead: int, least: float | None) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
    found = _retry_after(httpx2.Headers({"retry-after": date}))
    assert found is None if least is None else (found is not None and least <= found <= 30)


def test_an_unknown_name_is_a_failure_that_may_pass() -> None:
    client = Client("https://nobody.invalid/v1", retries=1, where="teacher")
    with pytest.raises(KDError, match=r"teacher: nobody\.invalid:443 gave no usable answer in 2 tries"):
        client.ask(Question("completions", {}, 1000), lambda answer: answer)


def test_a_server_without_tls_is_not_spoken_to_in_the_clear() -> None:
    """https asked of a port that speaks plain http: no fall-back."""
    import http.server
    import threading

    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)

        def log_message(self, *args: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = Client(f"https://127.0.0.1:{server.server_port}/v1", retries=0)
    with pytest.raises(KDError, match="gave no usable answer"):
        client.ask(Question("completions", {}, 1000), lambda answer: answer)
    server.shutdown()
    assert seen == []
