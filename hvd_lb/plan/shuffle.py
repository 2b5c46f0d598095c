"""A random permutation of [0, N) that is computed by position: O(1) memory, any slice on its own.

A keyed bijection (docs/design.md 5, paper remark 4): positions are written as (left, right) with left < a, right < b
and a·b just above N; every round adds a keyed hash of one half to the other, modulo its size, which is invertible
whatever the hash is (an unbalanced Feistel network). The few values that fall outside [0, N) walk on along their cycle
until they fall inside, which keeps the map a bijection of [0, N) (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002).
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 8
# Each round is a couple of dozen passes over the array: slices this long stay in a core's cache.
_CHUNK = 1 << 14
# Tiny networks have few distinct round functions: small N walk inside a larger square instead.
_SMALLEST_SIDE = 8
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_S32 = np.uint64(32)


class Permutation:
    """The order of one epoch: `Permutation(N, seed, epoch)(positions)` gives the image ids at these positions."""

    def __init__(self, size: int, seed: int, epoch: int):
        if size < 1:
            raise ValueError(f"a permutation of {size} items: the size must be at least 1")
        if size > 1 << 62:
            raise ValueError(f"a permutation of {size} items: at most 2**62 are possible")
        self.size = size
        left = max(_SMALLEST_SIDE, math.isqrt(size - 1) + 1)
        right = max(_SMALLEST_SIDE, -(-size // left))
        self._left, self._right = np.uint64(left), np.uint64(right)
        self._keys = np.random.SeedSequence((seed, epoch, size)).generate_state(ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Image ids, int64 of the shape of `positions` (integers in [0, N), else ValueError)."""
        flat = np.ravel(positions)
        if flat.size and (flat.min() < 0 or flat.max() >= self.size):
            raise ValueError(f"positions {flat.min()}..{flat.max()} of a permutation of {self.size} items")
        ids = np.empty(flat.size, np.int64)
        for start in range(0, flat.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            ids[part] = self._walk(flat[part].astype(np.uint64))
        return ids.reshape(np.shape(positions))

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Image ids at positions start … stop − 1, int64 (stop − start,)."""
        return self(np.arange(start, stop, dtype=np.int64))

    def _walk(self, values: np.ndarray) -> np.ndarray:
        values = self._rounds(values)
        size = np.uint64(self.size)
        while (outside := np.flatnonzero(values >= size)).size:
            values[outside] = self._rounds(values[outside])
        return values

    def _rounds(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._right)
        for i in range(0, ROUNDS, 2):
            _add_hashed(right, self._right, left, self._keys[i])
            _add_hashed(left, self._left, right, self._keys[i + 1])
        left *= self._right
        left += right
        return left


def _add_hashed(target: np.ndarray, modulus: np.uint64, source: np.ndarray, key: np.uint64) -> None:
    """target ← (target + hash(source, key) mod modulus) mod modulus, in place; both are below 2**32."""
    hashed = source + key
    hashed *= _MULTIPLIER
    hashed ^= hashed >> _S32
    hashed *= _MULTIPLIER
    hashed >>= _S32
    hashed *= modulus
    hashed >>= _S32
    target += hashed
    np.subtract(target, modulus, out=target, where=target >= modulus)
