"""What ops are tested and timed with: drawn inputs, memory layouts, and the shapes of the models we ship."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    *("BATCH", "LAYOUTS", "MAPS", "MODELS", "ROWS", "STRIDED"),
    *("Benchmark", "Draw", "Inputs", "ModelShape", "per_model", "pixel_paths"),
]

Inputs = dict[str, Any]


def chunk(tensor: Tensor, dim: int = -1) -> Tensor:
    """The middle one of three chunks of a tensor whose other values are NaN."""
    shape = list(tensor.shape)
    shape[dim] *= 3
    packed = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.is_floating_point():
        packed.fill_(float("nan"))
    view = packed.chunk(3, dim)[1]
    view.copy_(tensor)
    return view


def at_odd_address(tensor: Tensor) -> Tensor:
    """One element behind a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


def transposed(tensor: Tensor, a: int = 0, b: int = 1) -> Tensor:
    """Two dimensions exchanged in memory."""
    return tensor.transpose(a, b).contiguous().transpose(a, b)


# The same values in other places; what has too few dimensions for a layout stays as it is.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda tensor: tensor,
    "chunk": chunk,  # of a packed projection
    "odd address": at_odd_address,
    "chunk of tokens": lambda tensor: chunk(tensor, 1) if tensor.ndim > 2 else tensor,
    "transposed": lambda tensor: transposed(tensor) if tensor.ndim > 1 else tensor,
    "last transposed": lambda tensor: transposed(tensor, -2, -1) if tensor.ndim > 1 else tensor,
    "channels last": lambda tensor: (
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    ),
    "crop": lambda tensor: chunk(chunk(tensor, -1), -2) if tensor.ndim > 1 else tensor,
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape) if tensor.ndim > 1 else tensor,
}


# What an op reads in place: rows of a dense last dimension, any three dimensions, images.
ROWS = ("dense", "chunk", "odd address", "chunk of tokens", "transposed")
STRIDED = (*ROWS, "last transposed", "expanded")
MAPS = tuple(LAYOUTS)


@dataclass(kw_only=True)
class Draw:
    """Draws tensors of normal values, the same on every device: called as `draw(B, T, C)`.

    Attributes:
        dtype: of the tensors of a call.
        other: dtype of what may have another one, by default the same; see `with_other`.
        weights: dtype of weights, by default float32; see `weight`.
        device: of all tensors.
        layout: key of LAYOUTS, for all tensors but those of `chunks` and `weight`.
        seed: of the last tensor that was drawn; every tensor has its own.
    """

    dtype: torch.dtype = torch.float32
    other: torch.dtype | None = None
    weights: torch.dtype | None = None
    device: torch.device | str = "cpu"
    layout: str = "dense"
    seed: int = 0

    def values(self, *shape: int) -> Tensor:
        """Float32 on the CPU; every call has a seed of its own."""
        self.seed += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def place(self, values: Tensor, dtype: torch.dtype | None = None, layout: str | None = None) -> Tensor:
        """Given values as a drawn tensor."""
        values = values.to(device=self.device, dtype=dtype or self.dtype)
        return LAYOUTS[layout or self.layout](values)

    def __call__(self, *shape: int) -> Tensor:
        """A drawn tensor of the first dtype."""
        return self.place(self.values(*shape))

    def with_other(self, *shape: int) -> Tensor:
        """A tensor that may differ in dtype from the others."""
        return self.place(self.values(*shape), self.other)

    def chunks(self, count: int, *shape: int) -> list[Tensor]:
        """Tensors of `with_other` next to each other in one, as the chunks of a projection are."""
        packed = self.place(self.values(*shape[:-1], count * shape[-1]), self.other, "dense")
        return list(packed.chunk(count, -1))

    def weight(self, size: int) -> Tensor:
        """A dense vector around 1."""
        return self.place(1 + self.values(size) / 4, self.weights or torch.float32, "dense")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the ops see of a model at 256 pixels.

    Attributes:
        C: width.
        N: heads.
        T: tokens, in-context tokens included.
        prefix: in-context tokens, the first of the T.
        P: patch side.
        image_size: image side.
    """

    C: int
    N: int
    T: int
    prefix: int
    P: int = 16
    image_size: int = 256


MODELS = {
    "B/16": ModelShape(C=768, N=12, T=256 + 32, prefix=32),
    "L/16": ModelShape(C=1024, N=16, T=256 + 32, prefix=32),
    "XL/16": ModelShape(C=1152, N=16, T=256 + 32, prefix=32),
    # the patch-level transformer of PixelDiT (arXiv 2511.20645); it has no in-context tokens
    "PixelDiT-XL": ModelShape(C=1152, N=16, T=256, prefix=0),
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A case that is timed.

    Attributes:
        label: the model's name, a key of MODELS, or another network's, then what is not in `shape`.
        shape: for `Op.inputs`.
        options: for `Op.inputs`.
        other: see Draw.
        layout: see Draw.
        constant: arguments that get no gradient here.
    """

    label: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    other: torch.dtype | None = None
    layout: str = "dense"
    constant: tuple[str, ...] = ()


# samples of one step on one device: what fits two CPU cores, and what fills a GPU
BATCH = {"cpu": 8, "cuda": 64}


def per_model(
    make: Callable[[int, ModelShape], tuple[str, tuple[int, ...], Inputs]],
) -> Callable[[str], Iterator[Benchmark]]:
    """One benchmark per model: make(batch size, model) -> (label, shape, options)."""

    def benchmarks(device: str) -> Iterator[Benchmark]:
        for name, model in MODELS.items():
            label, shape, options = make(BATCH[device], model)
            yield Benchmark(label=f"{name} {label}", shape=shape, options=options)

    return benchmarks


def pixel_paths(make: Callable[[int, int, int], Benchmark]) -> Callable[[str], Iterator[Benchmark]]:
    """One benchmark of the pixel path of PixelDiT-XL: make(patches, pixels of a patch, channels of a pixel).

    A quarter of the images: a pixel has 16 values in the stream and 96 in its modulation.
    """

    def benchmarks(device: str) -> Iterator[Benchmark]:
        model = MODELS["PixelDiT-XL"]
        yield make(BATCH[device] // 4 * model.T, model.P**2, 16)

    return benchmarks
