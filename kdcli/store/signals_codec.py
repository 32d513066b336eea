"""How one target's signal is kept: the K likeliest ids, or ids drawn at random (RS-KD: Anshumann et al. 2025,
arXiv:2503.16870), bit-packed.

A codec observes logits on their device, makes a block of bytes of a sequence's targets, and reads blocks back, of many
sequences at once. Letters: C targets of a chunk, N of some sequences, K entries, M the largest code, g the gap between
the likeliest entry's log-probability and another's, R the largest gap of a target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from kdcli.api import TopK
from kdcli.errors import ConfigError
from kdcli.ops.draws import draw
from kdcli.store.signals_bits import pack, packed_size, unpack

AT_ONCE = 1024  # targets decoded at a time: their numbers stay in the processor's cache
BLOCK = 64  # logits whose maximum is looked at first
LEAST = -87.0  # log-probability of a rest that is nothing: float32's smallest normal number


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a store says of N targets."""

    ids: np.ndarray  # [N, K] int64
    logprobs: np.ndarray  # [N, K] float32, -inf for an entry that stands for none
    target: np.ndarray  # [N] float32: log-probability of the target itself, at temperature 1
    rest: np.ndarray | None = None  # [N] float32: log of the mass of all other ids


Observed = tuple[np.ndarray, ...]  # arrays [C, ...]


class Codec(ABC):
    """Ids below `vocab_size`, of softmax(logits / temperature)."""

    name: ClassVar[str]
    sampled: ClassVar[bool]

    def __init__(self, *, vocab_size: int, temperature: float) -> None:
        if not temperature > 0:
            raise ConfigError(f"cache.temperature: is {temperature}; set a number above 0")
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.id_bits = (vocab_size - 1).bit_length()

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a manifest says of the codec, without the temperature."""

    @abstractmethod
    def observe(self, logits: Tensor, targets: Tensor, key: Tensor) -> Observed:
        """Of logits [C, V] float32, targets [C] and a random key each [C], what is to be kept."""

    def observe_topk(self, topk: TopK, target: Tensor) -> Observed:
        """The same of a teacher that gives no more than top-k: [C, K'] and log p(target) [C]."""
        raise ConfigError(f"cache.codec: {self.name} needs a teacher with logits of the whole vocabulary; set topk")

    @abstractmethod
    def block(self, observed: Observed) -> bytes:
        """The targets of one sequence."""

    @abstractmethod
    def decode(self, blocks: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> Decoded:
        """Of each block (uint8) the targets `kept` (bool, one per target stored), joined."""


class TopKCodec(Codec):
    """The K likeliest ids and their log-probabilities, and beside them the rest's mass and the target's own.

    With 8 or 16 bits a log-probability is kept as c = round(M sqrt(g / R)), so that the likeliest entries, which
    weigh most, are kept most finely; it is monotone, and g comes back within sqrt(g R) / M + R / (4 M^2), M = 254 or
    65534. What all entries then sum to is made right by moving all of them by one constant, which is no larger than
    the largest of those errors: `bound`. With 32 bits they are kept as they are.
    """

    name, sampled = "topk", False

    def __init__(self, *, k: int | None, bits: Literal[8, 16, 32], vocab_size: int, temperature: float = 1.0) -> None:
        super().__init__(vocab_size=vocab_size, temperature=temperature)
        self.k = vocab_size if k is None else min(k, vocab_size)
        if self.k < 1:
            raise ConfigError(f"cache.k: is {k}; keep at least 1 id, or null for all")
        if bits not in (8, 16, 32):
            raise ConfigError(f"cache.bits: is {bits}; give 8, 16 or 32 bits to a log-probability")
        self.bits = bits
        self.none = 2**bits - 1  # the code of an entry that stands for none
        self.largest = self.none - 1  # M
        self._ids = packed_size(self.k, self.id_bits)
        self.width = 16 + self._ids + self.k * bits // 8  # bytes of a target

    @property
    def settings(self) -> dict[str, Any]:
        return {"codec": "topk", "k": self.k, "bits": self.bits, "vocab_size": self.vocab_size}

    def bound(self, gap: float) -> float:
        """How far a log-probability may come back from what it was, in nats, where the largest gap is `gap`."""
        return 0.0 if self.bits == 32 else 2 * (gap / self.largest) * (1 + 1 / (4 * self.largest))

    def observe(self, logits: Tensor, targets: Tensor, key: Tensor) -> Observed:
        del key
        values, ids = _topk(logits, self.k)
        normalizer = _normalizer(logits, values[:, :1])
        target = _log_p(logits, targets, normalizer)
        if self.temperature != 1.0:
            values = values / self.temperature
            normalizer = _normalizer(logits / self.temperature, values[:, :1])
        logprobs = values - normalizer
        rest = torch.full_like(target, -torch.inf) if self.k == self.vocab_size else _log_rest(logprobs)
        return self._observed(ids, logprobs, rest, target)

    def observe_topk(self, topk: TopK, target: Tensor) -> Observed:
        given = topk.ids.shape[-1]
        if topk.temperature != self.temperature or topk.sampled or given < self.k:
            raise ConfigError(
                f"cache: the teacher gives {given} {'drawn ' if topk.sampled else ''}ids at temperature "
                f"{topk.temperature}, which are not the {self.k} likeliest at {self.temperature}; set cache.k and "
                "cache.temperature to what it gives"
            )
        logprobs, order = topk.logprobs.float().topk(self.k, dim=-1)
        return self._observed(topk.ids.gather(-1, order), logprobs, _log_rest(topk.logprobs.float()), target)

    def _observed(self, ids: Tensor, logprobs: Tensor, rest: Tensor, target: Tensor) -> Observed:
        numbers = (one.float().cpu().numpy() for one in (logprobs, rest, target))
        return (self.rows(ids.cpu().numpy(), *numbers),)

    def rows(self, ids: np.ndarray, logprobs: np.ndarray, rest: np.ndarray, target: np.ndarray) -> np.ndarray:
        """[N, width] uint8 of ids [N, K], log-probabilities [N, K] in falling order, the rest's and the target's [N]:
        four numbers, the ids, the codes."""
        logprobs = np.ascontiguousarray(logprobs, np.float32)
        none = logprobs == -np.inf
        top = np.where(none[:, 0], 0, logprobs[:, 0]).astype(np.float32)
        reach = np.zeros_like(top)
        codes: np.ndarray = logprobs.astype("<f4")
        if self.bits < 32:
            gap = np.where(none, 0, top[:, None] - logprobs)
            reach = gap.max(1)
            share = np.sqrt(gap / np.maximum(reach, np.finfo(np.float32).tiny)[:, None])
            codes = np.where(none, self.none, np.rint(share * self.largest)).astype(f"<u{self.bits // 8}")
            kept = np.where(none, 0, np.exp(self._logprobs(codes, np.zeros_like(top), reach)))
            whole = np.log1p(-np.exp(np.minimum(rest, -1e-7)))
            top = np.where(none[:, 0], 0, whole - np.log(np.maximum(kept.sum(1), np.finfo(np.float32).tiny)))
        head = np.stack([top, reach, target, rest], axis=1).astype("<f4")
        real = np.where(none, 0, ids)
        parts = [head.view(np.uint8), pack(real, self.id_bits), np.ascontiguousarray(codes).view(np.uint8)]
        return np.concatenate([part.reshape(len(ids), -1) for part in parts], axis=1)

    def block(self, observed: Observed) -> bytes:
        return observed[0].tobytes()

    def decode(self, blocks: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> Decoded:
        chosen = [
            rows if bool(some.all()) else rows[some]
            for block, some in zip(blocks, kept, strict=True)
            for rows in [block.reshape(-1, self.width)]
        ]
        rows = np.concatenate(chosen) if chosen else np.zeros((0, self.width), np.uint8)
        head = np.ascontiguousarray(rows[:, :16]).view("<f4")
        ids = np.empty((len(rows), self.k), np.int64)
        logprobs = np.empty((len(rows), self.k), np.float32)
        for start in range(0, len(rows), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            ids[part] = unpack(rows[part, 16 : 16 + self._ids], self.k, self.id_bits)
            codes = np.ascontiguousarray(rows[part, 16 + self._ids :])
            if self.bits == 32:
                logprobs[part] = codes.view("<f4")
            else:
                codes = codes.view(f"<u{self.bits // 8}")
                self._logprobs(codes, head[part, 0], head[part, 1], out=logprobs[part])
        return Decoded(ids=ids, logprobs=logprobs, target=head[:, 2].copy(), rest=head[:, 3].copy())

    def _logprobs(
        self, codes: np.ndarray, top: np.ndarray, reach: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """top - R (c / M)^2."""
        values = np.multiply(codes, np.float32(1 / self.largest), out=out, dtype=np.float32, casting="unsafe")
        np.multiply(values, values, out=values)
        np.multiply(values, -reach[:, None], out=values)
        np.add(values, top[:, None], out=values)
        none = codes == self.none
        if none.any():
            values[none] = -np.inf
        return values


class SampledCodec(Codec):
    """`samples` ids drawn from the teacher, the same as objective=sampled draws (kdcli.ops.draws), in rising order:
    each id once, and for each draw a bit that says whether it is another id than the one before. With them the
    target's log-probability."""

    name, sampled = "sampled", True

    def __init__(self, *, samples: int, seed: int, vocab_size: int, temperature: float = 1.0) -> None:
        super().__init__(vocab_size=vocab_size, temperature=temperature)
        if samples < 1:
            raise ConfigError(f"cache.samples: is {samples}; draw at least 1 id per target")
        self.samples = samples
        self.seed = seed
        self.width = 4 + -(-samples // 8)  # bytes of a target without its ids
        self._log_share = np.log(np.arange(1, samples + 1) / samples).astype(np.float32)

    @property
    def settings(self) -> dict[str, Any]:
        return {"codec": "sampled", "samples": self.samples, "seed": self.seed, "vocab_size": self.vocab_size}

    def observe(self, logits: Tensor, targets: Tensor, key: Tensor) -> Observed:
        log_p = torch.log_softmax(logits if self.temperature == 1.0 else logits / self.temperature, dim=-1)
        if self.temperature == 1.0:
            target = _log_p(log_p, targets, 0.0)
        else:
            target = _log_p(logits, targets, logits.logsumexp(-1, keepdim=True))
        ids = draw(log_p, key, self.samples).sort(-1).values
        return ids.int().cpu().numpy(), target.float().cpu().numpy()

    def block(self, observed: Observed) -> bytes:
        """Of all targets log-probability and bits, then all ids."""
        ids, target = observed
        new = np.ones(ids.shape, bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        fixed = [target.astype("<f4")[:, None].view(np.uint8), np.packbits(new, axis=1)]
        return np.concatenate(fixed, axis=1).tobytes() + pack(ids[new][None], self.id_bits).tobytes()

    def decode(self, blocks: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> Decoded:
        fixed, ids = [np.zeros((0, self.width), np.uint8)], [np.zeros(0, np.int32)]
        for block, some in zip(blocks, kept, strict=True):
            own = block[: self.width * len(some)].reshape(-1, self.width)
            number = self._new(own).sum(1)
            found = unpack(block[None, own.size :], int(number.sum()), self.id_bits)[0]
            fixed.append(own if bool(some.all()) else own[some])
            ids.append(found if bool(some.all()) else found[np.repeat(some, number)])
        rows = np.concatenate(fixed)
        new = self._new(rows)
        number = new.sum(1)
        first = np.flatnonzero(new)  # of each id the place of its first draw, among the draws of all targets
        counts = np.diff(np.append(first, new.size))
        width = int(number.max(initial=1))
        places = np.arange(len(first)) + np.repeat(np.arange(len(rows)) * width - np.cumsum(number) + number, number)
        wide = np.zeros(len(rows) * width, np.int64)
        wide[places] = np.concatenate(ids)
        logprobs = np.full(len(rows) * width, -np.inf, np.float32)
        logprobs[places] = self._log_share[counts - 1]
        target = np.ascontiguousarray(rows[:, :4]).view("<f4")[:, 0]
        return Decoded(ids=wide.reshape(-1, width), logprobs=logprobs.reshape(-1, width), target=target)

    def _new(self, rows: np.ndarray) -> np.ndarray:
        """[N, samples] bool."""
        return np.unpackbits(rows[:, 4:], axis=1, count=self.samples).view(bool)


def codec_of(settings: Mapping[str, Any], temperature: float) -> TopKCodec | SampledCodec:
    """The codec of `Codec.settings`, which a manifest holds. Raises ConfigError."""
    given = {key: value for key, value in settings.items() if key != "codec"}
    kinds = {"topk": TopKCodec, "sampled": SampledCodec}
    return kinds[settings["codec"]](**given, temperature=temperature)


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of [C, V], in a quarter of its time: the k largest lie in the k blocks with the largest maxima."""
    blocks = logits.shape[-1] // BLOCK
    if blocks < 2 * k:
        return logits.topk(k, dim=-1)
    whole = logits[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))
    chosen = whole.amax(-1).topk(k, dim=-1, sorted=False).indices
    places = torch.arange(BLOCK, device=logits.device)
    left = torch.arange(blocks * BLOCK, logits.shape[-1], device=logits.device).expand(len(logits), -1)
    ids = torch.cat([(chosen.unsqueeze(-1) * BLOCK + places).flatten(1), left], dim=-1)
    values, order = logits.gather(-1, ids).topk(k, dim=-1)
    return values, ids.gather(-1, order)


def _normalizer(logits: Tensor, top: Tensor) -> Tensor:
    """log sum exp(logits), [C, V] and their largest [C, 1] -> [C, 1]: half the time of torch.logsumexp on a CPU."""
    return top + (logits - top).exp_().sum(-1, keepdim=True).log()


def _log_p(logits: Tensor, targets: Tensor, normalizer: Tensor | float) -> Tensor:
    """log softmax(logits)[targets], [C]; of a target that the teacher has no id for, LEAST."""
    known = targets < logits.shape[-1]
    chosen = logits.gather(-1, targets.clamp(max=logits.shape[-1] - 1).unsqueeze(-1))
    return torch.where(known, (chosen - normalizer).squeeze(-1), LEAST)


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum exp(logprobs)), [C, K] -> [C], summed in float64."""
    rest = 1 - logprobs.double().exp().sum(-1)
    return rest.clamp(min=0).log().clamp(min=LEAST).float()
