"""A chat server for tests, on loopback in this process: OpenAI's and Anthropic's wire formats, and faults on demand.

Answers come from a function, or from a real model (`recipes://data/tiny_teacher`) through `HFWriter`, which honours
seed, n, stop, max_tokens and forms. Routes: `/v1/chat/completions`, `/v1/messages`, `/health`, `/v1/models`.

    with serving(lambda asked: "4") as server:
        writer = ChatWriter(url=server.url, model="any")

`server.fail(FAULT, …)` has the next requests meet one fault each, in order; `server.fail_when(words, FAULT, times=n)`
those whose messages hold `words`. Faults:

    status:CODE[:RETRY_AFTER]   an error with that status; 400 says `told to answer 400`
    context                     400, the context is too long, in OpenAI's words
    form                        400, the field for a form is not known, whenever a request has one
    quota                       429, insufficient_quota
    redirect                    307 to another place
    json | html | notjson       200 with broken JSON, with a page, with an empty body
    cut                         a Content-Length that is longer than what is sent
    reset                       the connection is reset before an answer
    close                       the connection is closed before an answer
    choices | null | empty      no choices, content null, content ""
    unfinished                  finish_reason (stop_reason) null
    finish:REASON               that finish_reason (stop_reason), such as length or content_filter
    fewer                       one text, whatever n
    drip[:SECONDS]              a byte each so many seconds
    slow:SECONDS                an answer after so many seconds more
    hang                        no answer until the server closes
    huge                        64 MiB
    usage                       no usage
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kdcli.api import Request

TINY = "recipes://data/tiny_teacher"


@dataclass(frozen=True)
class Asked:
    """One request, and which of its samples is wanted."""

    messages: Sequence[Mapping[str, str]]
    sample: int
    seed: int
    body: Mapping[str, Any] = field(repr=False)

    @property
    def prompt(self) -> str:
        """What the last message says."""
        return self.messages[-1]["content"]

    @property
    def words(self) -> str:
        """All messages in one text."""
        return "\n".join(message["content"] for message in self.messages)


Say = Callable[[Asked], str]


class ChatServer:
    """What a test knows of the server: where it is, what it was asked, and how to make it fail."""

    def __init__(self, say: Say | None, model: str | None, *, latency: float, key: str | None) -> None:
        self.latency = latency  # seconds before each answer
        self.key = key  # what clients must send; None: anything
        self.requests: list[dict[str, Any]] = []  # bodies, in order of arrival
        self.headers: list[dict[str, str]] = []  # of each, names in lower case
        self.counts: Counter[str] = Counter()  # by content hash, those that failed too
        self.answered: Counter[str] = Counter()  # by content hash, those that got a good answer
        self.connections = 0
        self.most = 0  # requests at a time
        self.port = 0
        self.ended = threading.Event()
        self._say, self._model, self._writer = say, model, None
        self._faults: list[str] = []
        self._when: list[list[Any]] = []
        self._now = 0
        self.lock = threading.Lock()
        self._writing = threading.Lock()
        self._written: dict[str, list[tuple[str, str]]] = {}  # rounding errors differ from thread to thread

    @property
    def url(self) -> str:
        """Base URL of the OpenAI format."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def root(self) -> str:
        """Base URL of the Anthropic format."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def asked(self) -> int:
        return len(self.requests)

    def fail(self, *faults: str) -> None:
        """The next requests meet these, one each; "" is none. Replaces what was still to come."""
        with self.lock:
            self._faults = list(faults)

    def fail_when(self, words: str, fault: str, times: int = 1 << 30) -> None:
        """Requests whose messages hold `words` meet `fault`, so many times."""
        with self.lock:
            self._when.append([words, fault, times])

    def mend(self) -> None:
        """No more faults."""
        with self.lock:
            self._faults, self._when = [], []

    def forget(self) -> None:
        """Count and record from the beginning."""
        with self.lock:
            self.requests, self.headers = [], []
            self.counts.clear()
            self.answered.clear()
            self.most = 0

    def texts(self, messages: Sequence[Mapping[str, str]], body: Mapping[str, Any], n: int) -> list[tuple[str, str]]:
        """n texts, and why each ended; a model gives equal requests equal texts."""
        seed = int(body.get("seed") or 0)
        if self._model is None:
            say = self._say or echo
            return [(say(Asked(messages, sample, seed, body)), "stop") for sample in range(n)]
        key = f"{n} {content_hash(dict(body))}"
        with self._writing:  # the model is one
            if key in self._written:
                return self._written[key]
            if self._writer is None:
                from kdcli.writer.hf import HFWriter

                self._writer = HFWriter(path=self._model, closed=True)
            stop = body.get("stop") or body.get("stop_sequences") or ()
            request = Request(
                messages=messages,
                n=n,
                seed=seed,
                temperature=body.get("temperature"),
                max_tokens=body.get("max_tokens") or body.get("max_completion_tokens"),
                stop=[stop] if isinstance(stop, str) else stop,
                form=form_of(body),
            )
            answer = self._writer.write([request])[0]
            assert not answer.failed, answer
            self._written[key] = list(zip(answer.texts, answer.finished, strict=True))
            return self._written[key]

    def begin(self, body: dict[str, Any], headers: Mapping[str, str]) -> str:
        """Take note of a request; the fault that it meets."""
        words = json.dumps(body.get("messages"), ensure_ascii=False)
        with self.lock:
            self.requests.append(body)
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.counts[content_hash(body)] += 1
            self._now += 1
            self.most = max(self.most, self._now)
            for rule in self._when:
                if rule[2] > 0 and rule[0] in words:
                    rule[2] -= 1
                    return rule[1]
            return self._faults.pop(0) if self._faults else ""

    def end(self) -> None:
        with self.lock:
            self._now -= 1


def echo(asked: Asked) -> str:
    """An answer that tells requests, seeds and samples apart."""
    digest = hashlib.sha256(json.dumps([asked.words, asked.seed, asked.sample]).encode()).hexdigest()
    return f"Answer {digest[:12]}."


def content_hash(body: Mapping[str, Any]) -> str:
    """Of all that a request says."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def form_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The form that a request asks for, in OpenAI's, vLLM's or Anthropic's words."""
    asked = body.get("response_format") or {}
    if asked.get("type") == "json_schema":
        return {"json": asked["json_schema"]["schema"]}
    if body.get("output_config"):
        return {"json": body["output_config"]["format"]["schema"]}
    outputs = body.get("structured_outputs") or {}
    return {key: outputs[key] for key in ("json", "regex") if key in outputs} or None


@contextmanager
def serving(
    say: Say | None = None, *, model: str | None = None, latency: float = 0.0, key: str | None = None
) -> Iterator[ChatServer]:
    """A server until the block ends. `say` makes the texts, by default `echo`; `model` names a real one (`TINY`)."""
    server = ChatServer(say, model, latency=latency, key=key)
    handler = type("Handler", (_Handler,), {"server_": server})
    http = _Server(("127.0.0.1", 0), handler)
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        http.shutdown()
        http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def handle_error(self, *args: Any) -> None: ...


class _Handler(BaseHTTPRequestHandler):
    server_: ChatServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet

    def setup(self) -> None:
        super().setup()
        with self.server_.lock:
            self.server_.connections += 1

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "any"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault, *details = self.server_.begin(body, dict(self.headers)).split(":")
        try:
            time.sleep(self.server_.latency)
            self._answer(body, fault, details)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client had enough
        finally:
            self.server_.end()

    def _answer(self, body: dict[str, Any], fault: str, details: list[str]) -> None:
        anthropic = self.path == "/v1/messages"
        if self.path not in ("/v1/messages", "/v1/chat/completions"):
            return self._error(404, "Not Found")
        sent = self.headers.get("x-api-key" if anthropic else "Authorization", "").removeprefix("Bearer ")
        if self.server_.key is not None and sent != self.server_.key:
            return self._error(401, "Incorrect API key provided")
        if fault == "status":
            after = {"Retry-After": details[1]} if len(details) > 1 else {}
            return self._error(int(details[0]), f"told to answer {details[0]}", headers=after)
        if fault == "context":
            told = "This model's maximum context length is 512 tokens. However, you requested 900 tokens."
            return self._error(400, "prompt is too long: 900 tokens > 512 maximum" if anthropic else told)
        if fault == "form" and form_of(body):
            return self._error(
                400, "Unrecognized request argument supplied: response_format, structured_outputs, output_config"
            )
        if fault == "quota":
            return self._error(429, "You exceeded your current quota", code="insufficient_quota")
        if fault == "redirect":
            return self._send(307, b"{}", {"Location": "http://127.0.0.1:9/v1/chat/completions"})
        if fault == "html":
            return self._send(200, b"<html><body>Welcome</body></html>", {"Content-Type": "text/html"})
        if fault == "notjson":
            return self._send(200, b"", {})
        if fault == "huge":
            return self._send(200, b" " * (64 << 20), {})
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        if fault in ("reset", "close"):
            self.close_connection = True
            return None
        if fault == "hang":
            self.server_.ended.wait()
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(float(details[0]))
        made = (self._anthropic if anthropic else self._openai)(body, fault, details)
        content = json.dumps(made).encode()
        if fault == "json":
            return self._send(200, content[:-9], {"Content-Type": "application/json"})
        if fault in ("cut", "drip"):
            return self._broken(content, fault, float(details[0]) if details else 0.05)
        with self.server_.lock:
            self.server_.answered[content_hash(body)] += not fault or fault in ("slow", "usage", "fewer")
        return self._json(200, made)

    def _openai(self, body: dict[str, Any], fault: str, details: list[str]) -> dict[str, Any]:
        n = 1 if fault == "fewer" else int(body.get("n") or 1)
        found = self.server_.texts(body["messages"], body, n)
        choices: list[dict[str, Any]] = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finished}
            for i, (text, finished) in enumerate(found)
        ]
        for choice in choices:
            if fault in ("null", "empty"):
                choice["message"]["content"] = None if fault == "null" else ""
            if fault in ("unfinished", "finish"):
                choice["finish_reason"] = details[0] if fault == "finish" else None
        made: dict[str, Any] = {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices}
        if fault == "choices":
            made["choices"] = []
        if fault != "usage":
            written = sum(len(text.split()) for text, _ in found)
            made["usage"] = {"prompt_tokens": _words(body), "completion_tokens": written}
        return made

    def _anthropic(self, body: dict[str, Any], fault: str, details: list[str]) -> dict[str, Any]:
        messages = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        ((text, finished),) = self.server_.texts([*messages, *body["messages"]], body, 1)
        content: list[dict[str, Any]] = [{"type": "text", "text": "" if fault in ("empty", "null") else text}]
        reason: str | None = {"stop": "end_turn", "length": "max_tokens"}[finished]
        if fault in ("unfinished", "finish"):
            reason = details[0] if fault == "finish" else None
        made: dict[str, Any] = {"id": "msg_x", "type": "message", "role": "assistant", "model": body["model"]}
        made |= {"content": [] if fault in ("choices", "null") else content, "stop_reason": reason}
        made["stop_sequence"] = None
        if fault != "usage":
            made["usage"] = {"input_tokens": _words(body), "output_tokens": len(text.split())}
        return made

    def _broken(self, content: bytes, fault: str, pause: float) -> None:
        self._head(200, len(content), {"Content-Type": "application/json"})
        pieces = [content[: len(content) // 2]] if fault == "cut" else [bytes([b]) for b in content]
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()
            if fault == "drip" and self.server_.ended.wait(pause):
                break
        self.close_connection = True

    def _error(self, status: int, told: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        error = {"type": "error", "message": told, "code": code}
        self._send(status, json.dumps({"type": "error", "error": error}).encode(), headers or {})

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, len(content), headers)
        self.wfile.write(content)
        self.wfile.flush()

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


def _words(body: Mapping[str, Any]) -> int:
    return sum(len(str(message["content"]).split()) for message in body["messages"])
