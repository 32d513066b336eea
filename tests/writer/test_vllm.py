"""The writer that starts vLLM, with a stand-in of vLLM's command: a script that serves as it does."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Answer, Request
from kdcli.errors import ConfigError, KDError
from kdcli.writer.vllm import VLLMWriter
from tests.servers.chat import TINY

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "Say something."}]
STAND_IN = f"""#!{sys.executable} -I
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
here = Path(__file__).parent
words = sys.argv[1:]
(here / "words").write_text(json.dumps(words))
(here / "names").write_text(json.dumps(sorted(os.environ)))
(here / "pid").write_text(str(os.getpid()))
print("loading weights", flush=True)
if "--die" in words:
    sys.exit("CUDA out of memory")
time.sleep(0.3)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.say({{}}, 200 if self.path == "/health" else 404)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "die" in body["messages"][0]["content"]:
            print("engine core died", flush=True)
            os._exit(3)
        known = body["model"] == words[words.index("--served-model-name") + 1]
        message = {{"role": "assistant", "content": "something"}}
        self.say({{"choices": [{{"index": 0, "message": message, "finish_reason": "stop"}}]}}, 200 if known else 404)
    def say(self, value, status):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *args): ...
HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    file = tmp_path / "vllm"
    file.write_text(STAND_IN)
    file.chmod(0o755)
    yield file
    assert gone(file), "nothing is left running"


def gone(executable: Path, seconds: float = 30.0) -> bool:
    """Whether the stand-in has ended."""
    file = executable.with_name("pid")
    end = time.monotonic() + seconds
    while file.exists() and time.monotonic() < end:
        try:
            state = Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return not file.exists()


def writer(executable: Path, **settings: Any) -> VLLMWriter:
    return VLLMWriter(**({"path": TINY, "executable": str(executable), "retries": 0} | settings))


def ask(writer: VLLMWriter, words: str = "Say something.") -> Answer:
    return writer.write([Request(messages=[{"role": "user", "content": words}])])[0]


def test_it_starts_vllm_asks_it_and_ends_it(
    executable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    caplog.set_level(logging.INFO, "kdcli")
    own = writer(executable, arguments=["--max-model-len", "256"])
    assert list(ask(own).texts) == ["something"] and list(ask(own).texts) == ["something"]
    words, names = executable.with_name("words").read_text(), executable.with_name("names").read_text()
    assert '"--host", "127.0.0.1"' in words and '"--max-model-len", "256"]' in words and "tiny_teacher" in words
    assert "PATH" in names and "MY_API_KEY" not in names, "it has no use for others' keys"
    assert "vLLM serves" in caplog.text
    assert own._log is not None and own._log.exists()
    own.close()
    assert gone(executable) and not own._log.exists()
    own.close()


def test_a_missing_vllm_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match=r"there is no no-such-vllm; .*pip install vllm.*writer\.executable="):
        ask(writer(Path("no-such-vllm")))


def test_what_it_said_last_is_told_when_it_does_not_start(executable: Path) -> None:
    own = writer(executable, arguments=["--die"])
    with pytest.raises(ConfigError, match=r"ended with 1 before it served.*CUDA out of memory"):
        ask(own)
    own.close()
    assert own._log is not None and own._log.exists(), "its log is kept"


def test_it_is_not_waited_for_without_end(executable: Path) -> None:
    with pytest.raises(ConfigError, match=r"startup_seconds.*did not serve within 0 s"):
        ask(writer(executable, startup_seconds=0.05))


def test_what_it_said_last_is_told_when_it_ends_in_the_middle(executable: Path) -> None:
    own = writer(executable)
    ask(own)
    with pytest.raises(KDError, match=r"vLLM ended while it was asked.*engine core died"):
        ask(own, "die")
    own.close()


def test_it_dies_with_the_process_that_started_it(executable: Path) -> None:
    script = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from kdcli.api import Request
        from kdcli.writer.vllm import VLLMWriter
        writer = VLLMWriter(path={TINY!r}, executable={str(executable)!r})
        print(writer.write([Request(messages={MESSAGES!r})])[0].texts, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and b"something" in process.stdout.readline()
        assert not gone(executable, 0.1)
        process.kill()
    assert gone(executable)


def test_the_identity_is_of_the_weights_and_the_arguments_and_not_of_the_port() -> None:
    same = VLLMWriter(path=TINY).identity()
    assert same == VLLMWriter(path=TINY, port=8000, executable="/x/vllm", concurrency=1).identity()
    assert same != VLLMWriter(path=TINY, arguments=["--max-model-len", "9"]).identity()
    assert same != VLLMWriter(path=TINY, temperature=0.0).identity()
    assert same["weights"] and VLLMWriter(path=TINY).endpoint == "local"
