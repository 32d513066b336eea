"""Questions to a model server: JSON over HTTP, asked again where that helps, and never believed unread.

An answer is given to the caller's `read`, which takes from it what was asked for or raises `BadAnswerError`; only then
is the question done. So a page of HTML, nonsense or a cut answer is a failure like any other, and never data.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

from kdcli.errors import ConfigError, KDError
from kdcli.store.address import Server, read_key, require_name
from kdcli.store.connections import Connections, Reply, TooLongError
from kdcli.store.fault import fault
from kdcli.store.log import redact

log = logging.getLogger(__name__)

T = TypeVar("T")

AGAIN = {408, 425, 429} | (set(range(500, 600)) - {501, 505})  # may be otherwise the next time
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
SHOWN = 300  # characters of a server's own words in a message


class UnansweredError(KDError):
    """No usable answer after the last try. `short`: a reason to count by; `last`: what the last try met."""

    def __init__(self, message: str, short: str = "no answer", last: str = "") -> None:
        super().__init__(message)
        self.short, self.last = short, last or message


class BadAnswerError(UnansweredError):
    """The server answered, but not what was asked for; it may do so the next time."""

    def __init__(self, message: str, short: str = "unusable answer", last: str = "") -> None:
        super().__init__(message, short, last)


class _TryAgainError(UnansweredError):
    """A failure that may pass. `after`: seconds that the server asks to wait."""

    def __init__(self, message: str, short: str, after: float | None = None) -> None:
        super().__init__(message, short)
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
    max_bytes: int  # of the answer
    headers: Mapping[str, str] = field(default_factory=dict)  # besides the usual ones


class Client:
    """Asks one server. Threads may share it.

    `timeout`: seconds for one answer. A question is asked up to 1 + `retries` times within `deadline` seconds, with
    random pauses that double (up to a minute), or as long as Retry-After says. `api_key_env` names the variable that
    holds a key, which is read when it is used and goes to this server alone, in `key_header`. What else is guarded,
    `Connections` says. `where` begins messages.
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
        key_header: str = "Authorization",
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
        self.key_header = key_header
        self._connections = Connections(self.server, kept=concurrency)
        self._path = quote(urlsplit(self.server.url).path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
        self._host = urlsplit(self.server.url).netloc.encode("idna").decode("ascii")

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
        try:
            return self._once(question, read, begun)
        except UnansweredError as error:
            last = error
        given_up = given_up or threading.Event()

        ended = stop_any(stop_after_attempt(tries), stop_when_event_set(given_up))
        trying = Retrying(  # costs as much as an exchange, so only what failed meets it
            stop=lambda state: ended(state) or time.monotonic() - begun + state.upcoming_sleep >= self.deadline,
            wait=_pause,
            sleep=sleep_using_event(given_up),
            retry=retry_if_exception_type(UnansweredError),
            before_sleep=lambda state: self._tell(state, tries),
            reraise=True,
        )
        tried = 0

        def again() -> T:
            nonlocal last, tried
            tried += 1
            if tried == 1 or given_up.is_set():
                raise last
            try:
                return self._once(question, read, begun)
            except UnansweredError as error:
                last = error
                raise

        try:
            return trying(again)
        except UnansweredError as error:
            asked = trying.statistics.get("attempt_number", 1)
            kind = BadAnswerError if isinstance(error, BadAnswerError) else UnansweredError
            raise kind(
                f"{self.where}: {self.server.name} gave no usable answer in {asked} {'try' if asked == 1 else 'tries'} "
                f"and {time.monotonic() - begun:.0f} s: {error}; see to the server, then go on from the last "
                f"checkpoint with kdcli resume (or raise {self.where}.retries or {self.where}.deadline)",
                error.short,
                error.last,
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
        self._connections.close()

    def _once(self, question: Question, read: Callable[[Any], T], begun: float) -> T:
        fault("teacher.request")
        left = max(0.001, min(self.timeout, self.deadline - (time.monotonic() - begun)))
        path, headers, body = self._request(question)
        try:
            reply = self._connections.post(path, headers, body, seconds=left, max_bytes=question.max_bytes)
        except TooLongError as error:
            raise BadAnswerError(f"{error}, far more than was asked", "answer too long") from error
        except (http.client.HTTPException, OSError) as error:
            raise self._unreachable(error, left) from error
        self._judge(question, reply)
        try:
            answer = json.loads(reply.content)
        except ValueError as error:
            kind = reply.headers.get("content-type", "no content type").split(";")[0][:40]
            raise BadAnswerError(
                f"HTTP {reply.status} with {len(reply.content):,} bytes of {kind} that are no JSON", "no JSON"
            ) from error
        return read(answer)

    def _judge(self, question: Question, reply: Reply) -> None:
        """Raise unless the server did what was asked."""
        status = reply.status
        if status < 300 and reply.headers.get("content-encoding", "identity") != "identity":
            raise BadAnswerError("an answer that is compressed, which was not asked for")
        if status < 300:
            return
        said = self._words(reply.content)
        if status == 429 and b"insufficient_quota" in reply.content[:65536]:  # OpenAI's word for an empty account
            raise RefusedError(self._no(402, question.path, said), 402, said)
        if status in AGAIN:
            told = f"HTTP {status}{said and f' ({said})'}"
            raise _TryAgainError(told, f"HTTP {status}", _retry_after(reply.headers))
        if status < 400:
            raise RefusedError(
                f"{self.where}.url: {self.server.name} redirects (HTTP {status}), which is not followed, since prompts "
                "and keys would go elsewhere; give the URL of the server itself",
                status,
                said,
            )
        raise RefusedError(self._no(status, question.path, said), status, said)

    def _request(self, question: Question) -> tuple[str, dict[str, str], bytes]:
        """Path, headers and body."""
        headers = {
            "Host": self._host,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            **question.headers,
        }
        if self.api_key_env:
            key = read_key(self.api_key_env, self.server, f"{self.where}.api_key_env")
            headers[self.key_header] = f"Bearer {key}" if self.key_header == "Authorization" else key
        base = "" if question.path.startswith("//") else self._path
        return base + "/" + question.path.lstrip("/"), headers, json.dumps(question.body).encode()

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

    def _unreachable(self, error: Exception, seconds: float) -> _TryAgainError:
        if isinstance(error, TimeoutError):
            told = f"no complete answer in {seconds:.1f} s (raise {self.where}.timeout for a slow server)"
            return _TryAgainError(told, "timeout")
        if isinstance(error, http.client.IncompleteRead):
            return _TryAgainError("the connection was cut in the middle of an answer", "connection cut")
        said = " ".join(str(error).split())[:SHOWN] if isinstance(error, OSError) else ""  # others quote what came
        reason = self._clean(said or type(error).__name__)
        told = f"no answer ({reason}); is the server running, and is {self.where}.url right?"
        return _TryAgainError(told, "no connection" if isinstance(error, OSError) else "no HTTP")

    def _no(self, status: int, path: str, said: str) -> str:
        told = f"{self.where}: {self.server.name} refuses /{path.lstrip('/')} with HTTP {status}{said and f' ({said})'}"
        if status in (401, 403):
            return f"{told}; name the variable that holds its key in {self.where}.api_key_env"
        if status == 402:
            return f"{told}; the account has no credit left"
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


def _retry_after(headers: Mapping[str, str]) -> float | None:
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
