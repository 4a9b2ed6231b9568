import op_testing
import pytest
import torch
from pixelgen_kernels.ops.cosine_distance import cosine_distance, cosine_distance_ref

BOTH = ["pred", "target"]


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    pred = op_testing.draw(*shape, dtype=dtype, device=device, seed=1)
    target = op_testing.draw(*shape, dtype=dtype, device=device, seed=2) + pred
    return {"pred": pred, "target": target}


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("name", BOTH)
def test_a_gradient_that_is_not_wanted_is_not_computed(name, device):
    inputs = make_inputs((2, 5, 8), device=device)
    _, both = op_testing.run(cosine_distance, inputs, BOTH)
    _, one = op_testing.run(cosine_distance, inputs, [name])
    assert torch.equal(one[name], both[name])
    _, statistics = torch.ops.pixelgen.cosine_distance_fwd(**inputs, eps=1e-8)
    wanted = [key == name for key in BOTH]
    ones = torch.ones(2, device=device)
    bwd = torch.ops.pixelgen.cosine_distance_bwd
    sizes = [grad.numel() for grad in bwd(ones, *inputs.values(), statistics, 1e-8, *wanted)]
    assert sizes == [80 if key == name else 0 for key in BOTH]


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_expanded_tensors(device):
    """Strides of 0: one target for all samples, and the gradient of a sum."""
    inputs = make_inputs((3, 4, 16), device=device)
    inputs["target"] = inputs["target"][:1].expand(3, 4, 16)
    pred = inputs["pred"].requires_grad_()
    grads = [
        torch.autograd.grad(fn(**inputs).sum(), pred)[0] for fn in (cosine_distance, cosine_distance_ref)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", op_testing.DEVICES)
def test_nan_and_infinity_stay_in_their_token(device):
    inputs = make_inputs((5, 5, 16), device=device)
    clean = cosine_distance(**inputs)
    inputs["pred"][1, 2, 3], inputs["target"][2, 0, 0] = torch.nan, torch.nan
    inputs["pred"][3, 4, 1], inputs["target"][4, 1, 15] = torch.inf, -torch.inf
    distance, grads = op_testing.run(cosine_distance, inputs, BOTH)
    assert distance[0][0] == clean[0]
    assert distance[0][1:].isnan().all()
    for grad in grads.values():
        spoilt = (~grad.isfinite()).any(2).nonzero().tolist()
        assert spoilt == [[1, 2], [2, 0], [3, 4], [4, 1]]


@pytest.mark.parametrize("scale", [1.0, 1e-10])  # the second one has norms below eps
def test_is_one_minus_cosine_similarity(scale):
    inputs = op_testing.in_float64(make_inputs((3, 5, 8)))
    inputs["pred"] *= scale

    def expected(pred, target):
        return 1 - torch.nn.functional.cosine_similarity(pred, target, dim=-1, eps=1e-8).mean(1)

    torch.testing.assert_close(cosine_distance(**inputs), expected(**inputs).double())
    if scale == 1:
        _, grads = op_testing.run(cosine_distance, inputs, BOTH)
        _, expected_grads = op_testing.run(
            lambda pred, target: 1 - torch.nn.functional.cosine_similarity(pred, target, dim=-1).mean(1),
            inputs,
            BOTH,
        )
        torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("fn", [cosine_distance, cosine_distance_ref])
def test_zero_tokens_have_distance_one_and_no_gradient(fn):
    inputs = make_inputs((2, 2, 4))
    inputs["pred"][0] = 0
    inputs["target"][1, 0] = 0
    (distance,), grads = op_testing.run(fn, inputs, BOTH)
    assert distance[0] == 1
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["pred"][0].any()
    assert not grads["target"][1, 0].any()
    assert grads["target"][1, 1].any()


def test_norms_below_eps_have_the_gradient_of_a_constant_norm():
    inputs = op_testing.in_float64(make_inputs((2, 3, 4)))
    inputs["pred"] *= 1e-3
    _, grads = op_testing.run(lambda **kw: cosine_distance(**kw, eps=1.0), inputs, BOTH)
    _, expected = op_testing.run(lambda **kw: cosine_distance_ref(**kw, eps=1.0), inputs, BOTH)
    torch.testing.assert_close(grads, expected)
    assert grads["pred"].abs().max() < 1


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "cosine_distance: pred must be a tensor, got NoneType", {"pred": None}),
        (
            TypeError,
            "cosine_distance: target must be float32.*, got torch.int64",
            {"target": torch.zeros(2, 3, 4).long()},
        ),
        (
            ValueError,
            r"cosine_distance: pred must have shape \(B, T, D\), got \(2, 4\)",
            {"pred": torch.ones(2, 4)},
        ),
        (
            ValueError,
            r"target must have shape \(B, T, D\) = \(2, 3, 4\), got \(1, 3, 4\)",
            {"target": torch.ones(1, 3, 4)},
        ),
        (ValueError, "eps must be a finite number above 0, got -1", {"eps": -1}),
        (ValueError, "target must be on the device of pred", {"target": torch.ones(2, 3, 4, device="meta")}),
        (ValueError, "T >= 1 and D >= 1", {"pred": torch.ones(2, 3, 0), "target": torch.ones(2, 3, 0)}),
    ],
)
def test_errors(error, match, changes):
    op_testing.check_refuses(cosine_distance, make_inputs((2, 3, 4)), error, match, **changes)
