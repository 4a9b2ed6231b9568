"""Philox4x32-10: random numbers that are a pure function of (seed, step, sample index, element).

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). No state means that a sample's noise
does not depend on the batch it is in, on the number of ranks, or on how a run was resumed.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import Draw, Inputs
from pixelgen_kernels.fused import register
from pixelgen_kernels.registry import Op

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the key grows by these every round
_ROUNDS = 10


def philox_4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32 with one key.

    Per round, with (hi, lo) the halves of a 64-bit product: (hi0, lo0) = M0 * c0, (hi1, lo1) = M1 * c2, then
    c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0 and the key advances by the Weyl constants.

    Args:
        counter: (4, ...) int64 words, each in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        (4, ...) int64 words, each in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap modulo 2**64, which keeps all their bits; shifting copies the sign, masking drops
        # it. The low words are masked at the end only: until then their upper halves meet nothing but a mask.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1 & _MASK, c2, c3 & _MASK))


def _words(seed: int, step: int, sample_index: Tensor, count: int, stream: int) -> Tensor:
    """Four words for each group of four elements: (4, B, ceil(count / 4)) int64."""
    groups = torch.arange(-(-count // 4), dtype=torch.int64, device=sample_index.device)
    counter = groups.new_empty(4, sample_index.shape[0], groups.shape[0])
    counter[0] = groups
    counter[1] = (sample_index & _MASK)[:, None]
    counter[2] = step & _MASK
    counter[3] = stream
    return philox_4x32(counter, (seed & _MASK, seed >> 32))


def _in_element_order(values: Tensor, count: int) -> Tensor:
    """(4, B, groups) to (B, count), dense: word j of group g is element 4 g + j."""
    return values.permute(1, 2, 0).flatten(1)[:, :count].clone(memory_format=torch.contiguous_format)


def philox_uniform_ref(seed: int, step: int, sample_index: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Plain PyTorch definition of `philox_uniform`."""
    words = _words(seed, step, sample_index, count, stream)
    return _in_element_order((words >> 8).to(torch.float32).mul_(2.0**-24), count)


def philox_normal_ref(seed: int, step: int, sample_index: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Plain PyTorch definition of `philox_normal`."""
    words = _words(seed, step, sample_index, count, stream)
    # Box-Muller. The radius uses all 32 bits, offset by half a step, so it reaches 6.8 and never the log of
    # zero. Exact to the one rounding at the end: what is compiled has to agree on every device.
    uniform = words[0::2].to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
    radius = uniform.to(torch.float64).log_().mul_(-2.0).sqrt_()
    angle = (words[1::2] >> 8).to(torch.float64).mul_(2.0 * math.pi * 2.0**-24)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)  # (2, 2, B, groups)
    return _in_element_order(pairs.to(torch.float32).flatten(0, 1), count)


def _empty(sample_index: Tensor, seed: int, step: int, count: int, stream: int) -> Tensor:
    return sample_index.new_empty((sample_index.shape[0], count), dtype=torch.float32)


_uniform = register("philox_uniform", philox_uniform_ref, empty=_empty, outputs=("out",))
_normal = register("philox_normal", philox_normal_ref, empty=_empty, outputs=("out",))


def check_philox_arguments(op: str, seed: Any, step: Any, sample_index: Any) -> None:
    """Raises TypeError or ValueError for what `philox_uniform` would not take."""
    checks.integer(op, "seed", seed, 0)
    checks.integer(op, "step", step, 0)
    if not isinstance(sample_index, Tensor):
        raise TypeError(f"{op}: sample_index must be a tensor, got {type(sample_index).__name__}")
    if sample_index.dtype != torch.int64:
        raise TypeError(f"{op}: sample_index must be int64, got {sample_index.dtype}")
    checks.strided(op, "sample_index", sample_index)
    if sample_index.ndim != 1:
        raise ValueError(f"{op}: sample_index must have shape (B), got {tuple(sample_index.shape)}")


def philox_uniform(seed: int, step: int, sample_index: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Uniform values that depend on nothing but the arguments.

    Element i of sample b is word i % 4 of Philox4x32-10 at counter (i // 4, sample_index[b], step, stream),
    of which each word keeps its low 32 bits, with key (seed low, seed high); its upper 24 bits, times 2**-24.

    Args:
        seed: in [0, 2**63), the key.
        step: at least 0, for example the training step.
        sample_index: (B,) int64, which sample each row is for; its device is the device of the result.
        count: values per sample, in [0, 2**34].
        stream: in [0, 2**32), separates uses that share the other arguments.

    Returns:
        (B, count) float32 in [0, 1).

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for arguments outside these ranges.
    """
    check_philox_arguments("philox_uniform", seed, step, sample_index)
    checks.integer("philox_uniform", "count", count, 0, 2**34)
    checks.integer("philox_uniform", "stream", stream, 0, _MASK)
    return _uniform(sample_index, seed, step, count, stream)


def philox_normal(seed: int, step: int, sample_index: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Standard normal values that depend on nothing but the arguments.

    Box-Muller on the words of `philox_uniform`, (w0, w1, w2, w3) for every four elements: elements 0 and 1
    are r cos(a), r sin(a) with r = sqrt(-2 ln(u)), u = w0 2**-32 + 2**-33 rounded to fp32, and
    a = 2 pi (w1 >> 8) 2**-24; elements 2 and 3 likewise from w2 and w3.

    At most 3 units in the last place from the exact values. GPUs and all CPUs with a fused multiply-add (AVX2
    and later) give the same bits; other CPUs are within 4 units of the exact values.

    Args:
        seed: in [0, 2**63), the key.
        step: at least 0, for example the training step.
        sample_index: (B,) int64, which sample each row is for; its device is the device of the result.
        count: values per sample, in [0, 2**34].
        stream: in [0, 2**32), separates uses that share the other arguments.

    Returns:
        (B, count) float32.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for arguments outside these ranges.
    """
    check_philox_arguments("philox_normal", seed, step, sample_index)
    checks.integer("philox_normal", "count", count, 0, 2**34)
    checks.integer("philox_normal", "stream", stream, 0, _MASK)
    return _normal(sample_index, seed, step, count, stream)


def _inputs(draw: Draw, shape: tuple[int, int], *, seed: int = 5, step: int = 2, stream: int = 0) -> Inputs:
    B, count = shape
    index = torch.tensor([7, 2**31, -3, 0, 2**40 + 7])[torch.arange(B) % 5]  # their low 32 bits count
    sample_index = draw.place(index, torch.int64)
    return {"seed": seed, "step": step, "sample_index": sample_index, "count": count, "stream": stream}


_CASES: dict[str, Any] = {
    "inputs": _inputs,
    "shapes": ((1, 1), (3, 7), (5, 4100), (2, 1024), (2, 0), (0, 30)),
    "small": (2, 6),
    "layouts": ("dense", "chunk", "odd address"),
    "options": {"seed": (5, 2**63 - 1, 5 << 32), "step": (2, 2**63 - 1), "stream": (0, 2**32 - 1)},
}
Op(fused=philox_uniform, eager=philox_uniform_ref, call=_uniform, is_exact=True, **_CASES)
# the reference is as close to the exact values as fp64 comes
Op(fused=philox_normal, eager=philox_normal_ref, call=_normal, **_CASES)
