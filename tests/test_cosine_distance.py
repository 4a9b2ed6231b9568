import op_testing
import pytest
import torch
from pixelgen_kernels.cosine_distance import _bwd, _fwd, cosine_distance, cosine_distance_ref

SHAPES = [(1, 1, 1), (3, 7, 13), (2, 256, 768), (0, 4, 12)]
BOTH = ["pred", "target"]


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    pred = op_testing.draw(*shape, dtype=dtype, device=device, seed=1)
    target = op_testing.draw(*shape, dtype=dtype, device=device, seed=2) + pred
    return {"pred": pred, "target": target}


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("dtype", op_testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, dtype, device):
    inputs = make_inputs(shape, dtype, device)
    op_testing.check_accuracy(cosine_distance, cosine_distance_ref, inputs, BOTH)
    chunked = {name: op_testing.as_chunk(tensor) for name, tensor in inputs.items()}
    op_testing.check_accuracy(cosine_distance, cosine_distance_ref, chunked, BOTH)


def test_mixed_dtypes():
    inputs = make_inputs((2, 5, 8))
    inputs["pred"] = inputs["pred"].bfloat16()
    op_testing.check_accuracy(cosine_distance, cosine_distance_ref, inputs, BOTH)


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


def test_opcheck():
    inputs = make_inputs((2, 3, 5))
    op_testing.check_opcheck(_fwd, inputs["pred"].requires_grad_(), inputs["target"].requires_grad_(), 1e-8)
    inputs = make_inputs((2, 3, 5), torch.bfloat16)
    op_testing.check_opcheck(_bwd, torch.ones(2), inputs["pred"], inputs["target"], 1e-8)
    inputs = {name: op_testing.transposed(tensor) for name, tensor in make_inputs((2, 3, 5)).items()}
    op_testing.check_opcheck(_bwd, torch.ones(2), inputs["pred"], inputs["target"], 1e-8)


def test_gradcheck():
    op_testing.check_gradcheck(cosine_distance, make_inputs((3, 2, 5)), BOTH)


def test_compile():
    op_testing.check_compiles(cosine_distance, make_inputs((3, 2, 5)), BOTH)


def test_double_backward_is_refused():
    op_testing.check_double_backward_refused(cosine_distance, make_inputs((3, 2, 5)), BOTH)


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
