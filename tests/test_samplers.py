"""Solvers: orders of convergence, evaluations, times, errors."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelgen.errors import UserError
from pixelgen.sampling.samplers import SAMPLERS, adams, adams_weights, euler, flow_dpm, heun, timesteps


def growing(x: Tensor, t: float, step_t: float) -> Tensor:
    """dx/dt = x cos(3t): x(1) = x(0) exp(sin(3) / 3)."""
    return x * math.cos(3 * t)


def flat_at_first(x: Tensor, t: float, step_t: float) -> Tensor:
    """dx/dt = x t^3: x(1) = x(0) exp(1/4). So flat near 0 that a start by Euler costs no order up to 4."""
    return x * t**3


def error_of(solver, velocity, exact: float, num_steps: int, timeshift: float) -> float:
    x = solver(velocity, torch.ones(1, dtype=torch.float64), timesteps(num_steps, timeshift))
    return abs(x.item() - exact)


@pytest.mark.parametrize("timeshift", [1.0, 2.5])
@pytest.mark.parametrize(
    ("solver", "velocity", "exact", "order"),
    [
        pytest.param(euler, growing, math.exp(math.sin(3) / 3), 1, id="euler"),
        pytest.param(heun, growing, math.exp(math.sin(3) / 3), 2, id="heun"),
        pytest.param(partial(heun, exact=False), growing, math.exp(math.sin(3) / 3), 2, id="heun-reuse"),
        pytest.param(partial(adams, order=1), growing, math.exp(math.sin(3) / 3), 1, id="adams1"),
        pytest.param(partial(adams, order=2), growing, math.exp(math.sin(3) / 3), 2, id="adams2"),
        pytest.param(partial(adams, order=3), flat_at_first, math.exp(0.25), 3, id="adams3"),
        pytest.param(partial(adams, order=4), flat_at_first, math.exp(0.25), 4, id="adams4"),
    ],
)
def test_order_of_convergence(solver, velocity, exact, order, timeshift):
    coarse, fine = (error_of(solver, velocity, exact, n, timeshift) for n in (320, 640))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("lengths", "order"), [((1.0, 1.0), 2), ((1.0, 2.0), 1)])
def test_flow_dpm_has_the_weights_of_equal_steps(lengths, order):
    """Of second order on an even grid, and of first where long and short steps take turns."""

    def error(num_steps: int) -> float:
        ends = torch.tensor(lengths, dtype=torch.float64).repeat(num_steps // 2).cumsum(0)
        times = [0.0, *(ends / ends[-1]).tolist()]
        return abs(flow_dpm(growing, torch.ones(1, dtype=torch.float64), times).item() - exact)

    exact = math.exp(math.sin(3) / 3)
    assert math.log2(error(640) / error(1280)) == pytest.approx(order, abs=0.25)


def test_flow_dpm_weighs_the_velocity_that_was_used():
    """Hand-computed steps of unequal length: the velocity of the step before counts as it was."""
    velocities, times = iter([1.0, 10.0, -4.0]), [0.0, 0.5, 0.6, 1.0]
    states = []
    flow_dpm(
        lambda x, t, step_t: torch.full_like(x, next(velocities)),
        torch.zeros(1, dtype=torch.float64),
        times,
        callback=lambda i, t_next, x, v: states.append((v.item(), x.item())),
    )
    by_hand = [(1.0, 0.5), (14.5, 0.5 + 0.1 * 14.5), (-11.0, 0.5 + 0.1 * 14.5 + 0.4 * -11.0)]
    assert states == [pytest.approx(step) for step in by_hand]


def test_straight_paths_are_solved_exactly():
    noise, target = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind()
    for name, solver in SAMPLERS.items():
        x = solver(lambda x, t, step_t: target - noise, noise, timesteps(5, 3.0))
        torch.testing.assert_close(x, target, msg=name)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_and_callback(name, num_steps):
    calls, steps = [], []

    def velocity(x: Tensor, t: float, step_t: float) -> Tensor:
        assert isinstance(t, float) and isinstance(step_t, float)
        calls.append((t, step_t))
        return -x

    times, noise = timesteps(num_steps, 2.0), torch.ones(2, 3)
    before = noise.clone()

    def callback(step_index: int, t_next: float, x: Tensor, v: Tensor) -> None:
        steps.append((step_index, t_next, x))
        torch.testing.assert_close(previous[-1] + (t_next - times[step_index]) * v, x)
        previous.append(x)

    previous = [noise]
    final = SAMPLERS[name](velocity, noise, times, callback=callback)
    assert len(calls) == {"heun": 2 * num_steps - 1}.get(name, num_steps)
    assert [(i, t) for i, t, _ in steps] == list(enumerate(times[1:]))
    assert final is steps[-1][2] and torch.equal(noise, before)
    if name == "heun":
        expected = [(times[0], times[0])]
        for i in range(1, num_steps):
            expected += [(times[i], times[i - 1]), (times[i], times[i])]
    elif name == "heun-reuse":
        expected = [(times[0], times[0])] + [(times[i], times[i - 1]) for i in range(1, num_steps)]
    else:
        expected = [(t, t) for t in times[:-1]]
    assert calls == expected  # none at t = 1, where an x-predictor's velocity is meaningless


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("timeshift", [0.5, 1.0, 2.0])
def test_timesteps(num_steps, timeshift):
    times = timesteps(num_steps, timeshift)
    assert len(times) == num_steps + 1 and times[0] == 0.0 and times[-1] == 1.0
    even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    expected = even / (even + (1 - even) * timeshift)
    torch.testing.assert_close(torch.tensor(times, dtype=torch.float64), expected, rtol=0, atol=1e-6)
    assert all(torch.tensor(t, dtype=torch.float32).item() == t for t in times)


def test_timesteps_with_last_step():
    assert timesteps(5, last_step=0.04) == pytest.approx([0.0, 0.24, 0.48, 0.72, 0.96, 1.0])
    assert timesteps(1, last_step=0.04) == [0.0, 1.0]


def test_adams_weights_integrate_polynomials():
    times, t_next = [0.1, 0.13, 0.3, 0.34], 0.5
    for order in range(1, 5):
        past = times[-order:]
        weights = adams_weights(past, t_next)
        for degree in range(order):
            integral = (t_next ** (degree + 1) - past[-1] ** (degree + 1)) / (degree + 1)
            step = (t_next - past[-1]) * sum(w * t**degree for w, t in zip(weights, past, strict=True))
            assert step == pytest.approx(integral, rel=1e-12)


def test_adams_weights_keep_their_digits():
    """Close to t = 1 with small steps, where an expansion in powers of t would cancel."""
    h = 2.0**-12
    times = [1 - 5 * h, 1 - 4 * h, 1 - 3 * h, 1 - 2 * h]
    assert adams_weights(times, 1 - h) == pytest.approx([-9 / 24, 37 / 24, -59 / 24, 55 / 24], abs=1e-14)


def test_half_precision_state_is_refused():
    with pytest.raises(TypeError, match=r"sampler: noise must be float32 or float64, got torch\.bfloat16"):
        euler(growing, torch.ones(1, dtype=torch.bfloat16), timesteps(2))


@pytest.mark.parametrize("solver", SAMPLERS.values(), ids=SAMPLERS)
def test_errors_of_solvers(solver):
    with pytest.raises(UserError, match="timesteps must hold at least two times, got 1"):
        solver(growing, torch.ones(1), [0.0])
    with pytest.raises(UserError, match="timesteps must increase strictly"):
        solver(growing, torch.ones(1), [0.0, 0.5, 0.5, 1.0])


def test_errors():
    order: Any
    for order in (0, 5, 2.5):
        with pytest.raises(UserError, match="adams: order must be an integer from 1 to 4"):
            adams(growing, torch.ones(1), timesteps(2), order=order)
    for last_step in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UserError, match="timesteps: last_step must lie between 0 and 1"):
            timesteps(4, last_step=last_step)
    with pytest.raises(UserError, match="two times coincide in fp32"):
        timesteps(4, last_step=1e-12)
