"""Flow matching loss of an x-prediction, per sample, on tokens: no image has to be put together for it.

    loss_b = mean over tokens and channels of (x_pred - x)^2 / max(1 - t_b, t_eps)^2

It is the squared error of the velocity (x_pred - x_t) / max(1 - t, t_eps), whose target has the same
denominator (JiT, arXiv 2511.13720; t = 1 is data). Arithmetic in fp32 (fp64 when an input is fp64).
"""

import torch
from torch import Tensor

from pixelgen_kernels._checks import (
    check_float_tensors,
    check_ndim,
    check_positive,
    check_shape,
    refuse_double_backward,
    register_autograd,
    stats_dtype,
)
from pixelgen_kernels.native import _C, address, dtype_tag, has_cuda, launch

__all__ = ["flow_matching_loss", "flow_matching_loss_bwd_ref", "flow_matching_loss_ref"]


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
    grad = (x_pred.to(dtype) - x.to(dtype)) * factor[:, None, None]
    return grad.to(x_pred.dtype).contiguous()


# Elements that are added up before the second pass: what fills an even share of the cores.
ELEMENTS_PER_CHUNK = {"cpu": 16384, "cuda": 4096}


def _fwd_by_reference(x_pred: Tensor, x: Tensor, t: Tensor, t_eps: float) -> Tensor:
    return flow_matching_loss_ref(x_pred, x, t, t_eps=t_eps)


_fwd = torch.library.custom_op("pixelgen::flow_matching_loss_fwd", _fwd_by_reference, mutates_args=())
_bwd = torch.library.custom_op(
    "pixelgen::flow_matching_loss_bwd", flow_matching_loss_bwd_ref, mutates_args=()
)


def _shared_arguments(x_pred: Tensor, x: Tensor, t: Tensor, t_eps: float) -> dict[str, int | float]:
    """What forward and backward both pass on."""
    B, T, D = x_pred.shape
    strides_of = {"x_pred": x_pred.stride(), "x": x.stride()}
    if all(stride[1] == D * stride[2] for stride in strides_of.values()):
        T, D = 1, T * D  # evenly spaced: one long token
    strides = {
        f"{name}_stride_{letter}": stride
        for name, of_tensor in strides_of.items()
        for letter, stride in zip("btd", of_tensor, strict=True)
    }
    return {
        "x_pred": address(x_pred),
        "x": address(x),
        "t": address(t),
        "elements_per_chunk": ELEMENTS_PER_CHUNK[x_pred.device.type],
        "B": B,
        "T": T,
        "D": D,
        **strides,
        "t_stride": t.stride(0),
        "t_eps": t_eps,
        "x_pred_dtype": dtype_tag(x_pred),
        "x_dtype": dtype_tag(x),
        "t_dtype": dtype_tag(t),
        **launch(x_pred),
    }


def _compiled_fwd(x_pred: Tensor, x: Tensor, t: Tensor, t_eps: float) -> Tensor:
    stats = stats_dtype(x_pred, x)
    if x_pred.is_cuda and stats == torch.float64:  # not worth compiled code on a GPU
        return _fwd_by_reference(x_pred, x, t, t_eps)
    B, T, D = x_pred.shape
    loss = x_pred.new_empty(B, dtype=stats)
    if x_pred.numel() > 0:
        chunks = -(-T * D // ELEMENTS_PER_CHUNK[x_pred.device.type])
        partials = x_pred.new_empty((B, chunks), dtype=stats)
        shared = _shared_arguments(x_pred, x, t, t_eps)
        _C.flow_matching_loss_fwd(loss=address(loss), partials=address(partials), **shared)
    return loss


def _compiled_bwd(grad_loss: Tensor, x_pred: Tensor, x: Tensor, t: Tensor, t_eps: float) -> Tensor:
    if x_pred.is_cuda and stats_dtype(x_pred, x) == torch.float64:
        return flow_matching_loss_bwd_ref(grad_loss, x_pred, x, t, t_eps)
    grad_x_pred = x_pred.new_empty(x_pred.shape)
    if x_pred.numel() > 0:
        _C.flow_matching_loss_bwd(
            grad_loss=address(grad_loss),
            grad_loss_stride=grad_loss.stride(0),
            grad_loss_dtype=dtype_tag(grad_loss),
            grad_x_pred=address(grad_x_pred),
            **_shared_arguments(x_pred, x, t, t_eps),
        )
    return grad_x_pred


for _device in ("cpu", "cuda") if has_cuda() else ("cpu",):
    _fwd.register_kernel(_device, _compiled_fwd)
    _bwd.register_kernel(_device, _compiled_bwd)


@_fwd.register_fake
def _(x_pred, x, t, t_eps):
    return x_pred.new_empty(x_pred.shape[0], dtype=stats_dtype(x_pred, x))


@_bwd.register_fake
def _(grad_loss, x_pred, x, t, t_eps):
    return x_pred.new_empty(x_pred.shape)


def _setup_context(ctx, inputs, output):
    x_pred, x, t, ctx.t_eps = inputs
    ctx.save_for_backward(x_pred, x, t)


def _backward(ctx, grad_loss):
    return _bwd(grad_loss, *ctx.saved_tensors, ctx.t_eps), None, None, None


_differentiable_fwd = register_autograd(_fwd, _backward, _setup_context)
refuse_double_backward(_bwd, "flow_matching_loss")


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
    check_float_tensors(op, x_pred=x_pred, x=x, t=t)
    check_ndim(op, "x_pred", x_pred, "B, T, D")
    check_shape(op, "x", x, x_pred.shape, "B, T, D")
    check_shape(op, "t", t, x_pred.shape[:1], "B,")
    check_positive(op, "t_eps", t_eps)
    if x_pred.shape[1] * x_pred.shape[2] == 0:
        raise ValueError(f"{op}: x_pred must have T >= 1 and D >= 1, got {tuple(x_pred.shape)}")
    return _differentiable_fwd(x_pred, x.detach(), t.detach(), t_eps)
