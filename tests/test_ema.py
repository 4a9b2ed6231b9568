"""Averages of the weights: their equations, several at once, exchanged with the model's."""

import pytest
import torch

from pixelgen.config import EmaConfig
from pixelgen.training.ema import Averages, power_gamma


def trained(config: EmaConfig, steps: int) -> tuple[Averages, list[torch.Tensor]]:
    """Averages over a few steps, and the weights after each, the first before any."""
    model = torch.nn.Linear(2, 2)
    averages = Averages(model, config)
    weights = [model.weight.detach().clone()]
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        averages.update(model)
        weights.append(model.weight.detach().clone())
    return averages, weights


@pytest.mark.parametrize(("warmup", "decay"), [(False, 0.9), (True, 2 / 11)])
def test_a_constant_decay_follows_its_equation(warmup, decay):
    averages, (before, after) = trained(EmaConfig(decay=0.9, warmup=warmup), 1)
    expected = decay * before + (1 - decay) * after
    torch.testing.assert_close(averages.values["0.9"]["weight"], expected)
    assert not averages.values["0.9"]["weight"].requires_grad


def test_the_power_profile_weighs_step_i_by_i_to_the_gamma():
    width, steps = 0.1, 12
    averages, weights = trained(EmaConfig(power=(width,)), steps)
    gamma = power_gamma(width)
    # the product of the later decays, which tends to the power for many steps
    share = torch.ones(steps, dtype=torch.float64)
    for i in range(1, steps + 1):
        share[i - 1] = 1 - (1 - 1 / i) ** (gamma + 1)
        for later in range(i + 1, steps + 1):
            share[i - 1] *= (1 - 1 / later) ** (gamma + 1)
    assert float(share.sum()) == pytest.approx(1)
    expected = sum(s * w for s, w in zip(share, weights[1:], strict=True))
    torch.testing.assert_close(averages.values["power-0.1"]["weight"], expected.float())


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_gamma_gives_the_profile_its_width(width):
    gamma = power_gamma(width)
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    profile = t**gamma / (t**gamma).sum()
    mean = (profile * t).sum()
    assert float(((profile * (t - mean) ** 2).sum()) ** 0.5) == pytest.approx(width, rel=1e-3)


def test_several_averages_are_independent():
    config = EmaConfig(decay=(0.5, 0.99), power=(0.05,), warmup=False)
    averages, _ = trained(config, 5)
    assert list(averages.values) == ["0.5", "0.99", "power-0.05"]
    kept = [average["weight"] for average in averages.values.values()]
    assert not torch.allclose(kept[0], kept[1]) and not torch.allclose(kept[0], kept[2])
    alone, _ = trained(EmaConfig(decay=0.5, warmup=False), 0)
    alone.load_state_dict({"values": averages.values, "num_updates": 5})
    assert torch.equal(alone.values["0.5"]["weight"], kept[0]) and alone.num_updates == 5


def test_exchanging_is_undone_bit_for_bit_also_after_an_error():
    model = torch.nn.Linear(3, 3)
    averages = Averages(model, EmaConfig(decay=0.5, warmup=False))
    with torch.no_grad():
        model.weight.mul_(3)
    averages.update(model)
    weight, average = model.weight.detach().clone(), averages.values["0.5"]["weight"].clone()
    with pytest.raises(RuntimeError), averages.exchanged(model, "0.5"):
        assert torch.equal(model.weight, average)
        raise RuntimeError
    assert torch.equal(model.weight, weight)
    assert torch.equal(averages.values["0.5"]["weight"], average)
