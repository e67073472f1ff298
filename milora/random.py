"""Random numbers that are a pure function of (seed, stream, index).

Factors that are regenerated and never saved must come out bit for bit the same on every machine,
today and in years. torch's generators promise that for one release and one device only, and QR or
SVD bits change with the thread count and the instruction set. So: the counter-based Philox4x32-10
[Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011], in exact integer arithmetic
on the CPU, then one float64 product and one rounding.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, √3 - 1
_ROUNDS = 10
_MASK = 0xFFFFFFFF
# Counters at a time: the words in flight stay in a CPU's L2 cache; on a GPU they fill it.
_CHUNK, _GPU_CHUNK = 1 << 14, 1 << 22


def derive_seed(seed: int, path: str) -> int:
    """A 63-bit seed for the thing called `path`, from sha256: the same in every process."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit words in, four of the same shape out."""
    x0, x1, x2, x3 = counter
    for round_index in range(_ROUNDS):
        k0, k1 = ((k + round_index * step) & _MASK for k, step in zip(key, _KEY_STEPS, strict=True))
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = (
            high1.bitwise_xor_(x1).bitwise_xor_(k0),
            low1,
            high0.bitwise_xor_(x3).bitwise_xor_(k1),
            low0,
        )
    return [x0, x1, x2, x3]


def uniform(
    shape: tuple[int, ...],
    seed: int,
    stream: int = 0,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Independent values, uniform on (-1, 1), never 0, bit-identical everywhere.

    Args:
        seed: 0 to 2⁶⁴ - 1, the cipher's key.
        stream: 0 to 2³² - 1; different streams of one seed are independent.
        device: where they are made; it does not change them.
        dtype: float64 or float32: each value is an odd integer over 2²⁴, exact in both.
    """
    size = math.prod(shape)
    out = torch.empty(-(-size // 4), 4, dtype=dtype, device=device)
    chunk = _CHUNK if out.device.type == "cpu" else _GPU_CHUNK
    for begin in range(0, len(out), chunk):
        index = torch.arange(begin, min(begin + chunk, len(out)), device=device)
        zero = torch.zeros_like(index)
        counter = [index & _MASK, index >> 32, zero + stream, zero]
        words = philox(counter, (seed & _MASK, seed >> 32))
        for column, word in enumerate(words):
            # 24 bits k -> (2k + 1 - 2²⁴) / 2²⁴: symmetric around 0, every step exact
            out[begin : begin + len(index), column] = word.bitwise_right_shift_(8)
    out.mul_(2.0).add_(1.0 - 2**24).mul_(2.0**-24)
    return out.flatten()[:size].reshape(shape)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product.

    int64 arithmetic wraps around, so the sign bit of a product is just its highest bit; the mask
    takes away what the arithmetic shift draws in.
    """
    product = x * factor
    return (product >> 32).bitwise_and_(_MASK), product.bitwise_and_(_MASK)
