"""The objective of a model that predicts the velocity."""

from __future__ import annotations

import copy

import pytest
import torch
from objectives import SIDE, B, C, grad_of, make_batch, make_objective, terms_of, to_tokens, values_of

from pixelgen.losses.objective import Objective


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_terms_of_a_velocity_equal_their_formulas(kernels):
    objective = make_objective(prediction="velocity", kernels=kernels, adversarial_weight=0.3)
    batch = make_batch((0.1, 0.3, 0.5, 1.0))
    velocity, x, t, noise = batch["x_pred"], batch["x"], batch["t"], 2 * torch.randn(B, C, SIDE, SIDE)
    found, per_sample = values_of(objective, batch, noise=to_tokens(noise))
    time = t[:, None, None, None]
    x_pred = (time * x + (1 - time) * noise + (1 - time) * velocity).detach().requires_grad_()
    flow = (velocity - (x - noise)).square().mean((1, 2, 3))
    torch.testing.assert_close(per_sample["flow_matching"], flow.detach())
    torch.testing.assert_close(found["flow_matching"], flow.mean())
    expected = terms_of(_as_x(objective), batch | {"x_pred": x_pred})
    for name in ("lpips", "p_dino", "adversarial", "discriminator"):
        torch.testing.assert_close(found[name], expected[name], msg=name)
        if name != "discriminator":
            (by_velocity,), (by_image,) = grad_of(found[name], velocity), grad_of(expected[name], x_pred)
            torch.testing.assert_close(by_velocity, (1 - time) * by_image)
            assert not by_velocity[[0, 3]].any() and by_velocity[[1, 2]].any()  # below the gate; at t = 1
    assert found["alignment"] == expected["alignment"]


def _as_x(objective: Objective) -> Objective:
    """The same networks and terms, for x-prediction."""
    other = copy.copy(objective)
    other.prediction = "x"
    return other


@pytest.mark.parametrize("t", [0.9, 1 - 1e-4, 1 - 1e-6, 1.0])
def test_a_velocity_keeps_its_digits_where_t_is_near_1(t):
    objective = make_objective(prediction="velocity", alignment_weight=0)
    batch = make_batch((t,) * B)
    noise = torch.randn(B, C, SIDE, SIDE)
    found = terms_of(objective, batch, noise=to_tokens(noise))["flow_matching"]
    velocity = batch["x_pred"].detach().double().requires_grad_()
    exact = (velocity - (batch["x"].double() - noise.double())).square().mean()
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    (grad,), (exact_grad,) = grad_of(found, batch["x_pred"]), grad_of(exact, velocity)
    assert (grad - exact_grad).abs().max() <= 1e-6 * exact_grad.abs().max()


@pytest.mark.parametrize(("noise", "got"), [(None, "None"), (torch.zeros(B, 4, 47), r"\(4, 4, 47\)")])
def test_a_velocity_needs_the_noise(noise, got):
    with pytest.raises(ValueError, match=rf"noise must be given for a velocity, .*\(4, 4, 48\), got {got}"):
        terms_of(make_objective(prediction="velocity"), make_batch(), noise=noise)
