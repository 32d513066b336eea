"""Questions to a model server: JSON over HTTP, asked again where that helps, and never believed unread.

An answer is given to the caller's `read`, which takes from it what was asked for or raises `BadAnswerError`; only then
is the question done. So a page of HTML, nonsense or a cut answer is a failure like any other, and never data.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_before_delay,
    stop_when_event_set,
    wait_random_exponential,
)

from kdcli.errors import ConfigError, KDError
from kdcli.store.address import Server, read_key, require_name
from kdcli.store.fault import fault
from kdcli.store.log import redact

log = logging.getLogger(__name__)

T = TypeVar("T")

AGAIN = {408, 425, 429, 500, 502, 503, 504}  # may be otherwise the next time
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
SHOWN = 300  # characters of a server's own words in a message


class BadAnswerError(KDError):
    """The server answered, but not what was asked for; it may do so the next time."""


class _TryAgainError(KDError):
    """A failure that may pass. `after`: seconds that the server asks to wait."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class RefusedError(ConfigError):
    """The server understood and refused: asking again is of no use. `status` is HTTP's, `said` the server's words."""

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


@dataclass(frozen=True)
class Question:
    """A JSON body for a path below the server's URL, or at its root where the path begins with `//`."""

    path: str
    body: Any
    max_bytes: int  # of the answer, decompressed


class Client:
    """Asks one server. Threads may share it.

    `timeout`: seconds for one answer. A question is asked up to 1 + `retries` times within `deadline` seconds, with
    random pauses that double (up to a minute), or as long as Retry-After says. `api_key_env` names the variable that
    holds a key, which is read when it is used and goes to this server alone. Redirects are not followed, and proxies
    and certificates that variables name for other programs are not used (but SSL_CERT_FILE is OpenSSL's own).
    `where` begins messages.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        allow_private: bool = False,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 8,
        deadline: float = 300.0,
        where: str = "teacher",
    ) -> None:
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise ConfigError(f"{where}.{name}: {value} is too few; set at least {least}")
        for name, value in (("timeout", timeout), ("deadline", deadline)):
            if not value > 0:
                raise ConfigError(f"{where}.{name}: {value} seconds leave no time to answer; set a number above 0")
        self.server = Server.of(url, allow_private=allow_private, where=f"{where}.url")
        if api_key_env is not None:
            require_name(api_key_env, f"{where}.api_key_env")
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.deadline = deadline
        self.where = where
        self._client: httpx2.Client | None = None
        self._lock = threading.Lock()

    def ask(
        self,
        question: Question,
        read: Callable[[Any], T],
        *,
        retries: int | None = None,
        given_up: threading.Event | None = None,
    ) -> T:
        """What `read` takes from the server's answer. No further try begins once `given_up` is set.

        Raises RefusedError where the server says no, ConfigError where the address or the key is wrong, KDError
        after the last try.
        """
        begun = time.monotonic()
        tries = 1 + (self.retries if retries is None else retries)
        given_up = given_up or threading.Event()
        trying = Retrying(
            stop=stop_any(stop_after_attempt(tries), stop_before_delay(self.deadline), stop_when_event_set(given_up)),
            wait=_pause,
            sleep=sleep_using_event(given_up),
            retry=retry_if_exception_type((_TryAgainError, BadAnswerError)),
            before_sleep=lambda state: self._tell(state, tries),
            reraise=True,
        )
        try:
            return trying(self._once, question, read, begun)
        except (_TryAgainError, BadAnswerError) as error:
            asked = trying.statistics.get("attempt_number", 1)
            kind = BadAnswerError if isinstance(error, BadAnswerError) else KDError
            raise kind(
                f"{self.where}: {self.server.name} gave no usable answer in {asked} {'try' if asked == 1 else 'tries'} "
                f"and {time.monotonic() - begun:.0f} s: {error}; see to the server, then go on from the last "
                f"checkpoint with kdcli resume (or raise {self.where}.retries or {self.where}.deadline)"
            ) from error

    def ask_all(self, questions: Sequence[tuple[Question, Callable[[Any], T]]]) -> list[T]:
        """What was asked for, in the order of the questions, `concurrency` at a time. The first failure ends all."""
        if len(questions) <= 1 or self.concurrency == 1:
            return [self.ask(question, read) for question, read in questions]
        given_up = threading.Event()
        pool = ThreadPoolExecutor(min(self.concurrency, len(questions)), thread_name_prefix="kdcli-http")
        try:
            answers: list[Future[T]] = [
                pool.submit(self.ask, question, read, given_up=given_up) for question, read in questions
            ]
            wait(answers, return_when=FIRST_EXCEPTION)
            failed = [one for one in answers if one.done() and not one.cancelled() and one.exception() is not None]
            return [one.result() for one in failed or answers]
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _once(self, question: Question, read: Callable[[Any], T], begun: float) -> T:
        fault("teacher.request")
        left = max(0.001, min(self.timeout, self.deadline - (time.monotonic() - begun)))
        try:
            status, headers, content = self._exchange(question, left)
        except (httpx2.TransportError, httpx2.DecodingError, OSError) as error:
            raise _TryAgainError(self._unreachable(error, left)) from error
        said = self._words(content)
        if status in AGAIN:
            raise _TryAgainError(f"HTTP {status}{said and f' ({said})'}", _retry_after(headers))
        if 300 <= status < 400:
            raise RefusedError(
                f"{self.where}.url: {self.server.name} redirects (HTTP {status}), which is not followed, since prompts "
                "and keys would go elsewhere; give the URL of the server itself",
                status,
                said,
            )
        if status >= 400:
            raise RefusedError(self._no(status, question.path, said), status, said)
        try:
            answer = json.loads(content)
        except ValueError as error:
            kind = headers.get("content-type", "no content type").split(";")[0][:40]
            raise BadAnswerError(f"HTTP {status} with {len(content):,} bytes of {kind} that are no JSON") from error
        return read(answer)

    def _exchange(self, question: Question, seconds: float) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body of one try, which ends after `seconds` however slowly bytes drip in."""
        end = time.monotonic() + seconds
        with self._opened().stream(**self._request(question), timeout=httpx2.Timeout(seconds)) as response:
            kept = bytearray()
            for part in response.iter_bytes():
                kept += part
                if len(kept) > question.max_bytes:
                    raise BadAnswerError(
                        f"an answer of more than {question.max_bytes:,} bytes, far more than was asked"
                    )
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("the answer was not complete in time")
            return response.status_code, response.headers, bytes(kept)

    def _request(self, question: Question) -> dict[str, Any]:
        """The address is resolved and checked now and connected to as a number, so what was checked is what is asked;
        certificates are still those of the name."""
        server = self.server
        address = server.resolve()
        url = httpx2.URL(server.url)
        base = "" if question.path.startswith("//") else url.path.rstrip("/")
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "Accept": "application/json",
        }
        if self.api_key_env:
            headers["Authorization"] = f"Bearer {read_key(self.api_key_env, server, f'{self.where}.api_key_env')}"
        return {
            "method": "POST",
            "url": url.copy_with(host=address, path=base + "/" + question.path.lstrip("/")),
            "headers": headers,
            "content": json.dumps(question.body).encode(),
            "extensions": {"sni_hostname": server.host},
        }

    def _opened(self) -> httpx2.Client:
        with self._lock:
            if self._client is None:
                limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
                self._client = httpx2.Client(
                    verify=ssl.create_default_context(), limits=limits, follow_redirects=False, trust_env=False
                )
            return self._client

    def _tell(self, state: RetryCallState, tries: int) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning(
            "%s: %s: %s; asking again in %.1f s (try %d of %d)",
            self.where,
            self.server.name,
            error,
            state.upcoming_sleep,
            state.attempt_number + 1,
            tries,
        )

    def _unreachable(self, error: Exception, seconds: float) -> str:
        if isinstance(error, httpx2.TimeoutException):
            return f"no complete answer in {seconds:.1f} s (raise {self.where}.timeout for a slow server)"
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        return f"no answer ({self._clean(reason)}); is the server running, and is {self.where}.url right?"

    def _no(self, status: int, path: str, said: str) -> str:
        told = f"{self.where}: {self.server.name} refuses /{path.lstrip('/')} with HTTP {status}{said and f' ({said})'}"
        if status in (401, 403):
            return f"{told}; name the variable that holds its key in {self.where}.api_key_env"
        if status == 404:
            return f"{told}; check {self.where}.url (it often ends in /v1) and {self.where}.model"
        return told

    def _words(self, content: bytes) -> str:
        """What the server says of an error, where it says so in the usual fields: never its whole answer, which may
        repeat the prompt."""
        try:
            answer = json.loads(content[:65536])
        except ValueError:
            return ""
        for key in ("error", "message", "detail"):
            if isinstance(answer, dict) and isinstance(answer.get(key), dict | str):
                answer = answer[key]
        return self._clean(" ".join(answer.split())[:SHOWN]) if isinstance(answer, str) else ""

    def _clean(self, text: str) -> str:
        """`text` without secrets, this server's key among them whatever its variable is called."""
        key = os.environ.get(self.api_key_env or "", "").strip()
        return redact(text.replace(key, "***") if key else text)


_random = wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = getattr(error, "after", None)
    return max(asked, 0.0) if asked is not None else _random(state)


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None without a sensible one."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return seconds if 0 <= seconds < float("inf") else None
