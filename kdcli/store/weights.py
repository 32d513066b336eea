"""What a model's weights are, by content: a hash that is the same wherever they lie, and cheap the second time."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import xxhash

from kdcli.errors import ConfigError
from kdcli.store import atomic, paths
from kdcli.store.content import file_hash

log = logging.getLogger(__name__)

LARGE = 2**32  # bytes from which on hashing takes seconds that deserve a word


def weights_hash(path: str, revision: str | None = None) -> str:
    """Of a folder its safetensors files and its config.json, of a GGUF file itself, of a hub id its commit.

    A file is read once: its hash is kept in the cache folder, under its path, size and time of change. Raises
    ConfigError where there is no such model.
    """
    local = paths.resolve(path)
    if local.is_dir():
        files = sorted(local.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{path}: has no safetensors files, so there are no weights to tell it by")
        config = local / "config.json"
        return _joined([*(f"{file.name} {_known_hash(file)}" for file in files), _settings(config)])
    if local.is_file():
        return _known_hash(local)
    return _joined(["hub", path, _commit(path, revision)])


def model_fingerprint(path: str, dtype: str, revision: str | None = None, *changes: object) -> str:
    """A hash of what a model says: its weights in `dtype`, and whatever else changes its numbers (such as being
    quantized). Where its parameters lie does not: sharded and offloaded it says the same."""
    return _joined([weights_hash(path, revision), dtype, *map(str, changes)])


def _joined(parts: list[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def _settings(config: Path) -> str:
    """What a config.json says of the model, without who wrote it."""
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return ""
    return json.dumps({k: v for k, v in content.items() if k not in ("transformers_version", "_name_or_path")})


def _known_hash(file: Path) -> str:
    facts = file.stat()
    state = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    memo = paths.cache() / "hashes" / xxhash.xxh3_128_hexdigest(str(file.resolve()).encode())
    with contextlib.suppress(OSError, ValueError):
        known, found = memo.read_text("utf-8").split("\n")
        if known == state:
            return found
    if facts.st_size >= LARGE:
        log.info("%s: reading its %.0f GB once, to know the weights again", file, facts.st_size / 1e9)
    found = file_hash(file)
    with contextlib.suppress(OSError):  # a full or read-only cache costs time only
        memo.parent.mkdir(mode=0o700, exist_ok=True)
        atomic.write_text(memo, f"{state}\n{found}")
    return found


def _commit(path: str, revision: str | None) -> str:
    """The commit that a revision of a hub id names, from the local cache where it is there."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent.name
    try:
        return str(HfApi().model_info(path, revision=revision, timeout=10).sha)
    except Exception as error:  # the hub's own errors, and those of whatever HTTP library it uses
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: is no folder here, and the hub does not tell its commit: {reason[:300]}") from error
