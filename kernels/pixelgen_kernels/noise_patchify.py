"""From an image batch to the noised tokens a model reads, in one op.

    x = image / 127.5 - 1 for uint8, else image           x_t = t x + (1 - t) noise_scale noise          (t =
    1 is data)

followed by `patchify`. The noise is given or is `philox_normal(seed, step, sample_index)`. Arithmetic in fp32
(fp64 when the image, the noise or the output is fp64).
"""

from typing import Literal

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_float_tensors,
    check_int,
    check_ndim,
    check_positive,
    check_shape,
    check_strided,
)
from pixelgen_kernels.native import _C, address, dtype_tag, has_cuda, launch
from pixelgen_kernels.patchify import MAX_PATCH_SIZE, patchify_ref
from pixelgen_kernels.philox import check_philox_arguments, philox_normal_ref

__all__ = ["noise_patchify", "noise_patchify_ref"]

ChannelOrder = Literal["first", "last"]


def noise_patchify_ref(
    image: Tensor,
    t: Tensor,
    patch_size: int,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    step: int = 0,
    sample_index: Tensor | None = None,
    noise_scale: float = 1.0,
    channel_order: ChannelOrder = "first",
    return_clean: bool = False,
    clean_channel_order: ChannelOrder = "last",
    dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `noise_patchify`; like it, without a gradient."""
    image, t = image.detach(), t.detach()
    if noise is None:
        noise = philox_normal_ref(seed, step, sample_index, image.shape[1:].numel())  # type: ignore[arg-type]
    noise = noise.detach().reshape(image.shape)
    is_double = torch.float64 in (image.dtype, noise.dtype, dtype)
    stats = torch.float64 if is_double else torch.float32
    x = image.to(stats) / 127.5 - 1 if image.dtype == torch.uint8 else image.to(stats)
    t = t.to(stats)[:, None, None, None]
    x_t = t * x + (1 - t) * (noise.to(stats) * noise_scale)

    def tokens(pixels: Tensor, order: ChannelOrder, dtype: torch.dtype) -> Tensor:
        # copy=True: for P = 1 and C = 1 patchify moves nothing, and the result may not alias the image
        patches = patchify_ref(pixels, patch_size, channel_order=order)
        return patches.to(dtype, copy=True, memory_format=torch.contiguous_format)

    x_t_tokens = tokens(x_t, channel_order, dtype)
    if not return_clean:
        return x_t_tokens
    return x_t_tokens, tokens(x, clean_channel_order, _clean_dtype(dtype))


def _clean_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the clean tokens: a loss is judged by them, and bf16 rounds by a quarter of a grey level."""
    return torch.promote_types(dtype, torch.float32)


def _empty_outputs(
    image: Tensor, patch_size: int, return_clean: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Uninitialised tokens of x_t and of x. An op cannot return None: what is not asked for is of size 0."""
    B, C, H, W = image.shape
    shape = (B, (H // patch_size) * (W // patch_size), C * patch_size * patch_size)
    tokens = image.new_empty(shape, dtype=dtype)
    return tokens, image.new_empty(shape if return_clean else 0, dtype=_clean_dtype(dtype))


def _fwd_by_reference(
    image: Tensor,
    t: Tensor,
    patch_size: int,
    noise: Tensor | None,
    seed: int | None,
    step: int,
    sample_index: Tensor | None,
    noise_scale: float,
    channel_order: str,
    return_clean: bool,
    clean_channel_order: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tokens = noise_patchify_ref(
        image,
        t,
        patch_size,
        noise=noise,
        seed=seed,
        step=step,
        sample_index=sample_index,
        noise_scale=noise_scale,
        channel_order="first" if channel_order == "first" else "last",
        return_clean=return_clean,
        clean_channel_order="first" if clean_channel_order == "first" else "last",
        dtype=dtype,
    )
    if isinstance(tokens, tuple):
        return tokens
    return tokens, tokens.new_empty(0, dtype=_clean_dtype(dtype))


_fwd = torch.library.custom_op("pixelgen::noise_patchify_fwd", _fwd_by_reference, mutates_args=())


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """The four strides of an image; those of None are unused."""
    strides = (0, 0, 0, 0) if tensor is None else tensor.stride()
    return {f"{name}_stride_{letter}": stride for letter, stride in zip("bchw", strides, strict=True)}


def _compiled_fwd(
    image: Tensor,
    t: Tensor,
    patch_size: int,
    noise: Tensor | None,
    seed: int | None,
    step: int,
    sample_index: Tensor | None,
    noise_scale: float,
    channel_order: str,
    return_clean: bool,
    clean_channel_order: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    is_double = dtype == torch.float64 or image.dtype == torch.float64
    is_double = is_double or (noise is not None and noise.dtype == torch.float64)
    if image.is_cuda and is_double:  # not worth compiled code on a GPU
        return _fwd_by_reference(
            image,
            t,
            patch_size,
            noise,
            seed,
            step,
            sample_index,
            noise_scale,
            channel_order,
            return_clean,
            clean_channel_order,
            dtype,
        )
    tokens, clean = _empty_outputs(image, patch_size, return_clean, dtype)
    if tokens.numel() > 0:
        B, C, H, W = image.shape
        is_uint8 = image.dtype == torch.uint8
        _C.noise_patchify(
            image=address(image),
            noise=address(noise),
            t=address(t),
            sample_index=address(sample_index),
            tokens=address(tokens),
            clean=address(clean),
            B=B,
            C=C,
            H=H,
            W=W,
            patch_size=patch_size,
            **_strides("image", image),
            **_strides("noise", noise),
            t_stride=t.stride(0),
            sample_index_stride=0 if sample_index is None else sample_index.stride(0),
            seed=0 if seed is None else seed,
            step=step,
            noise_scale=noise_scale,
            image_is_uint8=is_uint8,
            image_dtype=dtype_tag(None if is_uint8 else image),
            noise_dtype=dtype_tag(noise),
            t_dtype=dtype_tag(t),
            out_dtype=dtype_tag(tokens),
            channel_last=channel_order == "last",
            clean_channel_last=clean_channel_order == "last",
            **launch(image),
        )
    return tokens, clean


for _device in ("cpu", "cuda") if has_cuda() else ("cpu",):
    _fwd.register_kernel(_device, _compiled_fwd)


@_fwd.register_fake
def _(
    image,
    t,
    patch_size,
    noise,
    seed,
    step,
    sample_index,
    noise_scale,
    channel_order,
    return_clean,
    clean_channel_order,
    dtype,
):
    return _empty_outputs(image, patch_size, return_clean, dtype)


def noise_patchify(
    image: Tensor,
    t: Tensor,
    patch_size: int,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    step: int = 0,
    sample_index: Tensor | None = None,
    noise_scale: float = 1.0,
    channel_order: ChannelOrder = "first",
    return_clean: bool = False,
    clean_channel_order: ChannelOrder = "last",
    dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, Tensor]:
    """Noise images to time t and cut them into tokens (flow matching, JiT, arXiv 2511.13720).

    x_t = t x + (1 - t) noise_scale noise, where x = image / 127.5 - 1 for uint8 images. Nothing has a
    gradient.

    Args:
        image: (B, C, H, W), uint8 in [0, 255], or floating and already in [-1, 1]; any strides.
        t: (B,) time of each sample, floating; 0 is noise, 1 is data.
        patch_size: P; divides H and W.
        noise: (B, C, H, W) standard normal, floating, any strides. Either this, or seed and sample_index.
        seed: in [0, 2**63): the noise of sample b is `philox_normal(seed, step, sample_index, C * H * W)[b]`,
            so it does not depend on the batch that the sample is in.
        step: at least 0, changes the noise; only used with seed.
        sample_index: (B,) int64, which sample each image is; only with seed.
        noise_scale: factor of the noise, above 0.
        channel_order: order inside a patch of x_t: "first" (channel, row, column), "last" (row, column,
            channel).
        return_clean: also return the tokens of x.
        clean_channel_order: order inside a patch of x.
        dtype: floating dtype of the x_t tokens: that of the matrix product that reads them.

    Returns:
        x_t tokens (B, T, P*P*C) with T = H W / P^2, or (x_t tokens, x tokens). The latter are float32
        (float64 with dtype float64), since losses are judged by them.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, device or value is not as above, or not exactly one source of noise is given.
    """
    op = "noise_patchify"
    if not isinstance(image, Tensor):
        raise TypeError(f"{op}: image must be a tensor, got {type(image).__name__}")
    if image.dtype != torch.uint8 and image.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: image must be uint8 or floating, got {image.dtype}")
    check_strided(op, "image", image)
    check_ndim(op, "image", image, "B, C, H, W")
    check_float_tensors(op, t=t)
    check_shape(op, "t", t, image.shape[:1], "B,")
    check_int(op, "patch_size", patch_size, 1, MAX_PATCH_SIZE)
    B, _, H, W = image.shape
    if H % patch_size or W % patch_size:
        raise ValueError(
            f"{op}: image height and width must be multiples of patch_size {patch_size}, got ({H}, {W})"
        )
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"{op}: noise or seed must be given, one of them, got {given}")
    if (seed is None) != (sample_index is None):
        raise ValueError(f"{op}: sample_index must be given with seed and only then")
    others = {"t": t}
    if noise is not None:
        check_float_tensors(op, noise=noise)
        check_shape(op, "noise", noise, image.shape, "B, C, H, W")
        others["noise"] = noise
        noise = noise.detach()
    check_int(op, "step", step, 0)
    if sample_index is not None:
        check_philox_arguments(op, seed, step, sample_index)
        check_shape(op, "sample_index", sample_index, (B,), "B,")
        others["sample_index"] = sample_index
    for name, tensor in others.items():
        if tensor.device != image.device:
            raise ValueError(
                f"{op}: {name} must be on the device of image ({image.device}), got {tensor.device}"
            )
    check_positive(op, "noise_scale", noise_scale)
    check_choice(op, "channel_order", channel_order, ("first", "last"))
    check_choice(op, "clean_channel_order", clean_channel_order, ("first", "last"))
    if not isinstance(return_clean, bool):
        raise TypeError(f"{op}: return_clean must be a bool, got {type(return_clean).__name__}")
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    tokens, clean = _fwd(
        image.detach(),
        t.detach(),
        patch_size,
        noise,
        seed,
        step,
        sample_index,
        noise_scale,
        channel_order,
        return_clean,
        clean_channel_order,
        dtype,
    )
    return (tokens, clean) if return_clean else tokens
