"""What is learned next: rows drawn by domain weight, the same for any number of ranks, resumed exactly."""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import xxhash

from kdcli.api import Batch, Stateful
from kdcli.errors import ConfigError
from kdcli.store.fault import fault
from kdcli.store.tokens import Row
from kdcli.text.collate import collate

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it modulo 2^64 fill the circle as evenly as any can
THREE = struct.Struct("<3Q")  # what `_hash` hashes of three numbers
ROUNDS = 6  # of the Feistel network; four make a strong pseudo-random permutation (Luby & Rackoff 1988)


class Loader(Stateful):
    """Micro-batches of each optimizer step.

    A step draws `batch_size` domains by `weights` and takes the next row of each in that domain's order: a permutation
    per epoch, from (seed, domain, epoch). The rows are sorted by length, cut into micro-batches and dealt to the ranks
    in turn. So the micro-batches of a step do not depend on the number of ranks, and all that has to be remembered is
    how many rows each domain has given. A row may be several sequences: a packed row, a preference pair or a group of
    answers counts as one in `batch_size` and `micro_size`, and is never cut.

    `quota`: `iid` draws each place of a batch by itself, from a hash of (seed, step, place). `hamilton` gives a domain
    batch_size x weight rows, rounded up or down: the rows that rounding down leaves over go by a number from (seed,
    step) that steps around the circle by the golden ratio, so that after n steps a domain's rows differ from
    n x batch_size x weight by about log n, where independent draws differ by its root. What a step draws depends on
    the seed, the step, the weights and the counts alone. `content`: a hash of each domain's rows, by which a checkpoint
    knows its data.

    A step's rows are read when it begins, and none before: new weights act on the very next step. What that costs is in
    docs/data.md; a queue of steps to come would have to be dropped, or be obeyed late, at every update.

    Raises ConfigError when the batch cannot be cut evenly, or a weighted domain has no rows.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Row]],
        *,
        batch_size: int,
        micro_size: int,
        pad_id: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Mapping[str, float],
        quota: Literal["iid", "hamilton"] = "iid",
        content: Mapping[str, str] | None = None,
    ) -> None:
        if batch_size % (micro_size * world_size):
            raise ConfigError(
                f"batch.size={batch_size} cannot be dealt to {world_size} processes in micro-batches of {micro_size}; "
                f"give a multiple of {micro_size * world_size}"
            )
        self.rows = dict(rows)
        self.batch_size, self.micro_size, self.pad_id, self.seed = batch_size, micro_size, pad_id, seed
        self.rank, self.world_size, self.quota = rank, world_size, quota
        self.content = dict(content or {})
        self.drawn = dict.fromkeys(self.rows, 0)  # rows given so far
        self.weights = dict(weights)

    @property
    def weights(self) -> dict[str, float]:
        """The share of each domain in the rows to come; they sum to 1. Setting them acts on the next step."""
        return dict(self._weights)

    @weights.setter
    def weights(self, weights: Mapping[str, float]) -> None:
        self._use(normalized(weights, self.rows))

    @property
    def epochs(self) -> dict[str, float]:
        """How often each domain has been gone through."""
        return {name: self.drawn[name] / max(1, len(self.rows[name])) for name in self.rows}

    def epoch(self, done: int) -> int:
        """How often `done` steps have gone through as many rows as there are, of all domains together."""
        return done * self.batch_size // sum(len(rows) for rows in self.rows.values())

    def next(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`. Steps are asked for in order, each once, by all ranks."""
        fault("data.next", rank=self.rank, step=step)
        rows = sorted((self._row(name) for name in self._domains(step)), key=len, reverse=True)
        micro = [rows[i : i + self.micro_size] for i in range(0, self.batch_size, self.micro_size)]
        return [collate(part, pad_id=self.pad_id) for part in micro[self.rank :: self.world_size]]

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": dict(self.drawn),
            "weights": self.weights,
            **self.identity,
        }

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """Which data these are: rows of each domain, and their hash."""
        return {"rows": {name: len(rows) for name, rows in self.rows.items()}, "content": self.content}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError when the data are not those that the state was saved with."""
        same_data(state, self.identity)
        self.drawn = {name: int(count) for name, count in state["drawn"].items()}
        self._use(state["weights"])  # to the last bit: dividing by their sum again could change it

    def _use(self, weights: Mapping[str, float]) -> None:
        self._weights = {name: weights[name] for name in self.rows}
        self._names = [name for name, weight in self._weights.items() if weight > 0]
        self._edges = list(accumulate(self._weights[name] for name in self._names))

    def _domains(self, step: int) -> list[str]:
        """The domain of each place in the batch: where a point falls among domains as long as their weights."""
        size, top = self.batch_size, self._edges[-1]
        if self.quota == "iid":
            points = [_hash(self.seed, step, place) / 2**64 for place in range(size)]
        else:  # evenly spaced, so that between two points lies a weight of 1 / size
            shift = (_hash(self.seed) + step * GOLDEN) % 2**64 / 2**64
            points = [(place + shift) / size for place in range(size)]
        return [self._names[min(bisect_right(self._edges, point * top), len(self._names) - 1)] for point in points]

    def _row(self, name: str) -> Row:
        """The next row of a domain."""
        epoch, place = divmod(self.drawn[name], len(self.rows[name]))
        self.drawn[name] += 1
        key = _hash(self.seed, xxhash.xxh3_64_intdigest(name.encode()), epoch)
        return self.rows[name][permuted(place, len(self.rows[name]), key)]


def same_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the domains whose rows are not those of a checkpoint (`Loader.identity`)."""
    changed = []
    for name in dict.fromkeys([*then["rows"], *now["rows"]]):
        before, after = (one["rows"].get(name, 0) for one in (then, now))
        if before != after:
            changed.append(f"domain {name} had {before} rows, and has {after}")
        elif then.get("content") and then["content"].get(name) != now["content"].get(name):
            changed.append(f"domain {name} has other rows than then, though as many")
    if changed:
        raise ConfigError(
            f"the data have changed since the checkpoint: {'; '.join(changed)}. Put them back to go on with the run, "
            "which was left as it is; or learn from these in a run of their own, in another run.dir"
        )


def normalized(weights: Mapping[str, float], rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Weights that sum to 1. Raises ConfigError where they do not fit the domains, or are no weights."""
    if set(weights) != set(rows):
        raise ConfigError(f"domain weights are for {', '.join(weights)}, but domains are {', '.join(rows)}")
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"the weight of domain {name} is {weight}; it must be finite and at least 0")
        if weight > 0 and not len(rows[name]):
            raise ConfigError(f"domain {name} has weight {weight} and no rows; take it out or set its weight to 0")
    total = sum(weights.values())
    if total <= 0:
        raise ConfigError("all domain weights are 0, so there is nothing to draw")
    return {name: weights[name] / total for name in rows}


def permuted(index: int, size: int, key: int) -> int:
    """Where a pseudo-random permutation of range(size) puts `index`: a Feistel network, walked until it lands inside.

    Needs no memory, and is the same on every machine and with every version of every library.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(THREE.pack(key, turn, right)) & low)
        index = left << half | right
        if index < size:
            return index


def _hash(*numbers: int) -> int:
    """64 pseudo-random bits from up to 64 bits each."""
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers)))
