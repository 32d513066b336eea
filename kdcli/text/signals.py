"""Whose signal a store is to hold: a teacher, the tokens of a student, and how it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.api import Teacher
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.signals import Identity, Signals, template_hash
from kdcli.store.signals_capture import vocabulary_of
from kdcli.store.signals_codec import Codec, SampledCodec, TopKCodec
from kdcli.text.tokenize import tokenizer_fingerprint

UNFINISHED = {"shards", "tokenizer"}  # what a process that was killed at once leaves


def open_store(section: Mapping[str, Any], teacher: Teacher, tokenizer: Any) -> tuple[Path, Codec, Identity]:
    """The folder that the config section `cache` names, and what must be in it or will be. `tokenizer`: the student's.
    Loads no weights. Raises ConfigError where something else is in it."""
    if (task := teacher.load_task()) is not None and task.kind != "causal":
        raise ConfigError(f"teacher: a cache holds what language models say of text, and this is for {task.kind}")
    path = paths.resolve(section["path"])
    codec = _codec(section, vocabulary_of(teacher))
    identity = Identity(
        teacher=teacher.fingerprint(),
        dtype=str(getattr(teacher, "dtype", "")),
        tokenizer=ids_fingerprint(tokenizer),
        template=template_hash(tokenizer.chat_template),
        temperature=codec.temperature,
        codec=codec.settings,
    )
    if (path / "manifest.json").exists():
        if unlike := Signals(path).identity.unlike(identity):
            raise ConfigError(
                f"cache.path: {path} holds the signal of another {', and another '.join(unlike)}; set another "
                "cache.path, or what it was written with"
            )
    elif path.is_dir() and {child.name for child in path.iterdir()} - UNFINISHED:
        raise ConfigError(f"cache.path: {path} holds files, but no cache; set a new or an empty folder")
    return path, codec, identity


def ids_fingerprint(tokenizer: Any) -> str:
    """A hash of how a tokenizer cuts text, whatever template it has."""
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        return tokenizer_fingerprint(tokenizer)
    finally:
        tokenizer.chat_template = template


def _codec(section: Mapping[str, Any], vocab_size: int) -> Codec:
    temperature = section["temperature"]
    if section["codec"] == "sampled":
        samples, seed = section["samples"], section["seed"]
        return SampledCodec(samples=samples, seed=seed, vocab_size=vocab_size, temperature=temperature)
    return TopKCodec(k=section["k"], bits=section["bits"], vocab_size=vocab_size, temperature=temperature)
