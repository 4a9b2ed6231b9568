import op_testing
import pytest
import torch
from pixelgen_kernels.ops.swiglu import swiglu, swiglu_ref

SPECIAL = [0.0, -0.0, 1e-30, 20.0, -20.0, 88.5, -88.5, 104.0, -104.0, 1e4, -1e4, 1e30, -1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_accuracy_in_the_whole_range(dtype):
    """Also where y is tiny: a sigmoid that lost its relative accuracy would pass `test_accuracy`."""
    a = torch.linspace(-87, 89, 2**16 + 1, dtype=dtype)
    x = torch.stack((a, torch.ones_like(a)), -1)
    oracle = torch.nn.functional.silu(a.double())
    ours, eager = (
        ((fn(x)[:, 0].double() - oracle) / oracle).nan_to_num().abs().max().item()
        for fn in (swiglu, swiglu_ref)
    )
    assert ours <= 2 * eager + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [*op_testing.DTYPES, torch.float64])
def test_special_values(dtype):
    """Large and non-finite values, in a vector of them and in the rest of a row, as in eager."""
    values = torch.tensor([*SPECIAL, float("inf"), float("-inf"), float("nan")]).to(dtype)
    for a in (values, values[:, None], values.repeat(5)):
        x = torch.cat((a, torch.full_like(a, 0.5)), -1)
        outputs, grads = op_testing.run(swiglu, {"x": x}, ["x"])
        expected, expected_grads = op_testing.run(swiglu_ref, {"x": x}, ["x"])
        torch.testing.assert_close(outputs, expected, equal_nan=True)
        torch.testing.assert_close(grads, expected_grads, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*op_testing.DTYPES, torch.float64])
def test_expanded_gradient_on_the_gpu(dtype):
    x = op_testing.draw(3, 7, 26, dtype=dtype, device="cuda").requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(x).sum(), x)
    (expected,) = torch.autograd.grad(swiglu_ref(x).sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    x = torch.zeros(2**18 + 1, 2**13, dtype=torch.bfloat16, device="cuda")
    x[-1] = op_testing.draw(2**13, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(swiglu(x)[-1], swiglu_ref(x[-1]))


def test_is_silu_of_the_first_half_times_the_second():
    x = op_testing.draw(3, 10, dtype=torch.float64)
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(x[:, :5]) * x[:, 5:])


@pytest.mark.parametrize(
    ("error", "match", "x"),
    [
        (TypeError, "swiglu: x must be a tensor, got list", [1.0, 2.0]),
        (TypeError, "swiglu: x must be float32.*, got torch.int64", torch.ones(2, 4).long()),
        (ValueError, r"swiglu: x must have shape \(..., 2 F\) with F >= 1, got \(2, 5\)", torch.ones(2, 5)),
        (ValueError, r"with F >= 1, got \(2, 0\)", torch.ones(2, 0)),
        (ValueError, r"with F >= 1, got \(\)", torch.ones(())),
        (ValueError, "contiguous in its last dimension, got strides", torch.ones(4, 2).T),
        (ValueError, "all but the last two dimensions as one", torch.ones(3, 2, 2, 4).transpose(0, 1)),
    ],
)
def test_errors(error, match, x):
    op_testing.check_refuses(swiglu, {"x": x}, error, match)


def test_triton_kernels_under_the_interpreter():
    op_testing.run_interpreted("interpret_swiglu.py")


@pytest.mark.parametrize(("kind", "load"), [("bf16", "v4.b32"), ("fp32", "v4.b32"), ("fp64", "v2.b64")])
def test_triton_kernels_compile_for_sm_90(kind, load):
    pytest.importorskip("triton", reason="needs triton")
    import triton.language as tl
    from pixelgen_kernels.ops.swiglu_triton import _swiglu_bwd_kernel, _swiglu_fwd_kernel

    constexprs = {"DTYPE": tl.float64 if kind == "fp64" else tl.float32, "BLOCK_ROWS": 2, "BLOCK_F": 1024}
    sizes = ("num_rows", "inner", "F", "x_outer_stride", "x_inner_stride")
    fwd = dict.fromkeys(("x_ptr", "y_ptr"), f"*{kind}") | dict.fromkeys(sizes, "i32")
    bwd = dict.fromkeys(("grad_y_ptr", "x_ptr", "grad_x_ptr"), f"*{kind}") | dict.fromkeys(sizes, "i32")
    bwd |= dict.fromkeys(("grad_y_outer_stride", "grad_y_inner_stride"), "i64")
    # at a launch, Triton makes constants of strides of 1
    cases = [
        (_swiglu_fwd_kernel, fwd, constexprs),
        (_swiglu_bwd_kernel, bwd, constexprs | {"grad_y_col_stride": 1}),
    ]
    for kernel, signature, constants in cases:
        ptx = op_testing.compile_to_ptx(kernel, signature, constants)
        assert ".target sm_90" in ptx
        assert f"ld.global.{load}" in ptx, "loads of 128 bits"
        assert f"st.global.{load}" in ptx, "stores of 128 bits"
        assert ".local" not in ptx, "spills to local memory"
