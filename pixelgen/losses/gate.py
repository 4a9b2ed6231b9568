"""Noise gating: how much each sample counts in the perceptual terms, and which samples they see at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pixelgen.losses.times import Times, to_device

Schedule = Literal["hard", "cosine", "sigmoid", "snr", "learned"]
BUCKETS = 8  # sizes that a selection of a full batch may have
# Within its width the sigmoid rises from 2 % to 98 %. It is cut off at this many widths below its centre, at
# 0.2 %: noisier samples need no perceptual networks.
_SIGMOID_STEEPNESS, _SIGMOID_REACH = 8, 0.75


class NoiseGate(nn.Module):
    """Weight w(t) of a sample at time t; below ``first_t`` it is exactly 0.

        hard      1 for t >= gate_t, else 0             (PixelGen, arXiv 2602.02493, with gate_t = 0.3)
        cosine    (1 - cos(pi u)) / 2, u = (t - gate_t) / width within [0, 1]
        sigmoid   1 / (1 + exp(-8 (t - gate_t) / width)) for t >= gate_t - 0.75 width
        snr       t^2 / (t^2 + (1 - t)^2) for t >= gate_t         signal over signal and noise of x_t
        learned   exp(-u_b) of the bin b of t, for t >= gate_t; u is trained

    All but the learned ones lie in [0, 1].

    The learned weights follow arXiv 2312.02696, eq. 21: with l the weighted perceptual loss of a sample, the
    terms become l exp(-u_b) + c u_b, c the batch's mean of l, so exp(u_b) tends to E[l | bin] / E[l] and
    every bin comes to count alike.

    Args:
        schedule, gate_t, width: as ``loss.gate``, ``loss.gate_t`` and ``loss.gate_width``, which check them.
        bins: number of bins of the learned weights.
    """

    def __init__(
        self, schedule: Schedule = "hard", gate_t: float = 0.3, width: float = 0.2, bins: int = 16
    ) -> None:
        super().__init__()
        self.schedule, self.gate_t, self.width, self.bins = schedule, gate_t, width, bins
        if schedule == "learned":
            self.log_scale = nn.Parameter(torch.zeros(bins))

    @property
    def first_t(self) -> float:
        """Samples below this time have weight 0."""
        if self.schedule == "sigmoid":
            return self.gate_t - _SIGMOID_REACH * self.width
        return self.gate_t

    def passes(self, t: Tensor) -> Tensor:
        """(B,) bool: the samples that the perceptual terms see, ``t >= first_t``."""
        return t >= self.first_t

    def forward(self, t: Tensor) -> Tensor:
        """Time (B,) to weights (B,) fp32; only the learned ones have a gradient."""
        t = t.float()
        if self.schedule == "hard":
            weight = torch.ones_like(t)
        elif self.schedule == "cosine":
            progress = ((t - self.gate_t) / self.width).clamp(0, 1)
            weight = 0.5 * (1 - torch.cos(math.pi * progress))
        elif self.schedule == "sigmoid":
            weight = torch.sigmoid(_SIGMOID_STEEPNESS * (t - self.gate_t) / self.width)
        elif self.schedule == "snr":
            weight = t.square() / (t.square() + (1 - t).square())
        else:
            weight = torch.exp(-self._of_bin(t))
        return torch.where(self.passes(t), weight, 0.0)

    def penalty(self, t: Tensor, loss: Tensor) -> Tensor:
        """What the learned weights pay for being small: c times the mean of u, a scalar.

        Args:
            t: (W,) times of the whole batch; those that pass count.
            loss: c, the mean of the weighted perceptual losses of the samples that pass, or a part of it; its
                gradient is not used.
        """
        passes = self.passes(t)
        mean = masked_sum(self._of_bin(t.float()), passes) / passes.sum().clamp_min(1)
        return loss.detach() * mean

    def _of_bin(self, t: Tensor) -> Tensor:
        return self.log_scale[(t * self.bins).long().clamp(0, self.bins - 1)]


@dataclass(frozen=True, eq=False)
class Selection:
    """Some samples of those at work.

    Attributes:
        index: (K,) int64 rows, on the device; None for all in order. Behind the selected ones come
            repetitions, up to the next bucket.
        is_real: (K,) bool: False for repetitions, and for rows that do not pass.
    """

    index: Tensor | None
    is_real: Tensor

    def __len__(self) -> int:
        return len(self.is_real)

    def rows(self, values: Tensor) -> Tensor:
        """The selected rows of (B, ...)."""
        return values if self.index is None else values.index_select(0, self.index)

    def rows_of(self, wider: Selection, values: Tensor) -> Tensor:
        """The rows of values that hold those of ``wider``: all of the batch, or the same ones as here."""
        return values if wider.index is self.index else self.rows(values)

    def scatter(self, values: Tensor, batch: int) -> Tensor:
        """(K,) values back to (B,); zeros where nothing was computed."""
        if self.index is None:
            return values
        return values.new_zeros(batch).index_copy_(0, self.index, values)


def select_samples(times: Times, gate: NoiseGate, *, buckets: int = BUCKETS) -> Selection:
    """Picks the samples that pass the gate.

    K is their number rounded up to a multiple of B / buckets: few shapes, so that compiled networks are not
    compiled anew for every batch.

    Args:
        times: of the batch.
        gate: the gate.
        buckets: how many sizes K may have.
    """
    passes, device = gate.passes(times.host), times.t.device
    rows = passes.nonzero()[:, 0]
    count, batch = len(rows), len(passes)
    if count == batch:
        return Selection(None, to_device(passes, device))
    if count == 0:
        return Selection(to_device(rows, device), to_device(passes[:0], device))
    bucket = -(-batch // buckets)
    size = min(-(-count // bucket) * bucket, batch)
    index = torch.cat([rows, rows[:1].expand(size - count)])
    return Selection(to_device(index, device), to_device(torch.arange(size) < count, device))


def masked_sum(per_sample: Tensor, keep: Tensor) -> Tensor:
    """Sum of per_sample (B,) over keep (B,) bool; zero with zero gradient if none is kept. No host sync."""
    return torch.where(keep, per_sample, 0.0).sum()
