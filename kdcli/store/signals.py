"""A store of what a teacher says of sequences of tokens, found by content: shuffled, filtered or extended data hit.

    manifest.json       whose signal it is, and how it is kept (`Identity`)
    tokenizer/          the tokenizer whose ids they are
    shards/HASH.safetensors   sequences and their signal (kdcli.store.signals_shard), named by their own hash
    index.safetensors   which sequence lies where, sorted; made again where it does not fit the shards

Letters: E sequences of a batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from kdcli.errors import ConfigError
from kdcli.store import atomic, paths
from kdcli.store.signals_codec import Decoded, codec_of
from kdcli.store.signals_file import DamagedError, MappedFile, to_bytes
from kdcli.store.signals_keys import KEY
from kdcli.store.signals_shard import FOLDER, Shard

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose signal a store holds: nothing else may be read from it or written to it."""

    teacher: str  # Teacher.fingerprint()
    dtype: str  # of its arithmetic, where it has one
    tokenizer: str  # text.tokenize.tokenizer_fingerprint, without the template
    template: str  # a hash of the chat template of the student's tokenizer
    temperature: float
    codec: Mapping[str, Any]  # Codec.settings

    def unlike(self, other: Identity) -> list[str]:
        """In what the two differ, as in "the teacher (its weights, or what changes what it says)"."""
        named = {
            "teacher": "teacher (its weights, or what else changes what it says)",
            "dtype": f"dtype ({self.dtype}, not {other.dtype})",
            "tokenizer": "tokenizer",
            "template": "chat template",
            "temperature": f"temperature ({self.temperature}, not {other.temperature})",
            "codec": f"codec ({_shown(self.codec)}, not {_shown(other.codec)})",
        }
        different = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if "dtype" in different:  # it is part of the teacher's fingerprint
            different = [name for name in different if name != "teacher"]
        return [named[name] for name in different]


def template_hash(template: str | None) -> str:
    """Of a chat template's text; empty where there is none."""
    return xxhash.xxh3_128_hexdigest(template.encode()) if template else ""


class Signals:
    """A store, opened for reading: the manifest at once, the shards when they are first asked for.

    Raises ConfigError where there is none, or a shard is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = paths.resolve(str(path))
        self.manifest = read_manifest(self.path)
        self.identity = Identity(**{f.name: self.manifest[f.name] for f in fields(Identity)})
        self.codec = codec_of(self.identity.codec, self.identity.temperature)

    @property
    def tokenizer_path(self) -> str:
        return str(self.path / "tokenizer")

    @cached_property
    def shards(self) -> list[Shard]:
        """In the order of their names."""
        return [self._explained(lambda name=name: Shard(self.path / FOLDER / name)) for name in shard_names(self.path)]

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """High and low halves of the keys in order, and of each its shard and its number there."""
        names = [shard.path.name for shard in self.shards]
        found = _read_index(self.path, names)
        return found if found is not None else _merged(self.shards)

    def __len__(self) -> int:
        """Different sequences."""
        return len(self._index[0])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[E] of KEY -> [E] int64: where each sequence lies in the index, -1 where it is not there."""
        high, low, _, _ = self._index
        at = np.searchsorted(high, keys["high"])
        for _ in range(64):  # as long as the high half is another's; such twins are not to be expected
            there = at < len(high)
            place = np.minimum(at, max(0, len(high) - 1))
            same = there & (high[place] == keys["high"]) if len(high) else there
            found = same & (low[place] == keys["low"]) if len(high) else there
            if bool((found | ~same).all()):
                return np.where(found, at, -1)
            at = np.where(same & ~found, at + 1, at)
        return np.where(found, at, -1)

    def block(self, entry: int) -> tuple[np.ndarray, np.ndarray]:
        """(which positions are stored [T] bool, the signal's bytes). Raises ConfigError for a damaged shard."""
        _, _, shard, number = self._index
        one = self.shards[int(shard[entry])]
        return self._explained(lambda: one.read(int(number[entry])))

    def covered(self, entry: int, wanted: np.ndarray) -> bool:
        """Whether all `wanted` positions [T] bool of a sequence are stored."""
        stored = self.block(entry)[0]
        return len(stored) == len(wanted) and not bool((wanted & ~stored).any())

    def read(self, entries: Sequence[int] | np.ndarray, wanted: Sequence[np.ndarray]) -> Decoded:
        """The signal of the `wanted` positions ([T] bool each) of each sequence, joined; they must be stored."""
        blocks = [self.block(int(entry)) for entry in entries]
        kept = [want[stored] for (stored, _), want in zip(blocks, wanted, strict=True)]
        return self.codec.decode([data for _, data in blocks], kept)

    def _explained(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except DamagedError as error:
            raise ConfigError(
                f"{self.path}: the shard {error}; run the same `kdcli cache` again, which writes it anew"
            ) from error


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ConfigError where there is no store, or one of another version of kdcli."""
    file = path / "manifest.json"
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no cache of a teacher here (no manifest.json, seen from {Path.cwd()}); make one: "
            f"kdcli cache cache.path={path} teacher.path=… data.path=…"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__}); is {path} a cache?") from None
    missing = {f.name for f in fields(Identity)} - content.keys()
    if content.get("format") != FORMAT or missing:
        raise ConfigError(f"{path}: is a cache of another version of kdcli; make it again in another folder")
    return content


def create(path: Path, identity: Identity, tokenizer: Any, facts: Mapping[str, Any]) -> None:
    """Make an empty store, or nothing where there is one. `facts` are for people. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path / FOLDER).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache.path: {path} cannot be made ({error.strerror}); set a folder you may write") from None
    if (path / "manifest.json").exists():
        return
    tokenizer.save_pretrained(path / "tokenizer")
    atomic.write_json(path / "manifest.json", {"format": FORMAT, **asdict(identity), **facts})


@contextlib.contextmanager
def only_writer(path: Path):
    """One `kdcli cache` at a time. Raises ConfigError."""
    lock = FileLock(str(path / ".lock"), mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"cache.path: another `kdcli cache` is writing to {path}; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def damage(path: Path, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with which shard, of `names` or of all: each is read in full."""
    return [what for _, what in _damaged(path, shard_names(path) if names is None else names)]


def mend(path: Path, names: Sequence[str]) -> list[str]:
    """Remove the damaged ones of the shards `names`; returns what was wrong with each."""
    found = _damaged(path, names)
    for name, _ in found:
        (path / FOLDER / name).unlink()
    return [what for _, what in found]


def clean(path: Path) -> None:
    """Remove what killed processes left unfinished."""
    for file in (path / FOLDER).glob(".*.tmp"):
        file.unlink(missing_ok=True)


def shard_names(path: Path) -> list[str]:
    """The names of a store's shards, sorted."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(one.name for one in os.scandir(path / FOLDER) if one.name.endswith(".safetensors"))
    return []


def write_index(path: Path) -> None:
    """Sort the keys of all shards into index.safetensors."""
    shards = [Shard(path / FOLDER / name) for name in shard_names(path)]
    high, low, shard, number = _merged(shards)
    arrays = {"high": high, "low": low, "shard": shard, "number": number}
    names = [one.path.name for one in shards]
    body = xxhash.xxh3_128_hexdigest(b"".join(array.tobytes() for array in arrays.values()))
    atomic.write_bytes(path / "index.safetensors", to_bytes(arrays, {"shards": _hash_of(names), "hash": body}))


def _damaged(path: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, what is wrong)."""
    found = []
    for name in names:
        try:
            Shard(path / FOLDER / name).verify()
        except DamagedError as error:
            found.append((name, str(error)))
    return found


Index = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _read_index(path: Path, names: list[str]) -> Index | None:
    """The index, mapped; None where it is of other shards, or damaged."""
    try:
        file = MappedFile(path / "index.safetensors")
        if file.facts["shards"] != _hash_of(names):
            return None
        arrays = file["high"], file["low"], file["shard"], file["number"]
        digest = xxhash.xxh3_128()
        for array in arrays:
            digest.update(np.asarray(array).tobytes())
        return arrays if digest.hexdigest() == file.facts["hash"] else None
    except (DamagedError, FileNotFoundError, KeyError):
        return None


def _merged(shards: Sequence[Shard]) -> Index:
    """All keys in order; of a sequence that is there twice the entry with more targets."""
    keys = np.concatenate([np.zeros(0, KEY), *(shard.keys() for shard in shards)])
    counts = np.concatenate([np.zeros(0, "<u4"), *(shard.counts() for shard in shards)])
    shard = np.repeat(np.arange(len(shards), dtype="<u4"), [len(one) for one in shards])
    number = np.concatenate([np.zeros(0, "<u4"), *(np.arange(len(one), dtype="<u4") for one in shards)])
    order = np.lexsort((-counts.astype(np.int64), keys["low"], keys["high"]))
    keys = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    order = order[first]
    chosen = keys[first]
    high, low = (np.ascontiguousarray(chosen[half]) for half in ("high", "low"))
    return high, low, shard[order].astype("<u4"), number[order].astype("<u4")


def _hash_of(names: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(names).encode())


def _shown(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" if key != "codec" else str(value) for key, value in settings.items())
