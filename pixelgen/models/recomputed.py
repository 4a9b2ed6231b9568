"""A tensor that the backward pass makes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixelgen.models.layers import autocast_dtype


class Recomputed(torch.autograd.graph.saved_tensors_hooks):
    """While it is entered, operations that save ``tensor`` or a view of it save how to make it.

    Args:
        tensor: dense, cheap to make again for the memory that it takes.
        make: makes it from tensors that are kept anyway; run without gradients, under the autocast of now.
    """

    NOTHING: ClassVar[AbstractContextManager[Any]] = nullcontext()

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self._memory, self._make = _memory(tensor), make
        self._device, self._autocast = tensor.device.type, autocast_dtype(tensor.device)
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if _memory(tensor) != self._memory:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        dtype = self._autocast
        with torch.no_grad(), torch.autocast(self._device, dtype, enabled=dtype is not None):
            return self._make().as_strided(*packed)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
