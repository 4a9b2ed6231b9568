"""Guidance: which evaluations are guided, what they cost, what comes out."""

import pytest
import torch
from torch import Tensor

from pixelgen.conditions import Condition
from pixelgen.sampling.guidance import GuidedVelocity
from pixelgen.sampling.options import SampleConfig
from pixelgen.sampling.samplers import adams, euler, flow_dpm, heun, timesteps

LABELS, NULL = {"label": torch.tensor([0, 1, 2])}, {"label": torch.tensor([3, 3, 3])}
OFFSETS = torch.tensor([0.5, -0.3, 0.2, 0.1])


class Net:
    """x_pred = 0.5 x_t + an offset per label; records its batches."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.times: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        labels = condition["label"]
        assert x_t.shape[0] == t.shape[0] == labels.shape[0]
        self.batches.append(labels.tolist())
        self.times.append(t)
        return 0.5 * x_t + OFFSETS[labels].view(-1, 1, 1, 1)


def guided(net=None, t_eps: float | None = 0.05, **settings) -> GuidedVelocity:
    return GuidedVelocity(net or Net(), LABELS, NULL, SampleConfig(**settings), t_eps)


def velocity(x_t: Tensor, t: float, condition: Condition) -> Tensor:
    return (Net()(x_t, torch.full((3,), t), condition) - x_t) / max(1 - t, 0.05)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 4.5])
def test_guided_velocity(scale):
    net, x_t = Net(), torch.randn(3, 2, 4, 4)
    v = guided(net, guidance=scale)
    null, label = velocity(x_t, 0.5, NULL), velocity(x_t, 0.5, LABELS)
    torch.testing.assert_close(v(x_t, 0.5, 0.5), null + scale * (label - null))
    assert net.batches == [[3, 3, 3, 0, 1, 2]]  # one doubled batch, null labels first
    assert v.nfe == 2
    assert torch.equal(net.times[0], torch.full((6,), 0.5))


@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"guidance_low": 0.6, "guidance_high": 0.9}])
def test_plain_batch_where_nothing_is_guided(options):
    net, x_t = Net(), torch.randn(3, 2, 4, 4)
    v = guided(net, **options)
    torch.testing.assert_close(v(x_t, 0.5, 0.5), velocity(x_t, 0.5, LABELS))
    assert net.batches == [[0, 1, 2]] and v.nfe == 1


def test_velocity_clamp():
    x_t = torch.randn(3, 2, 4, 4)
    strict = guided(guidance=1.0, t_eps=0.05)(x_t, 0.99, 0.99)
    torch.testing.assert_close(strict, velocity(x_t, 0.99, LABELS))
    torch.testing.assert_close(guided(guidance=1.0, t_eps=0.1)(x_t, 0.99, 0.99), strict / 2)


def test_paper_rule_includes_both_ends_of_the_interval():
    v = guided(guidance_low=0.1, guidance_high=0.9)
    grid = timesteps(10)  # fp32: its 0.1 is a little less than 0.1
    assert grid[1] < 0.1
    assert [v.is_guided(t, t) for t in grid[:-1]] == [False] + [True] * 9
    assert not guided(guidance_low=0.1001, guidance_high=0.8999).is_guided(0.1, 0.1)
    assert guided().is_guided(0.0, 0.0)  # the first step is guided by default


def test_released_rule_excludes_the_lower_end():
    grid = torch.linspace(0, 1, 11).tolist()
    upper_in = guided(guidance_low=0.1, guidance_high=0.9, guidance_rule="released")
    assert [upper_in.is_guided(t, t) for t in grid[:-1]] == [False, False] + [True] * 8
    upper_out = guided(guidance_low=0.1, guidance_high=0.9, guidance_rule="released", sampler="adams")
    assert [upper_out.is_guided(t, t) for t in grid[:-1]] == [False, False] + [True] * 7 + [False]
    assert not guided(guidance_rule="released").is_guided(0.0, 0.0)  # never the first step


def test_pixeldit_rule_excludes_both_ends():
    """Of 100 even steps, in the published settings, the one at t = 0.1 is not guided, nor is that at 0.9."""
    grid = timesteps(100)
    for high, last in ((0.9, 89), (1.0, 99)):
        v = guided(guidance_low=0.1, guidance_high=high, guidance_rule="pixeldit")
        assert [i for i, t in enumerate(grid[:-1]) if v.is_guided(t, t)] == list(range(11, last + 1))
    assert not guided(guidance_rule="pixeldit").is_guided(0.0, 0.0)  # never the first step
    assert guided(guidance_rule="pixeldit").is_guided(1e-6, 1e-6)


def test_pixeldit_rule_compares_in_fp32():
    """0.1 in fp32 lies above 0.1: in float64 it would be inside an interval that begins there."""
    border = torch.tensor(0.1, dtype=torch.float32).item()
    assert border > 0.1
    v = guided(guidance_low=0.1, guidance_high=0.9, guidance_rule="pixeldit")
    assert not v.is_guided(border, border)
    assert v.is_guided(*[torch.tensor(0.1).nextafter(torch.tensor(1.0)).item()] * 2)


def test_heun_corrector_by_the_pixeldit_rule():
    """The corrector has its own time tested, whatever the step began with."""
    v = guided(guidance_low=0.4, guidance_high=0.6, guidance_rule="pixeldit")
    assert v.is_guided(0.5, 0.25) and not v.is_guided(0.75, 0.5)


def test_heun_corrector():
    """The paper's rule looks at the evaluation, the released one at the step it belongs to."""
    outside_to_inside, inside_to_outside = (0.5, 0.25), (0.75, 0.5)  # (t of the corrector, start of its step)
    paper, released = (
        guided(guidance_low=0.4, guidance_high=0.6),
        guided(guidance_low=0.4, guidance_high=0.6, guidance_rule="released"),
    )
    assert paper.is_guided(*outside_to_inside) and not released.is_guided(*outside_to_inside)
    assert released.is_guided(*inside_to_outside) and not paper.is_guided(*inside_to_outside)


@pytest.mark.parametrize(
    ("solver", "options", "nfe"),
    [
        (euler, {"guidance": 1.0}, 10),
        (euler, {}, 20),
        (euler, {"guidance_rule": "released"}, 19),  # the first step is never guided
        (euler, {"guidance_low": 0.25, "guidance_high": 0.75}, 15),  # 0.3 to 0.7
        (heun, {"guidance": 1.0}, 19),
        (heun, {}, 38),
        (heun, {"guidance_low": 0.25, "guidance_high": 0.75}, 29),  # predictors and correctors at 0.3 to 0.7
        (heun, {"guidance_low": 0.25, "guidance_high": 0.75, "guidance_rule": "released"}, 29),
        (adams, {"guidance_low": 0.25, "guidance_high": 0.75}, 15),
        (flow_dpm, {"guidance_low": 0.25, "guidance_high": 0.75}, 15),
        (
            flow_dpm,
            {"guidance_low": 0.1, "guidance_high": 0.9, "guidance_rule": "pixeldit"},
            17,
        ),  # 0.2 to 0.8
    ],
)
def test_network_evaluations(solver, options, nfe):
    net = Net()
    v = guided(net, **options)
    solver(v, torch.randn(3, 2, 4, 4), timesteps(10))
    assert v.nfe == nfe == sum(map(len, net.batches)) // 3


def test_the_model_may_answer_in_half_precision():
    x_t = torch.randn(3, 2, 4, 4)
    v = guided(lambda x, t, y: x.bfloat16())
    assert v(x_t, 0.5, 0.5).dtype == torch.float32


def test_a_sampling_run_never_waits_for_the_device():
    """Tensors on meta have no values: reading one from the host would raise."""
    labels = {"label": torch.empty(3, dtype=torch.int64, device="meta")}
    noise = torch.empty(3, 2, 4, 4, device="meta")
    for solver in (euler, heun, adams, flow_dpm):
        v = GuidedVelocity(lambda x, t, y: x * t.view(-1, 1, 1, 1), labels, labels, SampleConfig())
        assert solver(v, noise, timesteps(4)).shape == noise.shape


def test_a_model_may_predict_the_velocity_itself():
    x_t = torch.randn(3, 2, 4, 4)
    v = guided(lambda x, t, y: x * y["label"].view(-1, 1, 1, 1), t_eps=None)
    own, null = (x_t * labels["label"].view(-1, 1, 1, 1) for labels in (LABELS, NULL))
    torch.testing.assert_close(v(x_t, 0.999, 0.999), null + 2 * (own - null))
