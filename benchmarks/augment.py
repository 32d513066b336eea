"""What augmentation costs beside the server's time: calls a second, and a run whose answers are known.

    python -m benchmarks.augment [--calls 12800] [--rows 1000000] [--json FILE]

A server on loopback, in its own process, answers each question after 50 ms. The whole pipeline asks it: seeds from a
file, the step label with a prompt file, writer=chat at concurrency 64, the store of answers, rows in order. The ideal
is 64 / 0.05 s = 1280 calls a second. `client` is the writer alone in 64 threads, `pipeline` the pipeline with a writer
that only sleeps. Then the same run again: its step is done, and only its files are looked at; and in a fresh folder,
where each answer comes from the store. `load` are the processes that wanted a core just before. With --rows,
benchmarks/augment_rows.py is run too. Exits 1 where kdcli misses a bar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, finish
from kdcli.api import Answer, Request, Writer
from kdcli.augmentation.label import Label
from kdcli.data.jsonl import Jsonl
from kdcli.pipeline.pipeline import Pipeline
from kdcli.pipeline.progress import Outcome
from kdcli.writer.chat import ChatWriter

SECONDS, CONCURRENCY = 0.05, 64
IDEAL = CONCURRENCY / SECONDS  # calls a second
QUESTION = 400  # characters of a seed
ANSWER = "The tide follows the moon. " * 15
PROMPT = """# Asks for an answer
paper: "none: a benchmark"
system: You answer questions in full sentences.
user: |-
  Answer this question{% if domain != "default" %} about {{ domain }}{% endif %}: {{ prompt }}
parse: {kind: text}
example: An answer.
"""
Result = dict[str, Any]


def serve(port: Any) -> None:
    """The server: raw HTTP/1.1, so that its own time is small beside the 50 ms. Sends its port through a pipe."""
    choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 120, "completion_tokens": 90, "total_tokens": 210}
    body = json.dumps({"id": "1", "model": "slow", "choices": [choice], "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    class Answering(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.held = transport, b""

        def data_received(self, data: bytes) -> None:
            self.held += data
            end = self.held.find(b"\r\n\r\n")
            if end < 0:
                return
            mark = self.held[:end].lower().find(b"content-length:")
            size = int(self.held[mark + 15 : end].split(b"\r\n")[0])
            if len(self.held) >= end + 4 + size:
                self.held = self.held[end + 4 + size :]
                asyncio.get_running_loop().call_later(SECONDS, self.transport.write, head + body)

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0, backlog=512)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


class Sleeper(Writer):
    """Answers after the same time, without a server."""

    concurrency = CONCURRENCY

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        time.sleep(SECONDS)
        return [
            Answer(texts=[ANSWER], finished=["stop"], prompt_tokens=120, completion_tokens=90, date="2026-01-01")
            for _ in requests
        ]

    def identity(self) -> Mapping[str, Any]:
        return {"sleeps": SECONDS}

    @property
    def endpoint(self) -> str:
        return "local"

    @property
    def model(self) -> str:
        return "sleeper"


def chat(port: int) -> ChatWriter:
    return ChatWriter(url=f"http://127.0.0.1:{port}/v1", model="slow", concurrency=CONCURRENCY)


def pipeline(folder: Path, run: str, writer: Writer) -> Pipeline:
    prompt = folder / "answer.yaml"
    prompt.write_text(PROMPT)
    return Pipeline(
        data=Jsonl(path=str(folder / "seeds.jsonl")),
        steps={"label": Label(prompt=str(prompt))},
        writers={"teacher": writer},
        settings={"label": {}},
        folder=folder / run,
        answers=folder / "caches" / f"{run.partition('-')[0]}.sqlite",
    )


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, CPU seconds, and what it returns."""
    began, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - began, time.process_time() - cpu, found


def client(port: int, calls: int) -> Result:
    """The writer alone."""
    writer = chat(port)
    messages = ({"role": "user", "content": "x" * QUESTION},)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        seconds, cpu, _ = timed(
            lambda: list(pool.map(lambda i: writer.write([Request(messages=messages, seed=i)]), range(calls)))
        )
    writer.close()
    return told(calls, seconds, cpu)


def told(calls: int, seconds: float, cpu: float) -> Result:
    return {
        "seconds": seconds,
        "calls_per_second": calls / seconds,
        "share_of_ideal": calls / seconds / IDEAL,
        "cpu_ms_per_call": 1e3 * cpu / calls,
        "load": os.getloadavg()[0],
    }


def measure(folder: Path, calls: int, port: int) -> Result:
    """All but the rows."""
    (folder / "seeds.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} {'tide ' * (QUESTION // 5)}", "id": i}) + "\n" for i in range(calls))
    )
    found: Result = {"calls": calls, "client": client(port, calls)}
    for name, writer in (("pipeline", Sleeper()), ("chat", chat(port))):
        seconds, cpu, outcome = timed(pipeline(folder, name, writer).run)
        assert outcome.count == outcome.spent.calls == calls, outcome
        found[name] = told(calls, seconds, cpu)
    first = found["chat"]["seconds"]
    for name, run in (("done", "chat"), ("stored", "chat-again")):
        before = outcome.spent.calls if name == "done" else 0
        times: list[float] = []
        for turn in range(3):
            seconds, _, again = timed(pipeline(folder, run if name == "done" else f"{run}-{turn}", chat(port)).run)
            assert isinstance(again, Outcome) and again.count == calls and again.spent.calls == before
            times.append(seconds)
        taken = statistics.median(times)
        found[name] = {"seconds": taken, "ms_per_row": 1e3 * taken / calls, "share_of_first": taken / first, "calls": 0}
    return found


def bars(found: Result) -> list[Bar]:
    """What is promised."""
    share, again, cpu = (
        found["chat"]["share_of_ideal"],
        found["done"]["share_of_first"],
        found["pipeline"]["cpu_ms_per_call"],
    )
    return [
        Bar(claim="0.9 of the ideal calls a second, over the pipeline's", measured=0.9 / share, at_most=1),
        Bar(claim="a re-run's time over the first run's", measured=again, at_most=0.05),
        Bar(claim="CPU ms that the pipeline takes for a call, without HTTP", measured=cpu, at_most=0.4, aim=0.2),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200 * CONCURRENCY)
    parser.add_argument("--rows", type=int, default=0, help="also benchmarks.augment_rows, with so many rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.calls, here.recv())
    server.terminate()
    checked = bars(found)
    if options.rows:
        from benchmarks import augment_rows

        found["rows"], more = augment_rows.measure(options.rows)
        checked += more
    print(json.dumps(found, indent=1))
    return finish(found, checked, options.json)


if __name__ == "__main__":
    sys.exit(main())
