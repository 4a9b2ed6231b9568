"""What the ops that end in a norm with shift and scale share in calling the compiled module."""

from typing import Any

import torch
from torch import Tensor

from pixelgen_kernels.native import address, dtype_tag, launch

# Backward cuts its rows into about so many chunks, but into fewer where the partial sums of a chunk would
# take more than 1 / 50 (on a GPU 1 / 16) of the gradients that its rows write. An image is one at least.
_CHUNKS = {"cpu": 64, "cuda": 256}
_GRADS_PER_SUM = {"cpu": 50, "cuda": 16}


def empty_grads(x: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Uninitialised dense gradients. An op cannot return None: what has no gradient is of size 0."""
    dense = torch.contiguous_format
    return [
        x.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=dense)
        for tensor in inputs
    ]


# On a GPU a thread adds the rows of a chunk one after the other, and its rounding errors with them.
_MAX_CUDA_ROWS = 128


def as_rows(x: Tensor, scale: Tensor | None) -> Tensor:
    """X as (num_images, rows_per_image, C); a view.

    Without modulation all rows are of one image where that is a view: sums over them need few partial sums.
    """
    if x.dim() == 3 and (scale is not None or not rows_collapse(x)):
        return x
    return x.view(1, -1, x.shape[-1])


def rows_collapse(x: Tensor) -> bool:
    """Whether the leading dimensions of x (..., C) are evenly spaced, so that x is a (rows, C) view."""
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    return all(dims[i][1] == dims[i + 1][0] * dims[i + 1][1] for i in range(len(dims) - 1))


def grad_rows(grad: Tensor | None, rows: Tensor) -> Tensor:
    """An upstream gradient in the shape of `rows`, with a dense last dimension; None is zeros."""
    if grad is None:
        return rows.new_zeros(rows.shape[-1]).expand(rows.shape)
    # a gradient that was expanded from fewer numbers may have no view of this shape
    is_view = grad.stride(-1) == 1 and (grad.shape == rows.shape or rows_collapse(grad))
    return (grad if is_view else grad.contiguous()).view(rows.shape)


def rows_per_chunk(rows: Tensor, sum_bytes: int, grad_bytes: int) -> int:
    """Rows that share one partial sum of the gradients that sum over rows: its order, and so its bits.

    Args:
        rows: (num_images, rows_per_image, C), not empty. Only its shape counts, and the kind of its device.
        sum_bytes: of the partial sums of a chunk, per column.
        grad_bytes: of the gradients of a row, per column.
    """
    num_images, rows_per_image, _ = rows.shape
    kind = "cuda" if rows.is_cuda else "cpu"
    least = max(1, -(-_GRADS_PER_SUM[kind] * sum_bytes // grad_bytes))
    chunks = max(1, min(-(-_CHUNKS[kind] // num_images), rows_per_image // least))
    chunk = -(-rows_per_image // chunks)
    return min(chunk, _MAX_CUDA_ROWS) if kind == "cuda" else chunk


def num_chunks(rows: Tensor, chunk: int) -> int:
    """Chunks of `chunk` rows in all images."""
    return rows.shape[0] * -(-rows.shape[1] // chunk)


def norm_arguments(
    rows: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> dict[str, Any]:
    """What forward and backward of every op that ends in this norm pass on, with rows (images, rows, C) as x.

    Missing tensors have address 0, their strides and dtypes are unused.
    """
    num_images, rows_per_image, C = rows.shape
    x_image_stride, x_row_stride, _ = rows.stride()
    per_token = False
    shift_strides: tuple[int, ...] = (0, 0)
    scale_strides: tuple[int, ...] = (0, 0)
    if shift is not None and scale is not None:
        per_token = scale.dim() == 3
        shift_strides, scale_strides = shift.stride(), scale.stride()
    return {
        "x": address(rows),
        "shift": address(shift),
        "scale": address(scale),
        "weight": address(weight),
        "bias": address(bias),
        "mean": address(mean),
        "rstd": address(rstd),
        "num_images": num_images,
        "rows_per_image": rows_per_image,
        "C": C,
        "x_image_stride": x_image_stride,
        "x_row_stride": x_row_stride,
        "shift_image_stride": shift_strides[0],
        "shift_row_stride": shift_strides[1],
        "scale_image_stride": scale_strides[0],
        "scale_row_stride": scale_strides[1],
        "x_dtype": dtype_tag(rows),
        "modulation_dtype": dtype_tag(scale),
        "weight_dtype": dtype_tag(weight),
        "per_token": per_token,
        "layer_norm": norm == "layer",
        **launch(rows),
    }
