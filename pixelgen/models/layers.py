"""What the denoisers share: attention, SwiGLU, AdaLN, the block and the final layer.

Module and parameter names follow the published PixelGen code, so that its checkpoints load strictly. Layers
reach the fused ops only through the ``Ops`` they are given (``pixelgen_kernels.select``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pixelgen_kernels import Ops
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Checkpointing = Literal["none", "selective", "full"]


class RMSNorm(nn.Module):
    """Holds the weight (C,) of an RMSNorm; the arithmetic lives in the fused ops."""

    eps = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Self-attention with RMSNorm on queries and keys and axial RoPE on the image tokens."""

    def __init__(
        self,
        width: int,
        heads: int,
        ops: Ops,
        *,
        qkv_bias: bool = True,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.attn_dropout, self.proj_dropout, self.ops = heads, attn_dropout, proj_dropout, ops
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], num_prefix_tokens: int = 0) -> Tensor:
        """(B, T, C) to (B, T, C); the first ``num_prefix_tokens`` tokens are not rotated."""
        q, k, v = self.ops.qk_norm_rope(
            self.qkv(x),
            self.q_norm.weight,
            self.k_norm.weight,
            *rope,
            num_heads=self.heads,
            num_prefix_tokens=num_prefix_tokens,
            eps=RMSNorm.eps,
        )  # (B, N, T, D) each
        dropout = self.attn_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = self.proj(x.transpose(1, 2).flatten(2))
        return F.dropout(x, self.proj_dropout, self.training)


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), projected back; W1 and W2 are one packed matrix ``w12``."""

    def __init__(self, width: int, inner: int, dropout: float, ops: Ops) -> None:
        super().__init__()
        self.dropout, self.ops = dropout, ops
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.w3(F.dropout(self.ops.swiglu(self.w12(x)), self.dropout, self.training))


class SplitSwiGLU(nn.Module):
    """silu(x W1) * (x W3), projected back by W2, without biases; one product where gradients are recorded."""

    def __init__(self, width: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if torch.is_grad_enabled() and _is_plain(self.w1) and _is_plain(self.w3):
            packed = F.linear(x, _packed([self.w1.weight, self.w3.weight]))
        else:
            packed = torch.cat([self.w1(x), self.w3(x)], dim=-1)
        return self.w2(self.ops.swiglu(packed))


def packed_modulations(
    condition: Tensor, modules: Sequence[nn.Module], dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """The modulation of every AdaLN layer from one matrix product, for the training step.

    Their weights change at every step; where they stay as they are, packing would cost more than it saves.
    Each layer keeps its own parameters; the product reads them in the dtype of autocast where that is on.

    Args:
        condition: (B, C).
        modules: ``adaLN_modulation`` of each block and of the final layer, as `adaln` makes them.
        dtype: of the result.

    Returns:
        One (B, out_features) per module, views of one tensor. Or None for each: then the modules compute
        their own, because no gradients are recorded, or because one of them is not what it was: it has hooks,
        an adapter, quantised or sharded weights.
    """
    if not torch.is_grad_enabled() or not all(map(_is_plain_adaln, modules)):
        return [None] * len(modules)
    sequences = cast("Sequence[nn.Sequential]", modules)
    layers = [cast("nn.Linear", sequence[-1]) for sequence in sequences]
    weight = _packed([layer.weight for layer in layers])
    bias = _packed([layer.bias for layer in layers])
    for activation in sequences[0][:-1]:
        condition = activation(condition)
    modulations = F.linear(condition, weight, bias).to(dtype)
    return modulations.split([layer.out_features for layer in layers], dim=1)


def _packed(parameters: Sequence[Tensor]) -> Tensor:
    """One after the other, in the dtype of autocast where that is on."""
    dtype = autocast_dtype(parameters[0].device) or parameters[0].dtype
    # cast before they are packed: a packed copy in fp32 would be moved twice more
    return torch.cat([parameter.to(dtype) for parameter in parameters])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products there, where autocast is on."""
    kind = device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)  # meta has none, and asking raises
    return torch.get_autocast_dtype(kind) if is_on else None


def adaln(width: int, num_values: int, *, is_activated: bool = False) -> nn.Sequential:
    """SiLU, unless the condition (..., C) has been through it, and a projection to so many values."""
    projection = nn.Linear(width, num_values)
    return nn.Sequential(projection) if is_activated else nn.Sequential(nn.SiLU(), projection)


def _is_plain_adaln(module: nn.Module) -> bool:
    """Whether an AdaLN module is as `adaln` made it, so that its projection may be computed elsewhere."""
    if type(module) is not nn.Sequential or _has_hooks(module):
        return False
    *activations, linear = module
    is_silu = all(type(part) is nn.SiLU and not _has_hooks(part) for part in activations)
    return is_silu and len(activations) < 2 and _is_plain(linear)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer does nothing but multiply by its weight and add its bias."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and type(linear.bias) in (nn.Parameter, type(None))
        and not _has_hooks(linear)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# The output of a block's last branch and its gate (B, C), not yet added to the residual stream: the norm that
# follows adds it in the pass that it makes anyway.
Pending = tuple[Tensor, Tensor]


def add_pending(x: Tensor, pending: Pending | None) -> Tensor:
    """X + gate * branch, for the places where no norm follows."""
    if pending is None:
        return x
    branch, gate = pending
    return torch.addcmul(x, gate[:, None], branch)


def norm_after_pending(
    x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, norm: RMSNorm, ops: Ops
) -> tuple[Tensor, Tensor]:
    """The residual stream with the pending branch added, and its norm with shift and scale."""
    if pending is None:
        return x, ops.rms_norm_modulate(x, shift, scale, norm.weight, eps=norm.eps)
    branch, gate = pending
    return ops.gate_residual_norm_modulate(x, branch, gate, shift, scale, norm.weight, eps=norm.eps)


# What selective checkpointing keeps: matrix products and attention take the time, everything else is cheap.
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
}
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep(kept: set[Any]) -> Callable[[], Any]:
    def policy(_context: Any, op: Any, *_args: Any, **_named: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


_keep_products = _keep(_PRODUCTS)
_keep_products_and_attention = _keep(_PRODUCTS | _ATTENTION)


def checkpointed(
    compute: Callable[..., Any], mode: Checkpointing, *arguments: Any, keeps_attention: bool = True
) -> Any:
    """``compute(*arguments)``, whose backward pass computes again what ``mode`` says, see ``Denoiser``."""
    if mode == "none" or not torch.is_grad_enabled():
        return compute(*arguments)
    if mode == "full":
        return checkpoint(compute, *arguments, use_reentrant=False)
    context = _keep_products_and_attention if keeps_attention else _keep_products
    return checkpoint(compute, *arguments, use_reentrant=False, context_fn=context)


class Block(nn.Module):
    """AdaLN transformer block: x + gate * f(norm(x) * (1 + scale) + shift), attention then MLP.

    The MLP's branch is added by the norm that follows, usually that of the next block.
    """

    #: What the backward pass computes again; see ``Denoiser.checkpoint_blocks``.
    checkpointing: Checkpointing = "none"

    def __init__(
        self, width: int, attn: Attention, mlp: nn.Module, adaLN_modulation: nn.Sequential, ops: Ops
    ) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = RMSNorm(width)
        self.attn = attn
        self.norm2 = RMSNorm(width)
        self.mlp = mlp
        self.adaLN_modulation = adaLN_modulation

    def forward(
        self,
        x: Tensor,
        pending: Pending | None,
        condition: Tensor,
        rope: tuple[Tensor, Tensor],
        num_prefix_tokens: int,
        modulation: Tensor | None,
    ) -> tuple[Tensor, Pending]:
        """One block on the residual stream.

        Args:
            x: (B, T, C).
            pending: what the previous block left to be added: branch (B, T, C) and gate (B, C), or None.
            condition: (B, C).
            rope: cos and sin of the image tokens.
            num_prefix_tokens: in-context tokens at the front.
            modulation: what ``adaLN_modulation`` makes of the condition, where that is known: (B, 6C) in the
                dtype of x, shift, scale, gate of attention, then of the MLP.

        Returns:
            The residual stream (B, T, C) and the MLP's branch with its gate, in x's dtype.
        """
        # Attention that drops out has to run again: dropout after it would draw other numbers otherwise.
        drops_out = self.training and self.attn.attn_dropout > 0
        arguments = x, pending, condition, rope, num_prefix_tokens, modulation
        return checkpointed(self._compute, self.checkpointing, *arguments, keeps_attention=not drops_out)

    def _compute(
        self,
        x: Tensor,
        pending: Pending | None,
        condition: Tensor,
        rope: tuple[Tensor, Tensor],
        num_prefix_tokens: int,
        modulation: Tensor | None,
    ) -> tuple[Tensor, Pending]:
        if modulation is None:
            modulation = self.adaLN_modulation(condition).to(x.dtype)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x, h = norm_after_pending(x, pending, shift_attn, scale_attn, self.norm1, self.ops)
        attended = self.attn(h, rope, num_prefix_tokens).to(x.dtype), gate_attn
        x, h = norm_after_pending(x, attended, shift_mlp, scale_mlp, self.norm2, self.ops)
        return x, (self.mlp(h).to(x.dtype), gate_mlp)


class FinalLayer(nn.Module):
    """RMSNorm with its own shift and scale, then one projection to the pixels of a patch, channel fastest."""

    def __init__(self, width: int, patch_dim: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, patch_dim)
        self.adaLN_modulation = adaln(width, 2 * width)

    def forward(
        self, x: Tensor, pending: Pending | None, condition: Tensor, modulation: Tensor | None
    ) -> Tensor:
        """(B, T, C) to (B, T, P*P*channels); arguments as of ``Block``, modulation (B, 2C) without gate."""
        if modulation is None:
            modulation = self.adaLN_modulation(condition).to(x.dtype)
        shift, scale = modulation.chunk(2, dim=1)
        _, x = norm_after_pending(x, pending, shift, scale, self.norm_final, self.ops)
        return self.linear(x)
