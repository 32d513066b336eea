"""Random numbers that depend on what they are for, and not on when or where they are drawn.

The same key gives the same number on every rank, in every micro-batch, chunk and packed row, and on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keys_of(names: Sequence[str], seed: int, device: torch.device) -> Tensor:
    """A 64-bit key of each name and the seed, int64 [len(names)]."""
    digests = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64, device=device)


def mixed(key: Tensor, *values: Tensor) -> Tensor:
    """Keys [...] with whole numbers [...] hashed into them, one after the other: splitmix64 (Steele et al. 2014)."""
    for value in values:
        key = _scrambled(key ^ _scrambled(value + _GOLDEN))
    return key


def uniform(key: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each key: [...] -> [..., count], float64."""
    counter = torch.arange(1, count + 1, device=key.device) * _GOLDEN
    return _shifted(_scrambled(key.unsqueeze(-1) + counter), 11).double() * 2.0**-53


def draw(log_r: Tensor, key: Tensor, count: int) -> Tensor:
    """`count` ids per key, drawn from r by inverting its cumulative distribution, one from each of `count` equal parts
    of it: log-probabilities [..., V] and keys [...] -> [..., count]. An id of probability 0 is never drawn."""
    stratum = torch.arange(count, device=log_r.device)
    at = (stratum + uniform(key, count)) / count
    cumulative = log_r.exp().cumsum(-1, dtype=torch.float64)
    # right: an id of probability 0 is never drawn; clamp: the last part may round up to 1
    ids = torch.searchsorted(cumulative, at * cumulative[..., -1:], right=True)
    return ids.clamp(max=log_r.shape[-1] - 1)


def _scrambled(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the unsigned number: int64 shifts copies of the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


# splitmix64's constants, as int64: multiplication wraps around alike
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
