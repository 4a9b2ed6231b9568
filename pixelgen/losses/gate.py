"""Noise gating: which samples the perceptual terms see, and how per-sample terms become one number."""

from __future__ import annotations

import torch
from torch import Tensor


def gate(t: Tensor, gate_t: float) -> Tensor:
    """The samples that perceptual terms see: ``t >= gate_t`` (PixelGen, arXiv 2602.02493; 0.3 there).

    Args:
        t: (B,) time after the shift; 0 is noise, 1 is data.
        gate_t: threshold in [0, 1]; 0 lets every sample pass.

    Returns:
        (B,) bool.
    """
    return t >= gate_t


def masked_mean(per_sample: Tensor, keep: Tensor) -> Tensor:
    """Mean of per_sample (B,) over keep (B,) bool; zero with zero gradient if none is kept. No host sync."""
    return torch.where(keep, per_sample, 0.0).sum() / keep.sum().clamp_min(1)


def released_mean(per_sample: Tensor, keep: Tensor) -> Tensor:
    """The P-DINO reduction of the released code: the mean over *all* samples as soon as one is kept.

    The released mask gets one axis too many and cancels, so it only decides per batch; with nothing kept the
    term is 1 with zero gradient. No host sync.

    Args:
        per_sample: (B,) values.
        keep: (B,) bool.
    """
    return torch.where(keep.any(), per_sample.mean(), 1.0)
