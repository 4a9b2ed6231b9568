"""From an image batch to the noised tokens a model reads, in one op.

    x = image / 127.5 - 1 for uint8, else image
    x_t = t x + (1 - t) noise_scale noise          (t = 1 is data)

followed by `patchify`. The noise is given or is `philox_normal(seed, step, sample_index)`. Arithmetic in fp32
(fp64 when the image, the noise or the output is fp64).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import MAPS, Benchmark, Draw, Inputs, ModelShape, per_model
from pixelgen_kernels.checks import FLOAT_DTYPES
from pixelgen_kernels.fused import register
from pixelgen_kernels.ops.patchify import MAX_PATCH_SIZE, ChannelOrder, patchify_ref
from pixelgen_kernels.ops.philox import check_philox_arguments, philox_normal_ref
from pixelgen_kernels.registry import Op


def _noise_patchify_ref(
    image: Tensor,
    t: Tensor,
    noise: Tensor | None,
    sample_index: Tensor | None,
    patch_size: int,
    dtype: torch.dtype,
    return_clean: bool,
    seed: int | None,
    step: int,
    noise_scale: float,
    channel_order: ChannelOrder,
    clean_channel_order: ChannelOrder,
) -> tuple[Tensor, Tensor | None]:
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

    clean = tokens(x, clean_channel_order, _clean_dtype(dtype)) if return_clean else None
    return tokens(x_t, channel_order, dtype), clean


def _clean_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the clean tokens: a loss is judged by them, and bf16 rounds by a quarter of a grey level."""
    return torch.promote_types(dtype, torch.float32)


def _empty(image, t, noise, sample_index, patch_size, dtype, return_clean, *_):
    B, C, H, W = image.shape
    shape = (B, (H // patch_size) * (W // patch_size), C * patch_size * patch_size)
    tokens = image.new_empty(shape, dtype=dtype)
    return tokens, image.new_empty(shape if return_clean else 0, dtype=_clean_dtype(dtype))


_noise_patchify = register("noise_patchify", _noise_patchify_ref, empty=_empty, outputs=("tokens", "clean"))


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
    values = (seed, step, noise_scale, channel_order, clean_channel_order)
    tokens, clean = _noise_patchify_ref(
        image, t, noise, sample_index, patch_size, dtype, return_clean, *values
    )
    return tokens if clean is None else (tokens, clean)


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
    checks.strided(op, "image", image)
    checks.ndim(op, "image", image, "B, C, H, W")
    checks.floats(op, t=t)
    checks.shape(op, "t", t, image.shape[:1], "B,")
    checks.integer(op, "patch_size", patch_size, 1, MAX_PATCH_SIZE)
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
        checks.floats(op, noise=noise)
        checks.shape(op, "noise", noise, image.shape, "B, C, H, W")
        others["noise"] = noise
        noise = noise.detach()
    checks.integer(op, "step", step, 0)
    if sample_index is not None:
        check_philox_arguments(op, seed, step, sample_index)
        checks.shape(op, "sample_index", sample_index, (B,), "B,")
        others["sample_index"] = sample_index
    for name, tensor in others.items():
        if tensor.device != image.device:
            raise ValueError(
                f"{op}: {name} must be on the device of image ({image.device}), got {tensor.device}"
            )
    checks.positive(op, "noise_scale", noise_scale)
    checks.choice(op, "channel_order", channel_order, ("first", "last"))
    checks.choice(op, "clean_channel_order", clean_channel_order, ("first", "last"))
    if not isinstance(return_clean, bool):
        raise TypeError(f"{op}: return_clean must be a bool, got {type(return_clean).__name__}")
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    values = (seed, step, noise_scale, channel_order, clean_channel_order)
    tokens, clean = _noise_patchify(
        image.detach(), t.detach(), noise, sample_index, patch_size, dtype, return_clean, *values
    )
    return (tokens, clean) if return_clean else tokens


def _inputs(
    draw: Draw, shape: tuple[int, ...], source: str, is_uint8: bool, channel_order: ChannelOrder
) -> Inputs:
    *size, P = shape
    B = size[0]
    pixels = (draw.values(*size).sigmoid() * 256).byte()
    inputs: Inputs = {
        "image": draw.place(pixels, torch.uint8) if is_uint8 else draw.place(pixels / 127.5 - 1),
        "t": draw.place(torch.linspace(0, 1, B), draw.other or torch.float32),
        "patch_size": P,
        "noise_scale": 1.5,
        "channel_order": channel_order,
        "return_clean": True,
        "clean_channel_order": "last" if channel_order == "first" else "first",
        "dtype": draw.dtype,
    }
    if source == "given":
        return inputs | {"noise": draw.with_other(*size)}
    return inputs | {"seed": 2**63 - 5, "step": 3, "sample_index": draw.place(torch.arange(B), torch.int64)}


def _benchmarks(device: str) -> Iterator[Benchmark]:
    """In training: on the uint8 images of the loader, with the clean tokens."""

    def step(source: str, B: int, model: ModelShape) -> tuple[str, tuple[int, ...], Inputs]:
        S, P = model.image_size, model.P
        options = {"source": source, "is_uint8": True, "channel_order": "first"}
        return f"B={B} C=3 H=W={S} P={P} noise={source}", (B, 3, S, S, P), options

    for source in ("given", "philox"):
        yield from per_model(partial(step, source))(device)


Op(
    fused=noise_patchify,
    eager=noise_patchify_ref,
    call=_noise_patchify,
    differentiable=(),
    inputs=_inputs,
    # (B, C, H, W, P): every kind of patch size, images and patches wider than a piece of a row (512)
    shapes=(
        *((1, 1, 1, 1, 1), (3, 3, 15, 25, 5), (2, 3, 64, 64, 16), (2, 1, 9, 6, 3), (1, 4, 7, 14, 7)),
        *((2, 3, 8, 24, 8), (1, 2, 12, 20, 4), (1, 3, 2, 1030, 2), (1, 5, 32, 64, 32)),
        *((1, 3, 516, 516, 516), (0, 3, 4, 4, 2)),
    ),
    small=(2, 3, 4, 6, 2),
    options={
        "source": ("given", "philox"),
        "is_uint8": (True, False),
        "channel_order": ("first", "last"),
    },
    layouts=MAPS,
    benchmarks=_benchmarks,
)
