"""Images to tokens and back.

One token is one P x P patch; tokens run in raster order. The patch vector is (channel, row, column) with
channel_order="first" and (row, column, channel) with channel_order="last". Both ops only move numbers: each
is the other's inverse and so, a permutation being orthogonal, the other's backward.
"""

from typing import Literal

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_choice,
    check_dense_rows,
    check_float_tensors,
    check_int,
    check_ndim,
    register_autograd,
)
from pixelgen_kernels.native import _C, address, has_cuda, launch

__all__ = [
    "patchify",
    "patchify_bwd_ref",
    "patchify_ref",
    "unpatchify",
    "unpatchify_bwd_ref",
    "unpatchify_ref",
]

MAX_PATCH_SIZE = 2**15


def patchify_ref(x: Tensor, patch_size: int, *, channel_order: Literal["first", "last"] = "first") -> Tensor:
    """Plain PyTorch definition of `patchify`."""
    B, C, H, W = x.shape
    P = patch_size
    x = x.reshape(B, C, H // P, P, W // P, P)
    x = x.permute(0, 2, 4, 1, 3, 5) if channel_order == "first" else x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // P) * (W // P), C * P * P)


def unpatchify_ref(
    tokens: Tensor,
    patch_size: int,
    image_size: tuple[int, int],
    *,
    channel_order: Literal["first", "last"] = "last",
) -> Tensor:
    """Plain PyTorch definition of `unpatchify`."""
    H, W = image_size
    P = patch_size
    B, _, D = tokens.shape
    C = D // (P * P)
    if channel_order == "first":
        x = tokens.reshape(B, H // P, W // P, C, P, P).permute(0, 3, 1, 4, 2, 5)
    else:
        x = tokens.reshape(B, H // P, W // P, P, P, C).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, C, H, W)


def patchify_bwd_ref(
    grad_tokens: Tensor,
    patch_size: int,
    image_size: tuple[int, int],
    *,
    channel_order: Literal["first", "last"],
) -> Tensor:
    """Gradient of x (B, C, H, W) from that of the tokens: the inverse permutation."""
    return unpatchify_ref(grad_tokens, patch_size, image_size, channel_order=channel_order)


def unpatchify_bwd_ref(grad_x: Tensor, patch_size: int, *, channel_order: Literal["first", "last"]) -> Tensor:
    """Gradient of the tokens (B, T, P*P*C) from that of the image: the inverse permutation."""
    return patchify_ref(grad_x, patch_size, channel_order=channel_order)


def _fresh(out: Tensor, source: Tensor) -> Tensor:
    """`out`, or its copy when reshaping moved nothing (P = 1): an op's output may not alias its input."""
    return out.clone() if out.data_ptr() == source.data_ptr() else out.contiguous()


@torch.library.custom_op("pixelgen::patchify", mutates_args=())
def _patchify(x: Tensor, patch_size: int, channel_order: str) -> Tensor:
    order: Literal["first", "last"] = "first" if channel_order == "first" else "last"
    return _fresh(patchify_ref(x, patch_size, channel_order=order), x)


@torch.library.custom_op("pixelgen::unpatchify", mutates_args=())
def _unpatchify(tokens: Tensor, patch_size: int, height: int, width: int, channel_order: str) -> Tensor:
    order: Literal["first", "last"] = "first" if channel_order == "first" else "last"
    return _fresh(unpatchify_ref(tokens, patch_size, (height, width), channel_order=order), tokens)


def _compiled_patchify(x: Tensor, patch_size: int, channel_order: str) -> Tensor:
    B, C, H, W = x.shape
    P = patch_size
    tokens = x.new_empty(B, (H // P) * (W // P), C * P * P)
    _C.patchify(
        image=address(x),
        tokens=address(tokens),
        B=B,
        C=C,
        H=H,
        W=W,
        patch_size=P,
        image_stride_b=x.stride(0),
        image_stride_c=x.stride(1),
        image_stride_h=x.stride(2),
        image_stride_w=x.stride(3),
        tokens_stride_b=tokens.stride(0),
        tokens_stride_t=tokens.stride(1),
        element_size=x.element_size(),
        channel_last=channel_order == "last",
        **launch(x),
    )
    return tokens


def _compiled_unpatchify(
    tokens: Tensor, patch_size: int, height: int, width: int, channel_order: str
) -> Tensor:
    if tokens.stride(-1) != 1:  # a gradient that was expanded from fewer numbers
        tokens = tokens.contiguous()
    B, _, D = tokens.shape
    x = tokens.new_empty(B, D // (patch_size * patch_size), height, width)
    _C.unpatchify(
        image=address(x),
        tokens=address(tokens),
        B=B,
        C=x.shape[1],
        H=height,
        W=width,
        patch_size=patch_size,
        image_stride_b=x.stride(0),
        image_stride_c=x.stride(1),
        image_stride_h=x.stride(2),
        image_stride_w=x.stride(3),
        tokens_stride_b=tokens.stride(0),
        tokens_stride_t=tokens.stride(1),
        element_size=x.element_size(),
        channel_last=channel_order == "last",
        **launch(x),
    )
    return x


for _device in ("cpu", "cuda") if has_cuda() else ("cpu",):
    _patchify.register_kernel(_device, _compiled_patchify)
    _unpatchify.register_kernel(_device, _compiled_unpatchify)


@_patchify.register_fake
def _(x, patch_size, channel_order):
    B, C, H, W = x.shape
    return x.new_empty(B, (H // patch_size) * (W // patch_size), C * patch_size * patch_size)


@_unpatchify.register_fake
def _(tokens, patch_size, height, width, channel_order):
    return tokens.new_empty(tokens.shape[0], tokens.shape[2] // (patch_size * patch_size), height, width)


def _patchify_setup_context(ctx, inputs, output):
    x, ctx.patch_size, ctx.channel_order = inputs
    ctx.image_size = x.shape[2:]


def _patchify_backward(ctx, grad_tokens):
    H, W = ctx.image_size
    return _unpatchify(grad_tokens, ctx.patch_size, H, W, ctx.channel_order), None, None


def _unpatchify_setup_context(ctx, inputs, output):
    _, ctx.patch_size, _, _, ctx.channel_order = inputs


def _unpatchify_backward(ctx, grad_x):
    return _patchify(grad_x, ctx.patch_size, ctx.channel_order), None, None, None, None


_differentiable_patchify = register_autograd(_patchify, _patchify_backward, _patchify_setup_context)
_differentiable_unpatchify = register_autograd(_unpatchify, _unpatchify_backward, _unpatchify_setup_context)


def _check_geometry(op: str, patch_size: int, H: int, W: int, channel_order: str) -> None:
    check_int(op, "patch_size", patch_size, 1, MAX_PATCH_SIZE)
    if H % patch_size or W % patch_size:
        raise ValueError(
            f"{op}: image height and width must be multiples of patch_size {patch_size}, got ({H}, {W})"
        )
    check_choice(op, "channel_order", channel_order, ("first", "last"))


def patchify(x: Tensor, patch_size: int, *, channel_order: Literal["first", "last"] = "first") -> Tensor:
    """Cut images into tokens, one per patch, in raster order.

    Args:
        x: (B, C, H, W), fp32, bf16, fp16 or fp64, any strides.
        patch_size: P, at most 32768; divides H and W.
        channel_order: of a patch vector: "first" is (channel, row, column), "last" (row, column, channel).

    Returns:
        Tokens (B, H*W/P^2, P*P*C) in the dtype of x, dense.

    Raises:
        ValueError: x is not four-dimensional, P does not divide H and W, or channel_order is unknown.
        TypeError: x is not floating.
    """
    check_float_tensors("patchify", x=x)
    check_ndim("patchify", "x", x, "B, C, H, W")
    _check_geometry("patchify", patch_size, x.shape[2], x.shape[3], channel_order)
    return _differentiable_patchify(x, patch_size, channel_order)


def unpatchify(
    tokens: Tensor,
    patch_size: int,
    image_size: tuple[int, int],
    *,
    channel_order: Literal["first", "last"] = "last",
) -> Tensor:
    """Put tokens back together into images; the inverse of `patchify` with the same channel_order.

    Args:
        tokens: (B, T, P*P*C), fp32, bf16, fp16 or fp64; last dimension contiguous, others may have strides.
        patch_size: P, at most 32768; divides H and W.
        image_size: (H, W) with H*W = T*P^2.
        channel_order: of a patch vector: "first" is (channel, row, column), "last" (row, column, channel).

    Returns:
        Images (B, C, H, W) in the dtype of tokens, dense.

    Raises:
        ValueError: a shape or stride is not as above, or channel_order is unknown.
        TypeError: tokens are not floating, or image_size is not a pair of ints.
    """
    check_float_tensors("unpatchify", tokens=tokens)
    check_ndim("unpatchify", "tokens", tokens, "B, T, P*P*C")
    if not isinstance(image_size, tuple | list):
        raise TypeError(f"unpatchify: image_size must be a tuple, got {type(image_size).__name__}")
    if len(image_size) != 2:
        raise ValueError(f"unpatchify: image_size must be (H, W), got {image_size}")
    H, W = image_size
    for side in image_size:
        check_int("unpatchify", "image_size", side, 0, 2**31 - 1)
    _check_geometry("unpatchify", patch_size, H, W, channel_order)
    pixels = patch_size * patch_size
    _, T, D = tokens.shape
    if D == 0 or D % pixels:
        raise ValueError(f"unpatchify: tokens must have a multiple of P*P = {pixels} columns, got {D}")
    if T * pixels != H * W:
        raise ValueError(
            f"unpatchify: tokens must number H*W/P^2 = {H * W // pixels} for image_size ({H}, {W}), got {T}"
        )
    check_dense_rows("unpatchify", tokens=tokens)
    return _differentiable_unpatchify(tokens, patch_size, H, W, channel_order)
