"""Flow matching loss of an x-prediction, per sample, on tokens: no image has to be put together for it.

    loss_b = mean over tokens and channels of (x_pred - x)^2 / max(1 - t_b, t_eps)^2

It is the squared error of the velocity (x_pred - x_t) / max(1 - t, t_eps), whose target has the same
denominator (JiT, arXiv 2511.13720; t = 1 is data). Arithmetic in fp32 (fp64 when an input is fp64).
"""

import torch
from torch import Tensor

from pixelgen_kernels import checks
from pixelgen_kernels.cases import STRIDED, Draw, Inputs, ModelShape, per_model
from pixelgen_kernels.checks import stats_dtype
from pixelgen_kernels.fused import register
from pixelgen_kernels.registry import Op


def _velocity_weight(t: Tensor, t_eps: float, dtype: torch.dtype) -> Tensor:
    """1 / max(1 - t, t_eps)^2, (B,)."""
    return (1 - t.to(dtype)).clamp_min(t_eps).square().reciprocal()


def flow_matching_loss_ref(x_pred: Tensor, x: Tensor, t: Tensor, *, t_eps: float = 0.05) -> Tensor:
    """Plain PyTorch definition of `flow_matching_loss`; like it, differentiable in x_pred only."""
    dtype = stats_dtype(x_pred, x)
    error = x_pred.to(dtype) - x.detach().to(dtype)
    return error.square().mean((1, 2)) * _velocity_weight(t.detach(), t_eps, dtype)


def flow_matching_loss_bwd_ref(
    grad_loss: Tensor, x_pred: Tensor, x: Tensor, t: Tensor, t_eps: float
) -> Tensor:
    """grad_x_pred = grad_loss_b * 2 (x_pred - x) / (T D max(1 - t_b, t_eps)^2), in the dtype of x_pred."""
    dtype = stats_dtype(x_pred, x)
    _, T, D = x_pred.shape
    factor = grad_loss.to(dtype) * _velocity_weight(t, t_eps, dtype) * (2 / (T * D))
    return ((x_pred.to(dtype) - x.to(dtype)) * factor[:, None, None]).to(x_pred.dtype)


def _empty(x_pred: Tensor, x: Tensor, t: Tensor, t_eps: float) -> Tensor:
    return x_pred.new_empty(x_pred.shape[0], dtype=stats_dtype(x_pred, x))


_flow_matching_loss = register(
    "flow_matching_loss",
    flow_matching_loss_ref,
    flow_matching_loss_bwd_ref,
    empty=_empty,
    outputs=("loss",),
    gradients={"x_pred": "x_pred"},
    readable=lambda grad: grad,  # any stride
)


def flow_matching_loss(x_pred: Tensor, x: Tensor, t: Tensor, *, t_eps: float = 0.05) -> Tensor:
    """Squared velocity error of an x-prediction, per sample (JiT, arXiv 2511.13720).

    loss_b = mean over T and D of (x_pred - x)^2 / max(1 - t_b, t_eps)^2, in fp32 (fp64 when an input is
    fp64).

    Args:
        x_pred: (B, T, D) predicted clean tokens, any floating dtype, any strides. The only argument with a
            gradient.
        x: (B, T, D) clean tokens in the channel order of x_pred, any floating dtype, any strides.
        t: (B,) time of each sample in [0, 1], any floating dtype; 1 is data.
        t_eps: lower bound of 1 - t, above 0.

    Returns:
        (B,) float32 (float64 when x_pred or x is float64).

    Raises:
        TypeError: an argument is not a tensor, or not of a floating dtype.
        ValueError: a shape, device or t_eps is not as above, or T * D is 0.
    """
    op = "flow_matching_loss"
    checks.floats(op, x_pred=x_pred, x=x, t=t)
    checks.ndim(op, "x_pred", x_pred, "B, T, D")
    checks.shape(op, "x", x, x_pred.shape, "B, T, D")
    checks.shape(op, "t", t, x_pred.shape[:1], "B,")
    checks.positive(op, "t_eps", t_eps)
    if x_pred.shape[1] * x_pred.shape[2] == 0:
        raise ValueError(f"{op}: x_pred must have T >= 1 and D >= 1, got {tuple(x_pred.shape)}")
    return _flow_matching_loss(x_pred, x.detach(), t.detach(), t_eps)


def _inputs(draw: Draw, shape: tuple[int, ...]) -> Inputs:
    """Clean tokens and times are float32 in training, whatever the dtype of the model."""
    t = torch.linspace(0.1, 1, shape[0])  # the last sample has 1 - t below t_eps
    return {
        "x_pred": draw(*shape),
        "x": draw.place(draw.values(*shape), draw.other or torch.float32),
        "t": draw.place(t, draw.weights or torch.float32),
    }


def _in_a_step(B: int, model: ModelShape) -> tuple[str, tuple[int, ...], Inputs]:
    T, D = (model.image_size // model.P) ** 2, 3 * model.P * model.P
    return f"B={B} T={T} D={D}", (B, T, D), {}


Op(
    fused=flow_matching_loss,
    eager=flow_matching_loss_ref,
    call=_flow_matching_loss,
    differentiable=("x_pred",),
    inputs=_inputs,
    # a chunk of a sample has 16384 elements on the CPU, 4096 on a GPU
    shapes=((1, 1, 1), (3, 7, 13), (2, 24, 768), (2, 256, 768), (2, 3, 6000), (0, 4, 12)),
    small=(3, 2, 5),
    layouts=STRIDED,
    benchmarks=per_model(_in_a_step),
)
