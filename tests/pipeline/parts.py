"""A small real pipeline for tests: a loopback server that notes what it is asked, a writer that asks it over HTTP,
three steps that ask, filter and judge, and processes to run and to kill it in."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import random
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcli.api import Answer, Example, Request, Transform, Writer
from kdcli.augmentation._asking import child, filled
from kdcli.data.jsonl import Jsonl
from kdcli.pipeline import desk
from kdcli.pipeline.pipeline import Pipeline
from kdcli.store.examples import content_key
from tests.distributed import collect_ranks

SECONDS = 0.003  # mean time of the server for an answer


def ended(work: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> int:
    """`work(*arguments)` in a process of its own; its exit code, or minus the signal that ended it. Raises
    AssertionError with its traceback if it raised."""
    ((done, told),) = collect_ranks(
        1, within, desk.WINDOW, work, *arguments, timeout=120, env=dict(environment or {}), join=False
    )
    died = re.fullmatch(r"died with exit code (-?\d+)", str(told))
    assert done or died, told
    return int(died[1]) if died else 0


def within(window: int, work: Callable[..., Any], *arguments: Any) -> None:
    """`work(*arguments)` with another window of questions."""
    desk.WINDOW = window
    work(*arguments)


@contextmanager
def server(notes: Path) -> Iterator[int]:
    """Answers each prompt with its hash, and adds the hash to `notes`; its port."""
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def main() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
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
        begun.set_result((loop, over, listening.sockets[0].getsockname()[1]))
        await over.wait()
        listening.close()
        os.close(notes_file)

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    loop, over, port = begun.result(timeout=60)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


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
