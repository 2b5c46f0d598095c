"""Counter-based random numbers: a value is a function of its keys, never of what was drawn before.

The mixing is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied once per key. Vectorised over
numpy's uint64, whose arithmetic is modulo 2**64.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S11 = (np.uint64(s) for s in (27, 30, 31, 11))


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values; a bijection of [0, 2**64)."""
    x = (x ^ (x >> _S30)) * _MIX_1
    x = (x ^ (x >> _S27)) * _MIX_2
    return x ^ (x >> _S31)


def random_bits(*keys: int | np.ndarray) -> np.ndarray:
    """64 random bits for each combination of the keys (non-negative integers or arrays, broadcast together)."""
    bits = np.zeros(1, np.uint64)
    for key in keys:
        bits = mix((bits ^ np.asarray(key, dtype=np.uint64)) * _GOLDEN + _GOLDEN)
    return bits


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1), 53 random bits each."""
    return (random_bits(*keys) >> _S11) * 2.0**-53


def generator_seed(*keys: int) -> int:
    """A seed in [0, 2**63) for generators of other libraries."""
    return int(random_bits(*keys)[0] >> np.uint64(1))
