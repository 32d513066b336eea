"""Weights are known by content: the place does not matter, a changed byte, setting or type does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kdcli.errors import ConfigError
from kdcli.store import paths, weights
from kdcli.store.weights import model_fingerprint, weights_hash

TINY = paths.recipes() / "data/tiny_teacher"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def test_a_copy_is_the_same_model_and_a_changed_byte_or_setting_another(model: Path) -> None:
    known = weights_hash(str(model))
    assert known == weights_hash("recipes://data/tiny_teacher")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    changed = weights_hash(str(model))
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert len({known, changed, weights_hash(str(model))}) == 3


def test_a_file_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = weights_hash(str(model))
    monkeypatch.setattr(weights, "file_hash", lambda file: pytest.fail(f"{file} was read again"))
    assert weights_hash(str(model)) == known


def test_the_type_and_what_changes_the_numbers_are_part_of_the_fingerprint(model: Path) -> None:
    found = [
        model_fingerprint(str(model), "float32"),
        model_fingerprint(str(model), "bfloat16"),
        model_fingerprint(str(model), "float32", None, "8 bit"),
    ]
    assert len(set(found)) == 3


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no safetensors files"):
        weights_hash(str(tmp_path))
