"""A model server for tests: a transformers model behind HTTP in its own process, which can be told to fail.

It speaks as vLLM 0.32 answers (`prompt_logprobs` of `/v1/completions`: the k likeliest and the token itself, by id),
as OpenAI's legacy completions with `echo` and `logprobs` (and vLLM's `return_tokens_as_token_ids`), and as SGLang's
native `/generate` (docs.sglang.io: `input_token_logprobs`, `input_top_logprobs`; the first entry is empty).

`Server.fail(FAULT, …)` has the next requests meet one fault each, in order: `status:CODE[:RETRY_AFTER]`,
`slow:SECONDS`, `drip`, `html`, `cut`, `huge`, `redirect`, or a mangled answer (`MANGLED`).
"""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tests.distributed import CONTEXT


class Server:
    """What a test knows of the server that runs beside it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"

    def fail(self, *faults: str) -> None:
        self._control({"faults": faults})

    def speak(self, *protocols: str, limit: int = 4096) -> None:
        """Answer in these alone: vllm, sglang, openai (tokens as text), openai-ids. `limit`: the most
        log-probabilities that it gives."""
        self._control({"speaks": protocols, "limit": limit})

    def seen(self) -> dict[str, Any]:
        """Since the last call: `asked` (bodies), `keys` (Authorization headers), `most` at a time; and the server's
        own record begins again."""
        return self._control({})

    def _control(self, body: Any) -> Any:
        request = urllib.request.Request(f"{self.url}/control", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)


@contextmanager
def serving(path: str) -> Iterator[Server]:
    """The model of a folder, served as `tiny` until the block ends."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_serve, args=(sender, path), daemon=True)
    process.start()
    try:
        assert receiver.poll(60), "the server did not start"
        yield Server(receiver.recv())
    finally:
        process.kill()
        process.join()


class _Model:
    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.speaks: list[str] = ["vllm", "sglang", "openai-ids"]
        self.limit = 4096

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[N, V]: of the token after each."""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions" and body["model"] != "tiny":
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if path == "/generate" and "sglang" in self.speaks:
            return 200, self._sglang(body)
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        asked = body.get("prompt_logprobs", body.get("logprobs")) or 0
        if asked > self.limit:
            return 400, {
                "error": {"message": f"Requested {asked} logprobs, which is greater than max allowed: {self.limit}"}
            }
        if isinstance(body["prompt"], list) and max(body["prompt"]) >= self.model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(body['prompt'])} is out of vocabulary"}}
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        if "prompt_logprobs" in body and "vllm" in self.speaks:
            choice["prompt_logprobs"] = self._vllm(body["prompt"], asked)
        elif body.get("echo") and {"openai", "openai-ids"} & set(self.speaks):
            as_ids = body.get("return_tokens_as_token_ids") and "openai-ids" in self.speaks
            choice["logprobs"] = self._echo(body["prompt"], asked, as_ids)
        return 200, {"object": "text_completion", "model": "tiny", "choices": [choice]}

    def _vllm(self, ids: list[int], k: int) -> list[Any]:
        places: list[Any] = [None]
        for row, index in zip(self.logprobs(ids), ids[1:], strict=False):
            chosen = [index, *(int(i) for i in row.topk(k).indices if int(i) != index)]
            places.append(
                {str(i): {"logprob": float(row[i]), "rank": 1, "decoded_token": self._text(i)} for i in chosen}
            )
        return places

    def _echo(self, ids: list[int], k: int, as_ids: bool) -> dict[str, Any]:
        name: Callable[[int], str] = (lambda i: f"token_id:{i}") if as_ids else self._text
        table = self.logprobs(ids)
        ids = [*ids, int(table[-1].argmax())]  # max_tokens=1
        top = [
            {name(int(i)): float(row[i]) for i in [*row.topk(k).indices, index]}
            for row, index in zip(table, ids[1:], strict=True)
        ]
        own = [float(row[index]) for row, index in zip(table, ids[1:], strict=True)]
        return {"tokens": [name(i) for i in ids], "token_logprobs": [None, *own], "top_logprobs": [None, *top]}

    def _sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        written = (lambda i: self._text(i)) if body["return_text_in_logprobs"] else (lambda i: None)
        own: list[Any] = [[None, ids[start], written(ids[start])]]
        top: list[Any] = [None]
        for row, index in list(zip(self.logprobs(ids), ids[1:], strict=False))[start:]:
            own.append([float(row[index]), index, written(index)])
            top.append([[float(row[i]), int(i), written(int(i))] for i in row.topk(k).indices])
        return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}

    def _text(self, index: int) -> str:
        return self.tokenizer.decode([index])


def _places(answer: Any) -> list[Any]:
    return answer["choices"][0]["prompt_logprobs"]


def _mangled(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], None]:
    """Change what a vLLM-like answer says of every target."""

    def mangle(answer: Any) -> None:
        _places(answer)[1:] = [change(place) for place in _places(answer)[1:]]

    return mangle


def _all(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda place: {key: {**entry, "logprob": value} for key, entry in place.items()}


MANGLED: dict[str, Callable[[Any], Any]] = {
    "empty": lambda answer: answer["choices"].clear(),
    "null": lambda answer: answer.update(choices=None),
    "absent": lambda answer: answer["choices"][0].pop("prompt_logprobs"),
    "short": lambda answer: _places(answer).pop(),
    "fewer": _mangled(lambda place: dict(list(place.items())[:2])),
    "other": _mangled(lambda place: {str(int(key) ^ 1): entry for key, entry in place.items()}),
    "words": _mangled(lambda place: {key: {**entry, "decoded_token": "zzz"} for key, entry in place.items()}),
    "nan": _mangled(_all(math.nan)),
    "positive": _mangled(_all(0.5)),
    "mass": _mangled(_all(-0.1)),
    "text": _mangled(lambda place: {key: {**entry, "logprob": "low"} for key, entry in place.items()}),
}


class _State:
    def __init__(self, model: _Model) -> None:
        self.model = model
        self.lock = threading.Lock()
        self.faults: list[str] = []
        self.asked: list[Any] = []
        self.keys: list[str] = []
        self.now = self.most = 0


def _serve(sender: Any, path: str) -> None:
    state = _State(_Model(path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    sender.send(server.server_address[1])
    server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    state: _State
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/control":
            return self._json(200, self._control(body))
        with self.state.lock:
            fault = self.state.faults.pop(0) if self.state.faults else ""
            self.state.asked.append(body)
            self.state.keys.append(self.headers.get("Authorization", ""))
            self.state.now += 1
            self.state.most = max(self.state.most, self.state.now)
        try:
            self._answer(body, *fault.split(":"))
        finally:
            with self.state.lock:
                self.state.now -= 1
        return None

    def _control(self, body: Any) -> Any:
        with self.state.lock:
            if "faults" in body:
                self.state.faults = list(body["faults"])
            self.state.model.speaks = body.get("speaks", self.state.model.speaks)
            self.state.model.limit = body.get("limit", self.state.model.limit)
            told = {"asked": self.state.asked, "keys": self.state.keys, "most": self.state.most}
            self.state.asked, self.state.keys, self.state.most = [], [], 0
        return told

    def _answer(self, body: Any, fault: str, *details: str) -> None:
        if fault == "status":
            after = {"Retry-After": details[1]} if len(details) > 1 else {}
            return self._json(int(details[0]), {"error": {"message": f"told to answer {details[0]}"}}, after)
        if fault == "redirect":
            return self._json(307, {}, {"Location": "http://127.0.0.1:9/v1/completions"})
        if fault == "html":
            return self._send(200, b"<html><body>Welcome</body></html>", {"Content-Type": "text/html"})
        if fault == "huge":
            return self._send(200, b" " * (64 << 20), {})
        if fault == "slow":
            time.sleep(float(details[0]))
        status, answer = self.state.model.answer(self.path, body)
        if fault in MANGLED:
            MANGLED[fault](answer)
        if fault in ("cut", "drip"):
            content = json.dumps(answer).encode()
            self._head(200, len(content), {})
            pieces = content[:200] if fault == "drip" else content[: len(content) // 2]
            for piece in (pieces[i : i + 1] for i in range(len(pieces))) if fault == "drip" else [pieces]:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.05 if fault == "drip" else 0)
            self.close_connection = True
            return None
        return self._json(status, answer)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(content), headers)
        try:
            self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True  # the client had enough

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...
