import itertools

import op_testing
import pytest
import torch
from pixelgen_kernels.cosine_distance import _bwd, _fwd, cosine_distance, cosine_distance_ref

# the smallest in several samples: eager may have one number exactly right by chance
SHAPES = [(9, 1, 1), (3, 7, 13), (2, 256, 768), (0, 4, 12)]
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


LAYOUTS = {
    "dense": lambda x: x,
    "chunk": op_testing.as_chunk,
    "without prefix": lambda x: op_testing.as_chunk(x, dim=1),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": op_testing.transposed,
    "every other": lambda x: torch.stack((x, x.new_full(x.shape, torch.nan)), -1).flatten(2)[..., ::2],
    "odd address": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 7, 13), (2, 24, 384), (2, 3, 1030)])
def test_layouts_and_mixed_dtypes(shape, layout, device):
    dtypes = (*op_testing.DTYPES, torch.float64)
    for i, (dtype, target_dtype) in enumerate(itertools.product(dtypes, dtypes)):
        inputs = make_inputs(shape, dtype, device)
        inputs["pred"] = LAYOUTS[layout](inputs["pred"])
        inputs["target"] = LAYOUTS[layout if i % 2 else "dense"](inputs["target"].to(target_dtype))
        if torch.float64 not in (dtype, target_dtype):
            op_testing.check_accuracy(cosine_distance, cosine_distance_ref, inputs, BOTH)
        else:  # the reference is no oracle here
            actual = op_testing.run(cosine_distance, inputs, BOTH)
            torch.testing.assert_close(actual, op_testing.run(cosine_distance_ref, inputs, BOTH))


@pytest.mark.parametrize("device", op_testing.DEVICES)
@pytest.mark.parametrize("name", BOTH)
def test_a_gradient_that_is_not_wanted_is_not_computed(name, device):
    inputs = make_inputs((2, 5, 8), device=device)
    _, both = op_testing.run(cosine_distance, inputs, BOTH)
    _, one = op_testing.run(cosine_distance, inputs, [name])
    assert torch.equal(one[name], both[name])
    _, statistics = _fwd(**inputs, eps=1e-8)
    wanted = [key == name for key in BOTH]
    ones = torch.ones(2, device=device)
    sizes = [grad.numel() for grad in _bwd(ones, *inputs.values(), statistics, 1e-8, *wanted)]
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


def test_bits_do_not_depend_on_the_thread_count():
    inputs = make_inputs((3, 50, 768))  # several chunks, the last one shorter
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(op_testing.run(cosine_distance, inputs, BOTH))
    finally:
        torch.set_num_threads(threads)
    for (distance,), grads in results[1:]:
        assert torch.equal(distance, results[0][0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in BOTH)


def test_outputs_are_fresh():
    op_testing.check_no_alias(cosine_distance, make_inputs((2, 3, 4)))


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
    bf16 = make_inputs((2, 3, 5), torch.bfloat16)
    strided = {name: op_testing.transposed(tensor) for name, tensor in make_inputs((2, 3, 5)).items()}
    for inputs in (bf16, strided):
        _, statistics = _fwd(**inputs, eps=1e-8)
        for wanted in itertools.product((False, True), repeat=2):
            op_testing.check_opcheck(_bwd, torch.ones(2), *inputs.values(), statistics, 1e-8, *wanted)


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
