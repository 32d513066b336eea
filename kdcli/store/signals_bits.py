"""Whole numbers of b bits each, packed in planes: 16 bits, 8, 4, 2 and 1, whichever add up to b.

A plane of 16 or 8 bits is an array; of one of 4, 2 or 1 bits a byte holds several numbers, read back through a table.
So unpacking takes a few passes of numpy over all numbers at once, for any b. Letters: N rows, K numbers of a row.
"""

from __future__ import annotations

from functools import cache

import numpy as np


def planes(bits: int) -> list[int]:
    """The widths of the planes, the lowest bits first: 18 -> [16, 2]."""
    assert 0 <= bits <= 32, f"a number has at most 32 bits, not {bits}"
    found = []
    for width in (16, 16, 8, 4, 2, 1):
        if bits >= width:
            found.append(width)
            bits -= width
    return found


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` take."""
    return sum(-(-count * width // 8) for width in planes(bits))


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """[N, K] unsigned, each below 2^bits -> uint8 [N, packed_size(K, bits)]."""
    rest, parts = values.astype(np.uint32), []
    for width in planes(bits):
        low = rest & np.uint32((1 << width) - 1)
        rest = rest >> np.uint32(width) if width < 32 else rest
        parts.append(_packed_plane(low, width))
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(values), 0), np.uint8)


def unpack(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """What `pack` made, [N, packed_size(K, bits)] uint8 -> [N, K] int32."""
    result = np.zeros((len(packed), count), np.int32)
    begin = shift = 0
    for width in planes(bits):
        size = -(-count * width // 8)
        plane = _unpacked_plane(np.ascontiguousarray(packed[:, begin : begin + size]), width)[:, :count]
        if shift == 0:
            result[...] = plane
        else:
            result |= np.left_shift(plane, shift, dtype=np.int32)
        begin, shift = begin + size, shift + width
    return result


def _packed_plane(low: np.ndarray, width: int) -> np.ndarray:
    if width == 16:
        return np.ascontiguousarray(low.astype("<u2")).view(np.uint8)
    if width == 8:
        return low.astype(np.uint8)
    each = 8 // width
    size = -(-low.shape[1] // each)
    padded = np.zeros((len(low), size * each), np.uint8)
    padded[:, : low.shape[1]] = low
    shifts = (np.arange(each) * width).astype(np.uint8)
    return np.bitwise_or.reduce(padded.reshape(len(low), size, each) << shifts, axis=2, dtype=np.uint8)


def _unpacked_plane(packed: np.ndarray, width: int) -> np.ndarray:
    if width == 16:
        return packed.view("<u2")
    if width == 8:
        return packed
    return _table(width)[packed].view(np.uint8)


@cache
def _table(width: int) -> np.ndarray:
    """[256]: the numbers that a byte holds, side by side in one wider number."""
    each = 8 // width
    numbers = (np.arange(256)[:, None] >> (np.arange(each) * width)) & ((1 << width) - 1)
    return np.ascontiguousarray(numbers.astype(np.uint8)).view(f"<u{each}")[:, 0]
