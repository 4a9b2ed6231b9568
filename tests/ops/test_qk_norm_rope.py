import pytest
import torch
from op_testing import DEVICES, DTYPES, check_accuracy, check_refuses, draw, in_float64, inputs_of
from pixelgen_kernels.cases import transposed
from pixelgen_kernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

GRADS = ["qkv", "q_weight", "k_weight"]


def make(*shape, **options):
    """For a shape (B, T, N, D, in-context tokens)."""
    return inputs_of("qk_norm_rope", *shape, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotated", [True, False])
def test_strided_weights_and_angles_of_qk_norm_rope(rotated, device):
    inputs = make(2, 7, 3, 6, 3, device=device, rotated=rotated)
    for name in inputs.keys() & {"q_weight", "k_weight", "cos", "sin"}:
        inputs[name] = torch.stack((inputs[name], inputs[name] * float("nan")), -1)[..., 0]
    check_accuracy(qk_norm_rope, qk_norm_rope_ref, inputs, GRADS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(1, 5, 16, 72, 4), (3, 5, 9, 64, 0), (1, 3, 2, 200, 1), (2, 37, 1, 32, 10)]
)
def test_more_tiles_of_qk_norm_rope(shape, device):
    """Of Triton: several of tokens and of heads, some with tokens of two images or with fewer heads."""
    check_accuracy(qk_norm_rope, qk_norm_rope_ref, make(*shape, device=device), GRADS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_attention_for_qk_norm_rope(dtype, device):
    """With tokens in front of heads, or expanded."""
    inputs = make(2, 5, 3, 8, 2, dtype=dtype, device=device)
    leaves = [inputs[name].requires_grad_() for name in GRADS]
    grad = draw(2, 3, 5, 8, dtype=dtype, device=device, seed=5)
    grads = [transposed(grad, 1, 2), grad[:, :, :1].expand_as(grad), grad[:1, :1, :1, :1].expand_as(grad)]
    actual, expected = (
        torch.autograd.grad(fn(**inputs), leaves, grads) for fn in (qk_norm_rope, qk_norm_rope_ref)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    """Zeros, and numbers in the last image."""
    inputs = make(1, 288, 16, 72, 32, dtype=torch.bfloat16, device="cuda")
    qkv = inputs["qkv"].new_zeros(2160, 288, 3 * 16 * 72)
    qkv[-1:] = inputs["qkv"]
    leaves = [qkv.requires_grad_(), *(inputs[name].requires_grad_() for name in GRADS[1:])]
    outputs = qk_norm_rope(**{**inputs, "qkv": qkv})
    grads_out = [torch.zeros_like(output) for output in outputs]
    for index, grad in enumerate(grads_out):
        grad[-1] = draw(16, 288, 72, dtype=torch.bfloat16, device="cuda", seed=5 + index)
    grads = torch.autograd.grad(outputs, leaves, grads_out)

    leaves[0] = inputs["qkv"].requires_grad_()
    expected = qk_norm_rope_ref(**inputs)
    expected_grads = torch.autograd.grad(expected, leaves, [grad[-1:] for grad in grads_out])
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual[-1:], wanted)
        assert not actual[:-1].any()
    torch.testing.assert_close((grads[0][-1:], *grads[1:]), expected_grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token", [1, 4])
def test_non_finite_values_stay_in_their_head_of_qk_norm_rope(token, dtype, device):
    """Of tokens that are rotated, and of those that are not."""
    inputs = make(1, 6, 3, 16, 2, dtype=dtype, device=device)
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs["qkv"][0, token, 16 + 5] = value  # q of head 1
        for actual, expected in zip(qk_norm_rope(**inputs), qk_norm_rope_ref(**inputs), strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.isinf(), expected.isinf())
            assert actual.isfinite().sum() >= actual.numel() - 16


def test_against_complex_rotation_and_torch_rms_norm():
    B, T, N, D, prefix = 2, 9, 3, 8, 2
    inputs = in_float64(make(B, T, N, D, prefix))
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


def test_errors():
    wide, swapped = torch.ones(1, 1, 3 * 2 * 258), torch.ones(2, 36, 5).transpose(1, 2)
    refused = {
        "TypeError: qkv must be float32 ... got torch.int32": {"qkv": torch.ones(2, 5, 36).int()},
        "ValueError: qkv must have shape (B, T, 3 N D), got (5, 36)": {"qkv": torch.ones(5, 36)},
        "ValueError: with N = 5 and 1 <= D <= 256, got (2, 5, 36)": {"num_heads": 5},
        "ValueError: 1 <= D <= 256": {"qkv": wide},
        "ValueError: num_heads must be between 1 and": {"num_heads": 0},
        "TypeError: num_heads must be an int, got float": {"num_heads": 2.0},
        "ValueError: qkv must be contiguous in its last dimension": {"qkv": swapped},
        "ValueError: q_weight must have shape (D,) = (6,), got (12,)": {"q_weight": torch.ones(12)},
        "ValueError: k_weight must have shape (D,) = (6,), got (4,)": {"k_weight": torch.ones(4)},
        "ValueError: cos must be given when sin is": {"cos": None},
        "ValueError: sin must be given when cos is": {"sin": None},
        "ValueError: cos must have shape ... = (3, 3), got (4, 3)": {"num_prefix_tokens": 2},
        "ValueError: sin must have shape ... = (4, 3), got (4, 6)": {"sin": torch.ones(4, 6)},
        "ValueError: num_prefix_tokens must be between 0 and 5, got 6": {"num_prefix_tokens": 6},
        "ValueError: eps must be a finite number above 0": {"eps": float("nan")},
        "ValueError: sin must be on the device of qkv": {"sin": torch.ones(4, 3, device="meta")},
    }
    check_refuses(qk_norm_rope, make(2, 5, 2, 6, 1), refused)
    odd = {"qkv": torch.ones(2, 5, 2 * 3 * 5), "q_weight": torch.ones(5), "k_weight": torch.ones(5)}
    refused = {"ValueError: even head dimension to be rotated, got D = 5": odd}
    check_refuses(qk_norm_rope, make(2, 5, 2, 6, 1), refused)
