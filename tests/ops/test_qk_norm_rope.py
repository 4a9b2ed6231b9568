import itertools

import op_testing
import pytest
import torch
from pixelgen_kernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

GRADS = ["qkv", "q_weight", "k_weight"]


def make_inputs(B, T, N, D, prefix, dtype=torch.float32, device="cpu", rope=True):
    inputs = {
        "qkv": op_testing.draw(B, T, 3 * N * D, dtype=dtype, device=device, seed=1),
        "q_weight": 1 + 0.3 * op_testing.draw(D, device=device, seed=2),
        "k_weight": 1 + 0.3 * op_testing.draw(D, device=device, seed=3),
        "num_heads": N,
    }
    if rope:
        angle = 3 * op_testing.draw(T - prefix, D // 2, device=device, seed=4)
        inputs |= {"cos": angle.cos(), "sin": angle.sin(), "num_prefix_tokens": prefix}
    return inputs


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("rope", [True, False])
def test_mixed_dtypes(rope, device):
    """Weights and angles may have any dtype, whatever that of qkv, and any strides."""
    for dtypes in itertools.product((*op_testing.DTYPES, torch.float64), repeat=2):
        inputs = make_inputs(2, 7, 3, 6, 3, dtypes[0], device, rope=rope)
        for name in inputs.keys() & {"q_weight", "k_weight", "cos", "sin"}:
            values = inputs[name].to(torch.bfloat16 if name in ("k_weight", "sin") else dtypes[1])
            inputs[name] = torch.stack((values, values * float("nan")), -1)[..., 0]
        outputs, grads = op_testing.run(qk_norm_rope, inputs, GRADS)
        expected, expected_grads = op_testing.run(qk_norm_rope_ref, inputs, GRADS)
        torch.testing.assert_close(outputs, expected)
        for name in GRADS:
            assert grads[name].dtype == inputs[name].dtype
            # fp64 gradients of fp32 arithmetic have its accuracy
            coarse = torch.float32 if dtypes[0] != torch.float64 else inputs[name].dtype
            actual, wanted = grads[name], expected_grads[name]
            if actual.dtype == torch.float64:
                actual, wanted = actual.to(coarse), wanted.to(coarse)
            torch.testing.assert_close(actual, wanted)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    """Zeros, and numbers in the last image."""
    inputs = make_inputs(1, 288, 16, 72, 32, torch.bfloat16, "cuda")
    qkv = inputs["qkv"].new_zeros(2160, 288, 3 * 16 * 72)
    qkv[-1:] = inputs["qkv"]
    leaves = [qkv.requires_grad_(), *(inputs[name].requires_grad_() for name in GRADS[1:])]
    outputs = qk_norm_rope(**{**inputs, "qkv": qkv})
    grads_out = [torch.zeros_like(output) for output in outputs]
    for index, grad in enumerate(grads_out):
        grad[-1] = op_testing.draw(16, 288, 72, dtype=torch.bfloat16, device="cuda", seed=5 + index)
    grads = torch.autograd.grad(outputs, leaves, grads_out)

    leaves[0] = inputs["qkv"].requires_grad_()
    expected = qk_norm_rope_ref(**inputs)
    expected_grads = torch.autograd.grad(expected, leaves, [grad[-1:] for grad in grads_out])
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual[-1:], wanted)
        assert not actual[:-1].any()
    torch.testing.assert_close((grads[0][-1:], *grads[1:]), expected_grads)


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_same_bits_every_time(device):
    inputs = make_inputs(3, 37, 6, 72, 4, device=device)
    outputs, grads = op_testing.run(qk_norm_rope, inputs, GRADS)
    for _ in range(3):
        again, grads_again = op_testing.run(qk_norm_rope, inputs, GRADS)
        assert all(map(torch.equal, outputs, again))
        assert all(torch.equal(grads[name], grads_again[name]) for name in GRADS)


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("token", [1, 4])
def test_non_finite_values_stay_in_their_head(token, dtype, device):
    """Of tokens that are rotated, and of those that are not."""
    inputs = make_inputs(1, 6, 3, 16, 2, dtype, device)
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs["qkv"] = op_testing.draw(1, 6, 3 * 3 * 16, dtype=dtype, device=device, seed=1)
        inputs["qkv"][0, token, 16 + 5] = value  # q of head 1
        for actual, expected in zip(qk_norm_rope(**inputs), qk_norm_rope_ref(**inputs), strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.isinf(), expected.isinf())
            assert actual.isfinite().sum() >= actual.numel() - 16


def test_against_complex_rotation_and_torch_rms_norm():
    B, T, N, D, prefix = 2, 9, 3, 8, 2
    inputs = op_testing.in_float64(make_inputs(B, T, N, D, prefix))
    q, k, v = qk_norm_rope(**inputs, eps=1e-5)
    packed = inputs["qkv"].view(B, T, 3, N, D)
    turn = torch.complex(inputs["cos"], inputs["sin"])[:, None]
    for index, (actual, weight) in enumerate(((q, inputs["q_weight"]), (k, inputs["k_weight"]))):
        u = torch.nn.functional.rms_norm(packed[:, :, index], (D,), weight, 1e-5)
        rotated = torch.view_as_real(
            torch.view_as_complex(u[:, prefix:].unflatten(-1, (-1, 2))) * turn
        ).flatten(-2)
        expected = torch.cat((u[:, :prefix], rotated), 1).transpose(1, 2)
        torch.testing.assert_close(actual, expected)
    assert torch.equal(v, packed[:, :, 2].transpose(1, 2))


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (
            TypeError,
            "qk_norm_rope: qkv must be float32.*, got torch.int32",
            {"qkv": torch.ones(2, 5, 36).int()},
        ),
        (ValueError, r"qkv must have shape \(B, T, 3 N D\), got \(5, 36\)", {"qkv": torch.ones(5, 36)}),
        (ValueError, r"with N = 5 and 1 <= D <= 256, got \(2, 5, 36\)", {"num_heads": 5}),
        (ValueError, "1 <= D <= 256", {"qkv": torch.ones(1, 1, 3 * 2 * 258)}),
        (ValueError, "num_heads must be between 1 and", {"num_heads": 0}),
        (TypeError, "num_heads must be an int, got float", {"num_heads": 2.0}),
        (
            ValueError,
            "qkv must be contiguous in its last dimension",
            {"qkv": torch.ones(2, 36, 5).transpose(1, 2)},
        ),
        (ValueError, r"q_weight must have shape \(D,\) = \(6,\), got \(12,\)", {"q_weight": torch.ones(12)}),
        (ValueError, r"k_weight must have shape \(D,\) = \(6,\), got \(4,\)", {"k_weight": torch.ones(4)}),
        (ValueError, "cos must be given when sin is", {"cos": None}),
        (ValueError, "sin must be given when cos is", {"sin": None}),
        (ValueError, r"cos must have shape .* = \(3, 3\), got \(4, 3\)", {"num_prefix_tokens": 2}),
        (ValueError, r"sin must have shape .* = \(4, 3\), got \(4, 6\)", {"sin": torch.ones(4, 6)}),
        (ValueError, "num_prefix_tokens must be between 0 and 5, got 6", {"num_prefix_tokens": 6}),
        (ValueError, "eps must be a finite number above 0", {"eps": float("nan")}),
        (ValueError, "sin must be on the device of qkv", {"sin": torch.ones(4, 3, device="meta")}),
    ],
)
def test_errors(error, match, changes):
    op_testing.check_refuses(qk_norm_rope, make_inputs(2, 5, 2, 6, 1), error, match, **changes)


def test_odd_head_dimension_cannot_be_rotated():
    inputs = make_inputs(1, 4, 2, 5, 0)
    op_testing.check_refuses(qk_norm_rope, inputs, ValueError, "even head dimension to be rotated, got D = 5")


def test_triton_kernels_under_the_interpreter():
    op_testing.run_interpreted("interpret_qk_norm_rope.py")


@pytest.mark.parametrize("D", [64, 72])
@pytest.mark.parametrize(("kind", "vector"), [("bf16", "v4.b32"), ("fp32", "v4.b32"), ("fp64", "v2.b64")])
def test_triton_kernels_compile_for_sm_90(kind, vector, D):
    pytest.importorskip("triton", reason="needs triton")
    from pixelgen_kernels.ops import qk_norm_rope_triton as kernels

    qkv = torch.empty(1, 9, 3 * 16 * D, dtype={"bf16": torch.bfloat16, "fp64": torch.float64}.get(kind))
    _, constants = kernels._grid_and_constants(qkv, 16, 8, qkv, 1e-6, (D, 16 * D, *qkv.stride()[:2]))
    del constants["enable_fp_fusion"]  # an option of the launch
    pointers = {"q_weight_ptr": "*fp32", "k_weight_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    # compile_to_ptx takes signed numbers to be multiples of 16; strides in units are not
    sizes = dict.fromkeys(("num_tokens", "T", "num_prefix_tokens"), "i32")
    strides = dict.fromkeys(("qkv_batch_stride", "qkv_token_stride"), "u32")
    tensors = dict.fromkeys(("qkv_ptr", "q_ptr", "k_ptr", "v_ptr"), f"*{kind}")
    fwd = tensors | pointers | sizes | strides
    tensors = dict.fromkeys(("grad_q_ptr", "grad_k_ptr", "grad_v_ptr", "qkv_ptr", "grad_qkv_ptr"), f"*{kind}")
    tensors["partials_ptr"] = "*fp64" if kind == "fp64" else "*fp32"
    strides |= {f"grad_{name}_{dim}_stride": "u32" for name in "qkv" for dim in ("batch", "head", "token")}
    bwd = tensors | pointers | sizes | strides
    channels = {f"grad_{name}_channel_stride": 1 for name in "qkv"}  # what Triton makes of a stride of 1
    cases = [
        (kernels._qk_norm_rope_fwd_kernel, fwd, constants, 3),
        (kernels._qk_norm_rope_bwd_kernel, bwd, constants | channels, 5),
    ]
    for kernel, signature, constexprs, loads in cases:
        ptx = op_testing.compile_to_ptx(kernel, signature, constexprs)
        assert ".target sm_90" in ptx
        assert ptx.count(f"ld.global.{vector}") >= loads, "loads of 128 bits"
        assert f"st.global.{vector}" in ptx, "stores of 128 bits"
        assert ".local" not in ptx, "spills to local memory"
    sums = kernels._qk_norm_rope_bwd_sum_kernel
    tiles = {"D": D, "ROWS": kernels._SUM_ROWS, "COLUMNS": kernels._SUM_COLUMNS}
    results = {"grad_q_weight_ptr": "*fp32", "grad_k_weight_ptr": "*bf16"}
    signature = {"partials_ptr": tensors["partials_ptr"], "num_partials": "i32"} | results
    assert ".target sm_90" in op_testing.compile_to_ptx(sums, signature, tiles)
