import pytest
import torch
from op_testing import DEVICES, check_refuses
from pixelgen_kernels.native import build_info
from pixelgen_kernels.ops.philox import (
    philox_4x32,
    philox_normal,
    philox_normal_ref,
    philox_uniform,
)

# Random123's known answers: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected, device):
    # 33 copies: both the vectorised and the scalar part of the integer loops are used
    counters = torch.tensor(counter, device=device)[:, None].repeat(1, 33)
    result = philox_4x32(counters, key)
    assert result.tolist() == [[word] * 33 for word in expected]


@pytest.mark.parametrize("device", DEVICES)
def test_layout_of_counter_and_key(device):
    seed, step, sample, stream = (0x299F31D0 << 32) | 0xA4093822, 0x13198A2E, 0x85A308D3, 0x03707344
    index = torch.tensor([sample, 5], device=device)
    uniform = philox_uniform(seed, step, index, 7, stream=stream)
    words = philox_4x32(
        torch.tensor([[1], [sample], [step], [stream]], device=device), (seed & 0xFFFFFFFF, seed >> 32)
    )
    assert torch.equal(uniform[0, 4:7], ((words >> 8) * 2.0**-24).float()[:3, 0])
    # bits above 32 of the sample index and of the step do not count
    wide = philox_uniform(seed, step + (1 << 40), index + (1 << 33), 7, stream=stream)
    assert torch.equal(uniform, wide)


def test_normal_is_box_muller_of_the_words():
    index = torch.arange(3)
    words = torch.stack(
        [philox_4x32(torch.tensor([[g], [1], [9], [2]]), (4, 0))[:, 0] for g in range(4)]
    ).double()
    w = words.view(4, 2, 2)
    radius = (-2 * (w[..., 0] * 2.0**-32 + 2.0**-33).log()).sqrt()
    angle = 2 * torch.pi * (w[..., 1] // 256) * 2.0**-24
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()
    actual = philox_normal(4, 9, index, 16, stream=2)[1]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


# Units in the last place between philox_normal and the exact values of its formula.
MAX_ULP = 3 if build_info()["cpu_isa"] != "baseline" else 4


def normal_oracle(seed, step, index, count, stream=0):
    """The formula of `philox_normal` in float64; only the argument of the logarithm is rounded to fp32."""
    groups = torch.arange(-(-count // 4))
    rows = []
    for sample in index.tolist():
        others = [torch.full_like(groups, word & 0xFFFFFFFF) for word in (sample, step, stream)]
        rows.append(philox_4x32(torch.stack([groups, *others]), (seed & 0xFFFFFFFF, seed >> 32)))
    words = torch.stack(rows)
    u = words[:, 0::2].float() * 2.0**-32 + 2.0**-33
    radius = (-2 * u.double().log()).sqrt()
    # a quarter turn is taken off first: the zeros of cosine and sine are then exact
    k = words[:, 1::2] >> 8
    quarter = (k + 2**21) >> 22
    angle = (k - (quarter << 22)).double() * (2 * torch.pi * 2.0**-24)
    cos, sin = angle.cos(), angle.sin()
    turns = torch.stack((cos, -sin, -cos, sin)), torch.stack((sin, cos, -sin, -cos))
    first, second = (radius * turn.gather(0, (quarter % 4)[None])[0] for turn in turns)
    return torch.stack((first, second), 2).permute(0, 3, 1, 2).flatten(1)[:, :count]


@pytest.mark.parametrize("draw", [philox_uniform, philox_normal])
def test_batch_split_and_count_do_not_matter(draw):
    index = torch.tensor([7, 0, 2**31, 12])
    whole = draw(3, 5, index, 30)
    assert whole.shape == (4, 30)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    assert torch.equal(whole, torch.cat([draw(3, 5, index[:1], 30), draw(3, 5, index[1:], 30)]))
    assert torch.equal(whole[:, :13], draw(3, 5, index, 13))
    assert draw(3, 5, index[:0], 30).shape == (0, 30)
    assert draw(3, 5, index, 0).shape == (4, 0)


@pytest.mark.parametrize("draw", [philox_uniform, philox_normal])
def test_every_argument_changes_the_values(draw):
    index = torch.tensor([1])
    draws = [draw(*other, index, 8) for other in ((0, 0), (1, 0), (1 << 32, 0), (0, 1))]
    draws += [draw(0, 0, index + 1, 8), draw(0, 0, index, 8, stream=1)]
    values = torch.cat(draws).flatten()
    assert values.unique().numel() == values.numel()


def ulps(actual, expected):
    """Largest distance in units of the last place of fp32 at the expected values."""
    nearest = expected.float()
    unit = torch.nextafter(nearest.abs(), torch.tensor(torch.inf)) - nearest.abs()
    return ((actual.double() - expected).abs() / unit.double()).max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_normal_is_accurate(device):
    index = torch.tensor([3, 2**33 + 5])
    arguments = (9, 4, index, 2**20)
    oracle = normal_oracle(*arguments)
    assert ulps(philox_normal_ref(*arguments), oracle) < 0.51  # rounded once
    on_device = (9, 4, index.to(device), 2**20)
    assert ulps(philox_normal(*on_device).cpu(), oracle) <= MAX_ULP


@pytest.mark.gpu
@pytest.mark.skipif(MAX_ULP > 3, reason="this CPU has no fused multiply-add")
def test_devices_draw_the_same_bits():
    index = torch.arange(5)
    expected = philox_normal(9, 4, index, 2**20 + 2)
    assert torch.equal(philox_normal(9, 4, index.cuda(), 2**20 + 2).cpu(), expected)


def test_statistics():
    index = torch.arange(64)
    uniform = philox_uniform(11, 0, index, 4096)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    n = uniform.numel()  # 262,144: bounds are five standard errors
    assert abs(uniform.double().mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    histogram = torch.histc(uniform, 64, 0, 1)
    assert ((histogram - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5

    normal = philox_normal(11, 0, index, 4096).double()
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((normal**4).mean() - 3) < 5 * (96 / n) ** 0.5
    inside = (normal.abs() < 1).double().mean()
    assert abs(inside - 0.682689) < 5 * (0.683 * 0.317 / n) ** 0.5
    # neighbours in an image, neighbouring images, and the two values of a pair are uncorrelated
    pairs = (normal[:, :-1], normal[:, 1:]), (normal[:-1], normal[1:]), (normal[:, 0::2], normal[:, 1::2])
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
    next_step = philox_normal(11, 1, index, 4096).double()
    assert abs((normal * next_step).mean()) < 5 / n**0.5


@pytest.mark.parametrize("draw", [philox_uniform, philox_normal])
def test_errors(draw):
    inputs = {"seed": 5, "step": 2, "sample_index": torch.arange(3), "count": 6}
    refused = {
        "TypeError: seed must be an int, got float": {"seed": 1.0},
        "ValueError: seed must be between 0 and ... got -1": {"seed": -1},
        "ValueError: step must be between 0": {"step": -2},
        "TypeError: sample_index must be a tensor, got list": {"sample_index": [1]},
        "TypeError: sample_index must be int64, got torch.int32": {"sample_index": torch.arange(3).int()},
        "ValueError: sample_index must have shape (B), got (3, 1)": {"sample_index": torch.ones(3, 1).long()},
        "ValueError: count must be between": {"count": -1},
        "ValueError: stream must be between 0 and 4294967295, got": {"stream": 1 << 32},
    }
    check_refuses(draw, inputs, refused)
