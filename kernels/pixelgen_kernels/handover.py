"""One memory for a packed modulation and its gradient, shared by the two ops that read it."""

import torch
from torch import Tensor

__all__ = ["Handover"]


class Handover:
    """Hands a packed modulation over to the ops that read it: they write its gradient over it.

    The modulation of a pixel block is its largest tensor by far (24576 values a patch in PixelDiT-XL, 400 MB
    in bf16 for 32 images of 256 pixels). `pixel_modulate` and `pixel_mlp` read different kinds of it; by
    default each returns a gradient of the whole, zeros included, and autograd adds them. With one fresh
    object given to both calls, `pixel_mlp`, whose backward pass comes first, writes its part over the values
    that it has read, and `pixel_modulate` the rest: no second tensor, no zeros, no sum.

    So nothing else may read this modulation, and a graph is good for one backward pass: a second one raises
    RuntimeError. Where it cannot be done (no gradients are recorded, the tensor is strided, a graph is being
    compiled, kernels are eager) the ops do as without it.

    Attributes:
        carrier: set by `pixel_modulate` for `pixel_mlp`: along it the gradient goes back.
    """

    __slots__ = ("_is_read", "_is_spent", "carrier")

    def __init__(self) -> None:
        self.carrier: Tensor | None = None
        self._is_read = self._is_spent = False

    @staticmethod
    def takes(x: Tensor, modulation: Tensor) -> bool:
        """Whether the modulation of these pixels can be handed over here and now."""
        if torch.compiler.is_compiling():
            return False
        has_kernel = x.is_cpu or (x.is_cuda and x.dtype != torch.float64)  # else the reference runs
        return (
            has_kernel
            and torch._C._len_torch_dispatch_stack() == 0
            and torch.is_grad_enabled()
            and modulation.requires_grad
            and modulation.is_contiguous()
            and modulation.numel() > 0
        )

    @staticmethod
    def carrier_of(modulation: Tensor) -> Tensor:
        """A tensor of its shape, dtype and device that takes no memory."""
        return modulation.new_zeros(()).expand(modulation.shape)

    def begin(self, op: str, *, is_last: bool = False) -> None:
        """Called by each op that takes part: `pixel_modulate`, then once `pixel_mlp`, which is the last.

        Raises:
            RuntimeError: the last one has been called already.
        """
        if self._is_read:
            raise RuntimeError(
                f"{op}: this handover has been through pixel_mlp; it is for one call of pixel_modulate, then "
                "one of pixel_mlp"
            )
        self._is_read = is_last

    def spend(self) -> None:
        """Called before the values are written over.

        Raises:
            RuntimeError: they are gone already.
        """
        if self._is_spent:
            raise RuntimeError(
                "pixel_mlp: this graph has been used for a backward pass, which wrote the gradient of the "
                "modulation over it; run forward again, or call the ops without a handover"
            )
        self._is_spent = True
