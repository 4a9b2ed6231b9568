"""x_t, time sampling, and x-prediction as a velocity."""

import pytest
import torch

from pixelgen.flow import (
    interpolate,
    logit_normal_time,
    round_to_float32,
    shift_time,
    velocity_from_x_pred,
)


def test_interpolate_runs_from_noise_to_image():
    x, noise = torch.randn(2, 4, 3, 5, 7).unbind()
    assert torch.equal(interpolate(x, noise, torch.zeros(4)), noise)
    assert torch.equal(interpolate(x, noise, torch.ones(4)), x)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = torch.stack([s * a + (1 - s) * b for s, a, b in zip(t.tolist(), x, noise, strict=True)])
    torch.testing.assert_close(interpolate(x, noise, t), expected)
    torch.testing.assert_close(interpolate(x, noise, 0.25)[1], expected[1])


def test_interpolate_fits_any_layout():
    tokens, noise = torch.randn(2, 3, 4, 12).unbind()
    t = torch.rand(3)
    torch.testing.assert_close(
        interpolate(tokens, noise, t), t[:, None, None] * tokens + (1 - t)[:, None, None] * noise
    )


@pytest.mark.parametrize("timeshift", [0.5, 1.0, 3.0])
def test_shift_time_keeps_the_ends_and_the_order(timeshift):
    t = shift_time(torch.linspace(0, 1, 33), timeshift)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    assert shift_time(0.0, timeshift) == 0.0 and shift_time(1.0, timeshift) == 1.0


def test_shift_time_moves_towards_the_noise():
    assert shift_time(0.5, 3.0) == 0.25
    assert shift_time(0.5, 1.0) == 0.5
    assert torch.equal(shift_time(torch.tensor([0.5]), 3.0), torch.tensor([0.25]))
    assert shift_time(shift_time(0.3, 4.0), 0.25) == pytest.approx(0.3)  # the inverse


def test_logit_normal_time():
    draw = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    t = logit_normal_time(draw, -0.8, 0.8)
    assert t.min() > 0 and t.max() < 1
    logit = torch.logit(t)
    assert logit.mean().item() == pytest.approx(-0.8, abs=0.02)
    assert logit.std().item() == pytest.approx(0.8, abs=0.02)
    # The share below the usual gate, 0.3: Phi((logit(0.3) + 0.8) / 0.8) = 0.476.
    assert (t < 0.3).float().mean().item() == pytest.approx(0.476, abs=0.01)
    assert torch.equal(logit_normal_time(torch.zeros(1), 0.0, 1.0), torch.tensor([0.5]))


def test_velocity_of_the_true_image_is_x_minus_noise():
    x, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).unbind()
    t = torch.tensor([0.0, 0.3, 0.5, 0.9, 0.95], dtype=torch.float64)
    x_t = interpolate(x, noise, t)
    torch.testing.assert_close(velocity_from_x_pred(x, x_t, t), x - noise)
    torch.testing.assert_close(velocity_from_x_pred(x[1], x_t[1], 0.3), (x - noise)[1])


@pytest.mark.parametrize("t", [0.96, 0.99, 1.0])
def test_velocity_is_clamped_near_the_image(t):
    x_pred, x_t = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    for time in (t, torch.full((2,), t)):
        torch.testing.assert_close(velocity_from_x_pred(x_pred, x_t, time), torch.full_like(x_t, 20.0))
        torch.testing.assert_close(
            velocity_from_x_pred(x_pred, x_t, time, t_eps=0.5), torch.full_like(x_t, 2.0)
        )


def test_velocity_is_computed_in_fp32():
    x_pred = torch.tensor([[1.0]], dtype=torch.bfloat16)
    x_t = torch.tensor([[0.001]])
    assert velocity_from_x_pred(x_pred, x_t, 0.0).item() == pytest.approx(0.999, abs=1e-6)
    assert velocity_from_x_pred(x_pred, x_t.bfloat16(), 0.0).dtype == torch.float32
    assert velocity_from_x_pred(x_pred, x_t.double(), 0.0).dtype == torch.float64


def test_velocity_carries_gradient():
    x_pred = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x_t, t = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0.2, 0.99], dtype=torch.float64)
    velocity_from_x_pred(x_pred, x_t, t).sum().backward()
    torch.testing.assert_close(x_pred.grad, (1 / (1 - t).clamp_min(0.05))[:, None].expand(2, 3))


def test_nothing_waits_for_the_device():
    x, t = torch.empty(2, 3, 4, 4, device="meta"), torch.empty(2, device="meta")  # has no values to read
    x_t = interpolate(x, x, shift_time(logit_normal_time(t), 2.0))
    assert velocity_from_x_pred(x, x_t, t).shape == x.shape


def test_round_to_float32():
    assert round_to_float32(0.1) == torch.tensor(0.1, dtype=torch.float32).item()
    assert round_to_float32(0.25) == 0.25


def test_errors():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"noise must have the shape of x \(2, 3, 4, 4\), got \(2, 3\)"):
        interpolate(x, torch.zeros(2, 3), 0.5)
    with pytest.raises(ValueError, match=r"interpolate: t must have shape \(B,\) = \(2,\), got \(3,\)"):
        interpolate(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"x_pred must have the shape of x_t"):
        velocity_from_x_pred(x[:1], x, 0.5)
