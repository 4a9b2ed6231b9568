"""The Triton kernels of swiglu under the interpreter, in a process of their own."""

import op_testing
import pytest
import torch
from pixelgen_kernels.cases import LAYOUTS, chunk, transposed
from pixelgen_kernels.ops import swiglu_triton as kernels
from pixelgen_kernels.ops.swiglu import swiglu_bwd_ref, swiglu_ref


def check(x, grad_y):
    assert_close = torch.testing.assert_close
    # the interpreter truncates to bfloat16 instead of rounding: one ulp
    tolerance = {"rtol": 2**-7, "atol": 1e-30} if x.dtype == torch.bfloat16 else {}
    y, grad_x = kernels.launch_swiglu_fwd(x), kernels.launch_swiglu_bwd(grad_y, x)
    assert y.is_contiguous()
    assert grad_x.is_contiguous()
    assert_close(y, swiglu_ref(x), **tolerance)
    assert_close(grad_x, swiglu_bwd_ref(grad_y, x), **tolerance)


@pytest.mark.parametrize("dtype", [*op_testing.DTYPES, torch.float64])
@pytest.mark.parametrize("layout", ["dense", "chunk", "odd address", "chunk of tokens", "transposed"])
def test_layouts(layout, dtype):
    x = LAYOUTS[layout](op_testing.draw(3, 5, 26, dtype=dtype, seed=1))
    check(x, LAYOUTS[layout](op_testing.draw(3, 5, 13, dtype=dtype, seed=2)))


@pytest.mark.parametrize("shape", [(2,), (6,), (7, 10), (2, 3, 4, 10), (2, 2, 2050), (513, 8)])
def test_shapes(shape):
    x = op_testing.draw(*shape, seed=1)
    check(x, op_testing.draw(*shape[:-1], shape[-1] // 2, seed=2))


def test_four_dimensions_with_strides():
    sliced = op_testing.draw(2, 5, 3, 10, seed=1)[:, :1]
    check(sliced, op_testing.draw(2, 1, 3, 5, seed=2))
    x = chunk(op_testing.draw(2, 3, 4, 10, seed=1))
    check(x, transposed(op_testing.draw(2, 3, 4, 5, seed=2)))


def test_expanded_gradient():
    check(op_testing.draw(3, 4, 10), torch.ones(()).expand(3, 4, 5))


def test_large_values():
    x = torch.tensor([[-200.0, 200.0, 3.0, -5.0]])
    check(x, torch.ones(1, 2))
    assert kernels.launch_swiglu_fwd(x).isfinite().all()
