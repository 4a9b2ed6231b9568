"""What a forward pass leaves behind for the backward pass, measured without computing it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixelgen.losses.options import LossConfig
from pixelgen.models.families import Architecture, build_denoiser
from pixelgen.planning.skeleton import build

Checkpointing = Literal["none", "selective", "full"]


class LiveStorages(TorchDispatchMode):
    """Bytes of the tensors made inside that are still alive, whoever keeps them.

    Attributes:
        alive: bytes of each storage.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        return result


@lru_cache(maxsize=64)
def activation_bytes(model: Architecture, size: int, checkpointing: Checkpointing = "none") -> int:
    """Bytes of one image that are kept between the denoiser's forward and backward pass.

    Args:
        model: the architecture.
        size: bytes of a number: 2 under bf16 autocast, else 4.
        checkpointing: as in ``Denoiser.checkpoint_blocks``.
    """
    one, two = (_kept(model, batch, size == 2, checkpointing) for batch in (1, 2))
    return two - one  # what does not grow with the batch are weights


@lru_cache(maxsize=64)
def objective_bytes(loss: LossConfig, model: Architecture, size: int) -> tuple[int, int]:
    """Bytes per image that the objective keeps for its backward pass: of any, and of one that passes.

    Args:
        loss: the section of the configuration.
        model: the denoiser's architecture.
        size: bytes of a number: 2 under bf16 autocast, else 4.
    """
    skeleton = build(loss, model, half=size == 2)
    dtype = torch.bfloat16 if size == 2 else torch.float32

    def kept(*t: float) -> int:
        inputs = skeleton.inputs(t, dtype)
        known = [*skeleton.tensors(), *inputs[:3], inputs[4]]
        return _bytes_alive(known, size == 2, lambda: skeleton.objective(*inputs, update_balance=False))

    passing = kept(1.0, 1.0) - kept(1.0)  # what does not grow with the batch are weights
    return kept(1.0, 0.0) - kept(1.0), passing


def _kept(model: Architecture, batch: int, is_half: bool, checkpointing: Checkpointing) -> int:
    with FakeTensorMode():
        denoiser = build_denoiser(model)
        denoiser.checkpoint_blocks(checkpointing)
        dtype = torch.bfloat16 if is_half else torch.float32
        tokens = torch.empty(batch, model.num_tokens, model.patch_dim, dtype=dtype)
        t, condition = torch.empty(batch), denoiser.example_condition(batch)
        known = [*denoiser.parameters(), *denoiser.buffers(), tokens, t, *condition.values()]
        tap = min(1, model.depth - 1)
        return _bytes_alive(
            known, is_half, lambda: denoiser.forward_tokens(tokens, model.grid, t, condition, tap=tap)
        )


def _bytes_alive(known: Iterable[Tensor], is_half: bool, forward: Callable[[], object]) -> int:
    """Bytes of what a forward pass leaves behind, its results included."""
    gc.freeze()  # what was there before need not be looked through
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half), LiveStorages(known) as storages:
            output = forward()
        gc.collect()
        total = sum(storages.alive.values())
        del output
        return total
    finally:
        gc.unfreeze()
