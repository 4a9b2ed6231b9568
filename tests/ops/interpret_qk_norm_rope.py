"""The Triton kernels of qk_norm_rope under the interpreter, in a process of their own."""

import op_testing
import pytest
import torch
from pixelgen_kernels.cases import LAYOUTS, chunk, transposed
from pixelgen_kernels.ops import qk_norm_rope_triton as kernels
from pixelgen_kernels.ops.qk_norm_rope import qk_norm_rope_bwd_ref, qk_norm_rope_ref

# B, T, N, D, in-context tokens
SHAPES = [
    (1, 1, 1, 2, 0),
    (2, 7, 3, 6, 3),
    (1, 5, 16, 72, 4),  # several programs of tokens and of heads
    (3, 5, 9, 64, 0),  # programs that own tokens of two images, and fewer heads than others
    (1, 3, 2, 200, 1),
    (2, 37, 1, 32, 10),
    (2, 3, 1, 4, 3),  # no token is rotated
]


def make_arguments(B, T, N, D, prefix, dtype=torch.float32, rope=True):
    qkv = op_testing.draw(B, T, 3 * N * D, dtype=dtype, seed=1)
    weights = [1 + 0.3 * op_testing.draw(D, seed=seed) for seed in (2, 3)]
    angle = 3 * op_testing.draw(T - prefix, D // 2, seed=4)
    return [qkv, *weights, *((angle.cos(), angle.sin()) if rope else (None, None))], (N, prefix, 1e-5)


def draw_grads(qkv, N):
    B, T, channels = qkv.shape
    return [op_testing.draw(B, N, T, channels // (3 * N), dtype=qkv.dtype, seed=seed) for seed in (5, 6, 7)]


def check(tensors, settings, grads):
    N, prefix, eps = settings
    # the interpreter truncates to bfloat16 instead of rounding: one ulp
    tolerance = {"rtol": 2**-7, "atol": 1e-30} if tensors[0].dtype == torch.bfloat16 else {}
    outputs = kernels.launch_qk_norm_rope_fwd(*tensors, *settings)
    expected = qk_norm_rope_ref(*tensors, num_heads=N, num_prefix_tokens=prefix, eps=eps)
    torch.testing.assert_close(outputs, expected, **tolerance)
    assert torch.equal(outputs[2], expected[2])
    grad_qkv, *grad_weights = kernels.launch_qk_norm_rope_bwd(*grads, *tensors, *settings)
    eager_grad_qkv, *eager = qk_norm_rope_bwd_ref(*grads, *tensors, *settings)
    torch.testing.assert_close(grad_qkv, eager_grad_qkv, **tolerance)
    doubles = [None if tensor is None else tensor.double() for tensor in (*grads, *tensors)]
    oracle = qk_norm_rope_bwd_ref(*doubles, *settings)[1:]
    for actual, expected_grad, exact in zip(grad_weights, eager, oracle, strict=True):
        op_testing.assert_as_accurate(actual, expected_grad, exact, name="gradient of a weight")
    assert all(tensor.is_contiguous() for tensor in (*outputs, grad_qkv, *grad_weights))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    tensors, settings = make_arguments(*shape)
    check(tensors, settings, draw_grads(tensors[0], settings[0]))


@pytest.mark.parametrize("dtype", [*op_testing.DTYPES, torch.float64])
@pytest.mark.parametrize("layout", ["dense", "chunk", "odd address", "chunk of tokens", "transposed"])
def test_layouts_of_qkv(layout, dtype):
    tensors, settings = make_arguments(2, 7, 3, 6, 3, dtype)
    tensors[0] = LAYOUTS[layout](tensors[0])
    check(tensors, settings, draw_grads(tensors[0], settings[0]))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_gradients(dtype, which):
    """As attention gives them, tokens in front of heads, and expanded ones."""
    tensors, settings = make_arguments(2, 5, 3, 8, 2, dtype)
    base = draw_grads(tensors[0], settings[0])[0]
    layouts = [
        transposed(base, 1, 2),
        transposed(base, 2, 3),
        base[:1, :1, :1, :1].expand_as(base),
        base[:, :, :1].expand_as(base),
        chunk(base),
    ]
    check(tensors, settings, [layouts[which], *layouts[which + 1 : which + 3]])


@pytest.mark.parametrize("used", range(1, 7))
def test_gradients_that_are_none(used):
    """Of outputs that nothing used."""
    tensors, settings = make_arguments(2, 5, 3, 8, 2)
    grads = draw_grads(tensors[0], settings[0])
    check(tensors, settings, [grad if used >> i & 1 else None for i, grad in enumerate(grads)])


def test_strided_tables():
    tensors, settings = make_arguments(2, 5, 3, 8, 2)
    tables = [torch.stack((table, table * float("nan")), -1)[..., 0] for table in tensors[1:]]
    check([tensors[0], *tables], settings, draw_grads(tensors[0], settings[0]))


@pytest.mark.parametrize("D", [1, 3, 7, 8])
def test_without_rotation(D):
    tensors, settings = make_arguments(2, 5, 3, D, 0, rope=False)
    check(tensors, settings, draw_grads(tensors[0], settings[0]))


@pytest.mark.parametrize("dtype", [*op_testing.DTYPES, torch.float64])
def test_mixed_dtypes(dtype):
    tensors, settings = make_arguments(1, 3, 2, 6, 1, dtype)
    for other in (torch.bfloat16, torch.float16, torch.float64):
        if (dtype, other) == (torch.float64, torch.bfloat16):
            continue  # the interpreter cannot store float64 as bfloat16
        mixed = [tensors[0], tensors[1].to(other), tensors[2].half(), tensors[3].to(other), tensors[4]]
        check(mixed, settings, draw_grads(tensors[0], settings[0]))


def test_64_bit_rows(monkeypatch):
    """The arithmetic of more tokens than 32 bits count, on fewer."""
    counted = kernels._grid_and_constants

    def with_64_bits(*arguments):
        programs, constants = counted(*arguments)
        return programs, constants | {"INDEX": kernels.tl.int64}

    monkeypatch.setattr(kernels, "_grid_and_constants", with_64_bits)
    tensors, settings = make_arguments(2, 5, 3, 8, 2)
    check(tensors, settings, draw_grads(tensors[0], settings[0]))


def test_non_finite_values_stay_in_their_pair_of_an_unrotated_token():
    tensors, settings = make_arguments(1, 4, 2, 8, 2)
    tensors[0][0, 1, 3] = float("inf")
    for actual, expected in zip(
        kernels.launch_qk_norm_rope_fwd(*tensors, *settings),
        qk_norm_rope_ref(*tensors, num_heads=2, num_prefix_tokens=2, eps=1e-5),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, equal_nan=True)
