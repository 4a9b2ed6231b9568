import pytest
import torch
from op_testing import DEVICES, check_refuses, in_float64, inputs_of, run
from pixelgen_kernels.ops.cosine_distance import cosine_distance, cosine_distance_ref

BOTH = ["pred", "target"]


def make(*shape, **options):
    return inputs_of("cosine_distance", *shape, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BOTH)
def test_a_gradient_that_is_not_wanted_is_not_computed(name, device):
    inputs = make(2, 5, 8, device=device)
    _, both = run(cosine_distance, inputs, BOTH)
    _, one = run(cosine_distance, inputs, [name])
    assert torch.equal(one[name], both[name])
    _, statistics = torch.ops.pixelgen.cosine_distance_fwd(**inputs, eps=1e-8)
    wanted = [key == name for key in BOTH]
    bwd = torch.ops.pixelgen.cosine_distance_bwd
    grads = bwd(torch.ones(2, device=device), *inputs.values(), statistics, 1e-8, *wanted)
    assert [grad.numel() for grad in grads] == [80 if key == name else 0 for key in BOTH]


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_stay_in_their_token(device):
    inputs = make(5, 5, 16, device=device)
    clean = cosine_distance(**inputs)
    inputs["pred"][1, 2, 3], inputs["target"][2, 0, 0] = torch.nan, torch.nan
    inputs["pred"][3, 4, 1], inputs["target"][4, 1, 15] = torch.inf, -torch.inf
    (distance,), grads = run(cosine_distance, inputs, BOTH)
    assert distance[0] == clean[0]
    assert distance[1:].isnan().all()
    for grad in grads.values():
        spoilt = (~grad.isfinite()).any(2).nonzero().tolist()
        assert spoilt == [[1, 2], [2, 0], [3, 4], [4, 1]]


def test_is_one_minus_cosine_similarity():
    def expected(pred, target):
        return 1 - torch.nn.functional.cosine_similarity(pred, target, dim=-1, eps=1e-8).mean(1)

    inputs = in_float64(make(3, 5, 8))
    torch.testing.assert_close(run(cosine_distance, inputs, BOTH), run(expected, inputs, BOTH))
    inputs["pred"] *= 1e-10  # norms below eps
    torch.testing.assert_close(cosine_distance(**inputs), expected(**inputs))


@pytest.mark.parametrize("fn", [cosine_distance, cosine_distance_ref])
def test_zero_tokens_have_distance_one_and_no_gradient(fn):
    inputs = make(2, 2, 4)
    inputs["pred"][0] = 0
    inputs["target"][1, 0] = 0
    (distance,), grads = run(fn, inputs, BOTH)
    assert distance[0] == 1
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["pred"][0].any()
    assert not grads["target"][1, 0].any()
    assert grads["target"][1, 1].any()


def test_norms_below_eps_have_the_gradient_of_a_constant_norm():
    inputs = in_float64(make(2, 3, 4)) | {"eps": 1.0}
    inputs["pred"] *= 1e-3
    _, grads = run(cosine_distance, inputs, BOTH)
    _, expected = run(cosine_distance_ref, inputs, BOTH)
    torch.testing.assert_close(grads, expected)
    assert grads["pred"].abs().max() < 1


def test_errors():
    empty, meta = torch.ones(2, 3, 0), torch.ones(2, 3, 4, device="meta")
    refused = {
        "TypeError: pred must be a tensor, got NoneType": {"pred": None},
        "TypeError: target must be float32 ... got torch.int64": {"target": torch.ones(2, 3, 4).long()},
        "ValueError: pred must have shape (B, T, D), got (2, 4)": {"pred": torch.ones(2, 4)},
        "ValueError: target must have shape (B, T, D) = (2, 3, 4), got (1, 3, 4)": {
            "target": torch.ones(1, 3, 4)
        },
        "ValueError: eps must be a finite number above 0, got -1": {"eps": -1},
        "ValueError: target must be on the device of pred": {"target": meta},
        "ValueError: T >= 1 and D >= 1": {"pred": empty, "target": empty},
    }
    check_refuses(cosine_distance, make(2, 3, 4), refused)
