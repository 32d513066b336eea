"""A small real pipeline for tests: a loopback server in its own process that notes what it is asked, a writer that
asks it over HTTP, and three steps that ask, filter and judge."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcli.api import Answer, Example, Request, Transform, Writer
from kdcli.augmentation._asking import child, filled
from kdcli.data.jsonl import Jsonl
from kdcli.pipeline.pipeline import Pipeline
from kdcli.store.examples import content_key

SECONDS = 0.003  # mean time of the server for an answer


@contextmanager
def forked(work: Callable[[], None], end: int = signal.SIGKILL) -> Iterator[int]:
    """`work` in a process of its own, which is killed at the end; its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, end)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def ended(work: Callable[[], None], environment: Mapping[str, str] | None = None, kill_after: float = 60.0) -> int:
    """Run `work` in a process of its own; its exit code, or minus the signal that ended it."""

    def there() -> None:
        os.environ.update(environment or {})
        work()

    with forked(there) as pid:
        timer = threading.Timer(kill_after, os.kill, (pid, signal.SIGKILL))
        timer.start()
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        return os.waitstatus_to_exitcode(status)


@contextmanager
def server(notes: Path) -> Iterator[int]:
    """Answers each prompt with its hash, and adds the hash to `notes`; its port."""
    ready, tell = os.pipe()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        notes_file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        draw = random.Random(0)

        class Answering(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                self.transport, self.held = transport, b""

            def data_received(self, data: bytes) -> None:
                self.held += data
                head, _, body = self.held.partition(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                if len(body) < size or not head:
                    return
                self.held = b""
                text = hashlib.sha256(body).hexdigest()
                os.write(notes_file, f"{text}\n".encode())
                answer = b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + text.encode()
                loop.call_later(SECONDS * 2 * draw.random(), self.transport.write, answer)

        listening = await loop.create_server(Answering, "127.0.0.1", 0)
        os.write(tell, str(listening.sockets[0].getsockname()[1]).encode())
        await listening.serve_forever()

    with forked(lambda: asyncio.run(main())):
        yield int(os.read(ready, 16))
        os.close(ready)
        os.close(tell)


class Asks(Writer):
    """Asks the server; an answer is n hashes."""

    endpoint = "127.0.0.1"
    model = "hashes"
    price_prompt = 1.0
    price_completion = 2.0

    def __init__(self, port: int, concurrency: int = 8) -> None:
        self.port = port
        self.concurrency = concurrency
        self.local = threading.local()

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Answer:
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        self.local.connection.request("POST", "/", asked(request))
        text = self.local.connection.getresponse().read().decode()
        return Answer(
            texts=[f"{text} {sample}" for sample in range(request.n)],
            finished=["stop"] * request.n,
            prompt_tokens=10,
            completion_tokens=request.n,
            model="hashes-1",
        )

    def identity(self) -> Mapping[str, Any]:
        return {"model": self.model}


def asked(request: Request) -> bytes:
    return json.dumps([list(request.messages), request.seed, request.n]).encode()


class Label(Transform):
    """n answers a row, one group; answers that begin with `0` are set aside."""

    def __init__(self, *, n: int = 1, writer: str = "teacher", say: str = "answer") -> None:
        self.n = n
        self.writer = writer
        self.say = say

    def writers(self) -> Sequence[str]:
        return (self.writer,)

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example, answer in self.desk.ask(self.writer, self._questions(examples)):
            if answer.failed:
                self.desk.aside(example, answer.failed)
                continue
            for text in answer.texts:
                if text.startswith("0"):
                    self.desk.aside(example, "begins with 0", "as it should not", text)
                else:
                    written = self.desk.provenance(self.writer, answer, "template")
                    yield filled(example, {"response": text, "score": len(text)}, written)

    def _questions(self, examples: Iterable[Example]) -> Iterator[tuple[Example, Request]]:
        for example in examples:
            if "skip" in (example.prompt or ""):
                self.desk.aside(example, "skipped", "as its prompt says")
                continue
            text = f"{self.say}: {example.prompt} {example.response}"
            request = Request(
                messages=({"role": "user", "content": text},),
                n=self.n,
                seed=self.desk.seed(content_key(example)),
                rehearsal="an answer",
            )
            yield example, request


class Grow(Transform):
    """A fixed number of new rows, however many it is given; the old ones are dropped."""

    def __init__(self, *, count: int, writer: str = "teacher") -> None:
        self.count = count
        self.writer = writer

    def writers(self) -> Sequence[str]:
        return (self.writer,)

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        parents = list(examples)
        questions = (
            (parents[i % len(parents)], Request(messages=({"role": "user", "content": f"new {i}"},), rehearsal="new"))
            for i in range(self.count)
        )
        for parent, answer in self.desk.ask(self.writer, questions):
            written = self.desk.provenance(self.writer, answer, "template")
            yield child([parent], {"prompt": answer.texts[0]}, written)


class Odd(Transform):
    """Keeps rows by what their response says, and remembers that."""

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            value = int(str(example.response)[1], 16)
            (score,) = self.desk.remember("odd", [content_key(example)], lambda _, value=value: [value])
            if score % 4 and not self.desk.rehearsal:
                yield example
            else:
                self.desk.aside(example, "not odd")


def seeds(folder: Path, count: int = 40) -> Path:
    """Prompts without responses, some of them equal, some to be skipped."""
    file = folder / "seeds.jsonl"
    rows = [{"prompt": f"question {i % (count - 3)}{' skip' if i % 17 == 5 else ''}", "tag": i} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pipeline(
    folder: Path, writer: Writer, *, run: str = "run", answers: str = "answers.sqlite", **more: Any
) -> Pipeline:
    """seeds -> label (n = 2) -> odd -> judge."""
    settings: dict[str, Any] = {
        "data": Jsonl(path=str(folder / "seeds.jsonl")),
        "steps": {"label": Label(n=2), "odd": Odd(), "judge": Label(say="judge")},
        "writers": {"teacher": writer},
        "settings": {"label": {"n": 2}, "judge": {"say": "judge"}},
        "folder": folder / run,
        "answers": folder / answers,
    }
    return Pipeline(**settings | more)


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, but for the name of its account."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".run"
    }


def committed(answers: Path) -> set[str]:
    """The hashes that the store has: each stands for one question."""
    if not answers.exists():
        return set()
    connection = sqlite3.connect(answers)
    try:
        rows = connection.execute("SELECT answer FROM answers").fetchall()
    except sqlite3.OperationalError:  # killed before there were tables
        return set()
    finally:
        connection.close()
    return {json.loads(row[0])["texts"][0].split()[0] for row in rows}


def noted(notes: Path) -> list[str]:
    """What the server was asked, in order."""
    return notes.read_text().split() if notes.exists() else []


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
