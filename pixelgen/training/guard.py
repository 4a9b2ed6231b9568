"""Where a run first went wrong: the step, the terms and the samples of the first loss that is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NotFinite:
    """The first step with a value that is not finite."""

    step: int  # from 1
    terms: tuple[str, ...]  # names of the scalars that are not finite
    samples: dict[str, list[int]]  # places in the batch of the samples that are not, by term


class FiniteGuard:
    """Watches every step on the device and is read on the host only when the log is written."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._terms: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}

    def update(self, step: int, terms: dict[str, Tensor], per_sample: dict[str, Tensor]) -> None:
        """Remembers which scalars and which values (B,) of samples are not finite in the first such step."""
        bad = {name: ~value.isfinite() for name, value in terms.items()}
        is_first = torch.stack(list(bad.values())).any() & (self._step < 0)
        self._step = torch.where(is_first, step, self._step)
        self._terms = self._kept(self._terms, bad, is_first)
        bad_samples = {name: ~values.isfinite() for name, values in per_sample.items()}
        self._samples = self._kept(self._samples, bad_samples, is_first)

    @staticmethod
    def _kept(old: dict[str, Tensor], new: dict[str, Tensor], is_first: Tensor) -> dict[str, Tensor]:
        """The new masks where this is the first bad step, else the old ones; a term may come and go."""
        masks = {name: mask & is_first for name, mask in new.items()}
        for name, mask in old.items():
            masks[name] = mask | masks[name] if name in masks else mask
        return masks

    def first(self) -> NotFinite | None:
        """The first bad step, or None. Waits for the device."""
        step = int(self._step)
        if step < 0:
            return None
        terms = tuple(name for name, mask in self._terms.items() if bool(mask))
        samples = {name: mask.nonzero()[:, 0].tolist() for name, mask in self._samples.items()}
        return NotFinite(step, terms, {name: places for name, places in samples.items() if places})
