"""The noise gate's schedules, and the choice of the samples that perceptual terms see."""

import math

import pytest
import torch

from pixelgen.losses.gate import NoiseGate, select_samples
from pixelgen.losses.times import Times

SCHEDULES = ("hard", "cosine", "sigmoid", "snr", "learned")


def test_hard_gate_is_inclusive():
    assert NoiseGate("hard", 0.3)(torch.tensor([0.0, 0.29, 0.3, 1.0])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_lie_in_0_to_1_and_are_0_below_the_first_time(schedule):
    gate = NoiseGate(schedule, 0.4, 0.1)
    t = torch.linspace(0, 1, 101)
    weight = gate(t)
    assert weight.dtype == torch.float32 and (weight >= 0).all() and (weight <= 1).all()
    assert not weight[t < gate.first_t].any()
    assert torch.equal(gate.passes(t), t >= gate.first_t)
    assert (weight[1:] >= weight[:-1] - 1e-6).all()  # rises with the signal


def test_ramps_follow_their_formulas():
    t = torch.tensor([0.2, 0.25, 0.3, 0.4, 0.9])
    expected = [0.5 * (1 - math.cos(math.pi * min(max((x - 0.2) / 0.2, 0), 1))) for x in t.tolist()]
    torch.testing.assert_close(NoiseGate("cosine", 0.2, 0.2)(t), torch.tensor(expected))
    sigmoid = NoiseGate("sigmoid", 0.3, 0.05)
    assert sigmoid.first_t == pytest.approx(0.3 - 0.75 * 0.05)
    expected = torch.where(t >= sigmoid.first_t, torch.sigmoid(8 * (t - 0.3) / 0.05), 0)
    torch.testing.assert_close(sigmoid(t), expected)
    assert sigmoid(t)[2] == 0.5 and not sigmoid(t)[:2].any()
    torch.testing.assert_close(NoiseGate("snr", 0.0)(t), t**2 / (t**2 + (1 - t) ** 2))


def test_learned_weights_come_to_count_every_bin_alike():
    gate = NoiseGate("learned", 0.0, bins=2)
    t = torch.tensor([0.1, 0.2, 0.7, 0.8])
    loss = torch.tensor([4.0, 4.0, 1.0, 1.0], requires_grad=True)  # four times as large where it is noisy
    (gradient,) = torch.autograd.grad(gate.penalty(t, loss.mean()), loss, allow_unused=True)
    assert gradient is None
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.2)
    for _ in range(400):
        total = (gate(t) * loss.detach()).mean() + gate.penalty(t, loss.mean())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    weight = gate(t).detach()
    torch.testing.assert_close(weight * loss, torch.full((4,), 2.5), rtol=1e-3, atol=0)


def test_selection_is_padded_to_a_bucket_by_samples_that_pass():
    t = torch.full((16,), 0.1)
    t[[3, 7, 8]] = 0.9
    selection = select_samples(Times.of(t), NoiseGate())
    assert selection.index is not None
    assert selection.index.tolist() == [3, 7, 8, 3]
    assert selection.is_real.tolist() == [True, True, True, False]
    values = selection.rows(torch.arange(16.0))
    assert selection.scatter(values, 16).nonzero()[:, 0].tolist() == [3, 7, 8]


def test_sizes_of_selections_are_few():
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(200):
        selection = select_samples(Times.of(torch.rand(48, generator=generator)), NoiseGate())
        sizes.add(len(selection.is_real))
    assert all(size % 6 == 0 for size in sizes) and len(sizes) <= 8


@pytest.mark.parametrize(("low", "count"), [(0.0, 0), (0.3, 5)])
def test_none_and_all(low, count):
    selection = select_samples(Times.of(torch.full((5,), low)), NoiseGate())
    assert len(selection) == count
    assert selection.rows(torch.ones(5, 2)).shape == (count, 2)
