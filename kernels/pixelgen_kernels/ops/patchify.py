"""Images to tokens and back.

One token is one P x P patch; tokens run in raster order. The patch vector is (channel, row, column) with
channel_order="first" and (row, column, channel) with channel_order="last". Both ops only move numbers: each
is the other's inverse and so, a permutation being orthogonal, the other's backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import MAPS, ROWS, Draw, Inputs, ModelShape, per_model
from pixelgen_kernels.fused import register
from pixelgen_kernels.registry import Op

MAX_PATCH_SIZE = 2**15

ChannelOrder = Literal["first", "last"]


def patchify_ref(x: Tensor, patch_size: int, *, channel_order: ChannelOrder = "first") -> Tensor:
    """Plain PyTorch definition of `patchify`."""
    B, C, H, W = x.shape
    P = patch_size
    x = x.reshape(B, C, H // P, P, W // P, P)
    x = x.permute(0, 2, 4, 1, 3, 5) if channel_order == "first" else x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // P) * (W // P), C * P * P)


def unpatchify_ref(
    tokens: Tensor, patch_size: int, image_size: tuple[int, int], *, channel_order: ChannelOrder = "last"
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


# The same, with the same values: each is called for the other's backward.


def _to_tokens(x: Tensor, patch_size: int, height: int, width: int, channel_order: ChannelOrder) -> Tensor:
    return patchify_ref(x, patch_size, channel_order=channel_order)


def _to_image(
    tokens: Tensor, patch_size: int, height: int, width: int, channel_order: ChannelOrder
) -> Tensor:
    return unpatchify_ref(tokens, patch_size, (height, width), channel_order=channel_order)


def _empty_tokens(x: Tensor, patch_size: int, height: int, width: int, channel_order: str) -> Tensor:
    pixels = patch_size * patch_size
    return x.new_empty(x.shape[0], (height // patch_size) * (width // patch_size), x.shape[1] * pixels)


def _empty_image(tokens: Tensor, patch_size: int, height: int, width: int, channel_order: str) -> Tensor:
    return tokens.new_empty(tokens.shape[0], tokens.shape[2] // (patch_size * patch_size), height, width)


_patchify: Callable[..., Tensor] = register(
    "patchify", _to_tokens, empty=_empty_tokens, outputs=("tokens",), adjoint=lambda: _unpatchify
)
_unpatchify: Callable[..., Tensor] = register(
    "unpatchify", _to_image, empty=_empty_image, outputs=("x",), adjoint=lambda: _patchify
)


def _check_geometry(op: str, patch_size: int, H: int, W: int, channel_order: str) -> None:
    checks.integer(op, "patch_size", patch_size, 1, MAX_PATCH_SIZE)
    if H % patch_size or W % patch_size:
        raise ValueError(
            f"{op}: image height and width must be multiples of patch_size {patch_size}, got ({H}, {W})"
        )
    checks.choice(op, "channel_order", channel_order, ("first", "last"))


def patchify(x: Tensor, patch_size: int, *, channel_order: ChannelOrder = "first") -> Tensor:
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
    checks.floats("patchify", x=x)
    checks.ndim("patchify", "x", x, "B, C, H, W")
    _check_geometry("patchify", patch_size, x.shape[2], x.shape[3], channel_order)
    return _patchify(x, patch_size, x.shape[2], x.shape[3], channel_order)


def unpatchify(
    tokens: Tensor,
    patch_size: int,
    image_size: tuple[int, int],
    *,
    channel_order: ChannelOrder = "last",
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
    checks.floats("unpatchify", tokens=tokens)
    checks.ndim("unpatchify", "tokens", tokens, "B, T, P*P*C")
    if not isinstance(image_size, tuple | list):
        raise TypeError(f"unpatchify: image_size must be a tuple, got {type(image_size).__name__}")
    if len(image_size) != 2:
        raise ValueError(f"unpatchify: image_size must be (H, W), got {image_size}")
    H, W = image_size
    for side in image_size:
        checks.integer("unpatchify", "image_size", side, 0, 2**31 - 1)
    _check_geometry("unpatchify", patch_size, H, W, channel_order)
    pixels = patch_size * patch_size
    _, T, D = tokens.shape
    if D == 0 or D % pixels:
        raise ValueError(f"unpatchify: tokens must have a multiple of P*P = {pixels} columns, got {D}")
    if T * pixels != H * W:
        raise ValueError(
            f"unpatchify: tokens must number H*W/P^2 = {H * W // pixels} for image_size ({H}, {W}), got {T}"
        )
    checks.dense_rows("unpatchify", tokens=tokens)
    return _unpatchify(tokens, patch_size, H, W, channel_order)


def _image(draw: Draw, shape: tuple[int, ...], channel_order: ChannelOrder) -> Inputs:
    *size, P = shape
    return {"x": draw(*size), "patch_size": P, "channel_order": channel_order}


def _tokens(draw: Draw, shape: tuple[int, ...], channel_order: ChannelOrder) -> Inputs:
    B, C, H, W, P = shape
    tokens = draw(B, H // P * (W // P), C * P * P)
    return {"tokens": tokens, "patch_size": P, "image_size": (H, W), "channel_order": channel_order}


def _of_images(channel_order: ChannelOrder, B: int, model: ModelShape) -> tuple[str, tuple[int, ...], Inputs]:
    """Class-conditional: channels first on the way in, last on the way out."""
    S, P = model.image_size, model.P
    label = f"B={B} C=3 H=W={S} P={P} {channel_order}"
    return label, (B, 3, S, S, P), {"channel_order": channel_order}


# (B, C, H, W, P): every patch size that has its own code and two that have not; one channel; no image
_CASES: dict[str, Any] = {
    "shapes": (
        *((1, 1, 1, 1, 1), (3, 5, 9, 21, 3), (2, 1, 8, 12, 4), (2, 1, 8, 8, 2), (2, 3, 16, 40, 8)),
        *((2, 3, 256, 256, 16), (1, 3, 256, 128, 32), (0, 3, 8, 8, 4), (2, 3, 0, 8, 4)),
    ),
    "small": (2, 3, 4, 6, 2),
    "options": {"channel_order": ("first", "last")},
}

Op(
    fused=patchify,
    eager=patchify_ref,
    call=_patchify,
    differentiable=("x",),
    is_exact=True,
    inputs=_image,
    layouts=MAPS,
    benchmarks=per_model(partial(_of_images, "first")),
    **_CASES,
)
Op(
    fused=unpatchify,
    eager=unpatchify_ref,
    call=_unpatchify,
    differentiable=("tokens",),
    is_exact=True,
    inputs=_tokens,
    layouts=(*ROWS, "expanded"),
    benchmarks=per_model(partial(_of_images, "last")),
    **_CASES,
)
