"""The times of a batch, in the one form that all of a step reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Times:
    """t of a batch, and which of its samples this process works on now: the local ones.

    They are drawn on the host, so that it knows, without asking the device, which samples pass the noise
    gate, those of other processes included.

    Attributes:
        whole: (W,) of all samples of the batch, on the host.
        rows: places of the local samples.
        t: (B,) of these, on the device.
    """

    whole: Tensor
    rows: range
    t: Tensor = field(repr=False)

    @classmethod
    def of(cls, whole: Tensor, rows: range | None = None, device: torch.device | None = None) -> Times:
        """Of a batch, by default all of it on the CPU.

        Args:
            whole: (W,) on the host.
            rows: consecutive places.
            device: where they are needed.

        Raises:
            ValueError: another shape.
        """
        if whole.ndim != 1:
            raise ValueError(f"Times: whole must have shape (W,), got {tuple(whole.shape)}")
        rows = range(len(whole)) if rows is None else rows
        own = whole[rows.start : rows.stop]
        return cls(whole, rows, own if device is None else to_device(own, device))

    @property
    def host(self) -> Tensor:
        """(B,) of the local samples, on the host."""
        return self.whole[self.rows.start : self.rows.stop]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
