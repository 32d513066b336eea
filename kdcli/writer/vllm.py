"""A model that vLLM serves on this machine, for as long as the run lasts (Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

from kdcli.api import Answer, Request, Writer
from kdcli.errors import ConfigError, KDError
from kdcli.store import paths
from kdcli.store.log import SECRET_NAME, redact
from kdcli.store.weights import weights_hash
from kdcli.writer import _leash
from kdcli.writer._served import Pricing
from kdcli.writer.chat import ChatWriter

log = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds that vLLM has to end by itself
TELL_EVERY = 30.0  # seconds between two words while it loads
SHOWN = 1500  # characters of its log in a message
LOST = ("no connection", "connection cut", "no HTTP")  # failures that may mean that it has ended
INSTALL = "install it into an environment of its own (`python -m venv vllm && vllm/bin/pip install vllm`)"


class VLLMWriter(Writer):
    """Starts `EXECUTABLE serve PATH --host 127.0.0.1 --port PORT ARGUMENTS…` at the first question and asks it as
    `ChatWriter` asks any server. It ends at `close`, and with this process, however that ends.

    vLLM wants other versions of torch and transformers than kdcli, so `executable` usually lies in an environment of
    its own. It sees no variable that looks like a key, but HF_TOKEN. `arguments` are vLLM's, one word each.

    Raises ConfigError where there is no such executable, or where it ends before it serves.
    """

    def __init__(
        self,
        *,
        path: str,
        executable: str = "vllm",
        port: int | None = None,
        arguments: Sequence[str] = (),
        startup_seconds: float = 1800.0,
        revision: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 2,
        deadline: float = 1800.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 512,
        structured: Literal["auto", "guided", "none"] = "auto",
        keep_reasoning: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        **pricing: Unpack[Pricing],
    ) -> None:
        self.path = path
        self.executable = executable
        self.port = port
        self.arguments = tuple(map(str, arguments))
        self.startup_seconds = startup_seconds
        self.revision = revision
        self._asking: dict[str, Any] = {
            "model": path,
            "concurrency": concurrency,
            "timeout": timeout,
            "retries": retries,
            "deadline": deadline,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "structured": structured,
            "keep_reasoning": keep_reasoning,
            "extra_body": extra_body,
            **pricing,
        }
        unstarted = ChatWriter(url="http://127.0.0.1", **self._asking)  # refuses settings that cannot work
        self.concurrency = concurrency
        self.price_prompt, self.price_completion = unstarted.price_prompt, unstarted.price_completion
        self.license, self.terms = unstarted.license, unstarted.terms
        self._identity = {key: value for key, value in unstarted.identity().items() if key not in ("url", "model")}
        self._chat: ChatWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return "local"

    @property
    def model(self) -> str:
        return self.path

    def identity(self) -> Mapping[str, Any]:
        weights = weights_hash(self.path, self.revision)
        return {**self._identity, "kind": "vllm", "weights": weights, "arguments": list(self.arguments)}

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        with self._lock:
            chat = self._chat = self._chat or self._started()
        answers = chat.write(requests)
        if any(answer.failed in LOST for answer in answers) and self._ended():
            raise KDError(f"writer: vLLM ended while it was asked; {self._last_words()}; then go on with kdcli resume")
        return answers

    def close(self) -> None:
        with self._lock:
            well = self._chat is not None and self._process is not None and self._process.poll() is None
            if self._chat is not None:
                self._chat.close()
                self._chat = None
            self._stop()
            if well and self._log is not None:  # else it may say why
                self._log.unlink(missing_ok=True)

    def _started(self) -> ChatWriter:
        executable = shutil.which(os.path.expanduser(self.executable))
        if executable is None:
            raise ConfigError(
                f"writer.executable: there is no {self.executable}; {INSTALL} and set writer.executable=vllm/bin/vllm"
            )
        port = self.port or _free_port()
        local = paths.resolve(self.path)
        model = str(local) if local.exists() else self.path
        command = [executable, "serve", model]
        if Path(executable).name.startswith("python"):  # builds for CPUs whose `vllm` does not know its own version
            command = [executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.path]
        command += ["--revision", self.revision] if self.revision else []
        handle, name = tempfile.mkstemp(prefix="kdcli-vllm-", suffix=".log")
        self._log = Path(name)
        with open(handle, "wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-I", _leash.__file__, str(PATIENCE), *command, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={
                    key: value for key, value in os.environ.items() if key == "HF_TOKEN" or not SECRET_NAME.search(key)
                },
            )
        log.info("writer: vLLM loads %s and will serve it on 127.0.0.1:%d (log: %s)", self.path, port, self._log)
        try:
            self._wait(port, self._process)
        except BaseException:
            self._stop()
            raise
        return ChatWriter(url=f"http://127.0.0.1:{port}/v1", **self._asking)

    def _wait(self, port: int, process: subprocess.Popen[bytes]) -> None:
        """Until it serves. Raises ConfigError if it ends before that, or takes too long."""
        begun = told = time.monotonic()
        while not _healthy(port):
            now = time.monotonic()
            if process.poll() is not None:
                raise ConfigError(
                    f"writer: vLLM ended with {process.returncode} before it served; {self._last_words()}"
                )
            if now - begun > self.startup_seconds:
                raise ConfigError(
                    f"writer.startup_seconds: vLLM did not serve within {self.startup_seconds:.0f} s; "
                    f"{self._last_words()}"
                )
            if now - told > TELL_EVERY:
                told = now
                log.info("writer: vLLM is loading %s, for %.0f s so far", self.path, now - begun)
            time.sleep(min(1.0, 0.05 + (now - begun) / 10))
        log.info("writer: vLLM serves %s after %.0f s", self.path, time.monotonic() - begun)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()  # the leash
        try:
            process.wait(PATIENCE + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ended(self) -> bool:
        """Whether it has, or does so in a moment."""
        process = self._process
        if process is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
        return process.poll() is not None

    def _last_words(self) -> str:
        assert self._log is not None
        text = redact(self._log.read_text("utf-8", "replace")).strip()
        return f"its log ({self._log}) ends: …{' '.join(text[-SHOWN:].split())}"


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
