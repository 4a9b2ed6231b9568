"""Where a run first went wrong: the step, the terms and the samples of the first loss that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteGuard:
    """Watches every step on the device and is read on the host only when the log is written.

    Args:
        device: the device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._terms: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}

    def update(self, step: int, terms: dict[str, Tensor], per_sample: dict[str, Tensor]) -> None:
        """Notes what is not finite, unless an earlier step was.

        Args:
            step: number of the step, from 1.
            terms: scalars, ``loss`` and what it is made of.
            per_sample: (B,) values of the terms that have them.
        """
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
            masks[name] = mask | masks[name] if name in masks and masks[name].shape == mask.shape else mask
        return masks

    def report(self) -> str | None:
        """The first bad step in words, or None. Waits for the device."""
        step = int(self._step)
        if step < 0:
            return None
        terms = [name for name, mask in self._terms.items() if bool(mask)]
        text = f"step {step}: not finite: {', '.join(terms)}"
        for name, mask in self._samples.items():
            if samples := mask.nonzero()[:, 0].tolist():
                text += f"; {name} of samples {', '.join(map(str, samples[:8]))} of the batch"
                text += " and more" if len(samples) > 8 else ""
        return text
