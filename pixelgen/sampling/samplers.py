"""Solvers of dx/dt = velocity(x, t) from noise (t = 0) to image (t = 1).

A solver knows nothing of labels, guidance or prediction type: those live in the velocity function
(``guidance.py``). Times are Python floats, so no step waits for the device. Only the current state is kept;
the callback sees the trajectory.

``velocity(x_t, t, step_t)`` gets the state, the time of the evaluation, and the time at which the current
solver step began. The times differ in Heun's corrector only; the released guidance rule reads the second.

``callback(step_index, t_next, x, velocity)`` is called after every step with the state at ``t_next`` and the
velocity that carried the step (Heun: the average, Adams and flow_dpm: the weighted sum).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pixelgen.errors import UserError
from pixelgen.flow import shift_time

Velocity = Callable[[Tensor, float, float], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]

MAX_ADAMS_ORDER = 4


def timesteps(num_steps: int, timeshift: float = 1.0, last_step: float | None = None) -> list[float]:
    """The ``num_steps + 1`` times of a sampling run, from 0.0 (noise) to 1.0 (image).

    ``num_steps`` values evenly from 0 to 1 - last_step, then 1; each then goes through ``shift_time``. All of
    it in fp32, so that comparisons with a guidance interval fall as in the released samplers.

    Args:
        num_steps: solver steps, at least 1.
        timeshift: positive and finite; above 1 spends more steps near the noise.
        last_step: length of the last step before the shift, in (0, 1); None means 1 / num_steps, the uniform
            grid. Without effect for one step.

    Returns:
        Strictly increasing Python floats, each exactly representable in fp32.

    Raises:
        UserError: ``last_step`` is out of range, or an argument so extreme that two times coincide in fp32.
    """
    if last_step is None or num_steps == 1:
        last_step = 1.0 / num_steps
    elif not 0.0 < last_step < 1.0:
        raise UserError(f"timesteps: last_step must lie between 0 and 1, got {last_step}")
    grid = torch.linspace(0.0, 1.0 - last_step, num_steps, dtype=torch.float32, device="cpu")
    grid = torch.cat([grid, torch.ones(1, dtype=torch.float32, device="cpu")])
    times = shift_time(grid, timeshift).tolist()
    if not _increases(times):
        raise UserError(
            "timesteps: two times coincide in fp32, use fewer steps, a timeshift closer to 1 or a longer "
            f"last_step; got num_steps={num_steps}, timeshift={timeshift}, last_step={last_step}"
        )
    return times


def euler(
    velocity: Velocity, noise: Tensor, timesteps: Sequence[float], *, callback: Callback | None = None
) -> Tensor:
    """Euler's method: x_{i+1} = x_i + (t_{i+1} - t_i) * v(x_i, t_i). First order; one evaluation per step.

    Args:
        velocity: ``velocity(x_t, t, step_t)``, see the module's docstring.
        noise: state at the first time, float32 or float64, any shape.
        timesteps: at least two strictly increasing times.
        callback: called after every step, see the module's docstring.

    Returns:
        The state at the last time, shape of ``noise``.

    Raises:
        UserError: fewer than two times, or times that do not increase.
        TypeError: ``noise`` is not float32 or float64.
    """
    return adams(velocity, noise, timesteps, order=1, callback=callback)


@torch.no_grad()
def heun(
    velocity: Velocity,
    noise: Tensor,
    timesteps: Sequence[float],
    *,
    exact: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method, second order.

        v_i = v(x_i, t_i);  x' = x_i + h_i * v_i;  v' = v(x', t_{i+1});  x_{i+1} = x_i + h_i * (v_i + v') / 2

    The last step has no corrector: its v' would be taken at t = 1, where (x_pred - x_t) / (1 - t)
    degenerates.

    Args:
        velocity, noise, timesteps, callback: as in ``euler``, which also says what is returned and raised.
        exact: True evaluates v_i in each of the n steps, 2n - 1 evaluations. False takes the v' of the step
            before for it, n evaluations; the last step then needs none.
    """
    _check_arguments(noise, timesteps)
    x, num_steps = noise, len(timesteps) - 1
    reused: Tensor | None = None
    for i in range(num_steps):
        t, t_next = timesteps[i], timesteps[i + 1]
        v = velocity(x, t, t) if reused is None else reused
        if i < num_steps - 1:
            corrector = velocity(torch.add(x, v, alpha=t_next - t), t_next, t)
            reused = None if exact else corrector
            v = (v + corrector) / 2
        x = torch.add(x, v, alpha=t_next - t)
        if callback is not None:
            callback(i, t_next, x, v)
    return x


def adams_weights(times: Sequence[float], t_next: float) -> list[float]:
    """Weights of the variable-step Adams-Bashforth formula.

        w_j = 1/h * integral over s in [t_i, t_i + h] of prod_{m != j} (s - t_m) / (t_j - t_m)

    with t_i the newest of ``times`` and h = t_next - t_i. Time is shifted to t_i and measured in h, and the
    integrals are taken by the two-point Gauss rule, exact up to cubics: nothing is expanded in powers of t,
    so no digits are lost.

    Args:
        times: the 1 to 4 last times at which the velocity is known, oldest first, strictly increasing.
        t_next: end of the step.

    Returns:
        One weight per time, in its order; they sum to 1.
    """
    t, h = times[-1], t_next - times[-1]
    nodes = [(time - t) / h for time in times]
    weights = []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        basis = [math.prod((s - other) / (node - other) for other in others) for s in _GAUSS_NODES]
        weights.append(sum(basis) / 2)
    return weights


@torch.no_grad()
def adams(
    velocity: Velocity,
    noise: Tensor,
    timesteps: Sequence[float],
    *,
    order: int = 2,
    callback: Callback | None = None,
) -> Tensor:
    """Adams-Bashforth with variable steps: x_{i+1} = x_i + h_i * sum_j w_j v_j; one evaluation per step.

    v_j are the velocities of the last ``order`` steps (fewer at the start: step i has order min(order, i +
    1)) and w_j their ``adams_weights``. The start is Euler's method, whose first step leaves an error of
    second order: orders 3 and 4 reach theirs only where the velocity is flat at first.

    Args:
        velocity, noise, timesteps, callback: as in ``euler``, which also says what is returned and raised.
        order: 1 (Euler) to 4; a UserError otherwise.
    """
    if order not in range(1, MAX_ADAMS_ORDER + 1):
        raise UserError(f"adams: order must be an integer from 1 to {MAX_ADAMS_ORDER}, got {order!r}")
    _check_arguments(noise, timesteps)
    x = noise
    history: deque[tuple[float, Tensor]] = deque(maxlen=order)
    for i in range(len(timesteps) - 1):
        t, t_next = timesteps[i], timesteps[i + 1]
        history.append((t, velocity(x, t, t)))
        weights = adams_weights([time for time, _ in history], t_next)
        v = history[-1][1] * weights[-1]
        for weight, (_, past) in zip(weights[:-1], history, strict=False):
            v = torch.add(v, past, alpha=weight)
        x = torch.add(x, v, alpha=t_next - t)
        if callback is not None:
            callback(i, t_next, x, v)
    return x


@torch.no_grad()
def flow_dpm(
    velocity: Velocity, noise: Tensor, timesteps: Sequence[float], *, callback: Callback | None = None
) -> Tensor:
    """PixelDiT's sampler (arXiv 2511.20645): two-step Adams-Bashforth with constant weights.

        x_{i+1} = x_i + h_i * (3/2 * v_i - 1/2 * v_{i-1});  the first step is Euler's

    One evaluation per step. It is named as the public code names it, with three peculiarities that published
    samples depend on:

    - despite the name it is no DPM solver: it knows neither noise levels nor their logarithms;
    - the weights are 3/2 and -1/2 whatever the lengths of the steps. They fit equal ones; where the lengths
      change, as with a timeshift or a last step of its own, a step has an error of h_i (h_i - h_{i-1}) / 2
      times dv/dt, which ``adams`` has not;
    - v_{i-1} is the velocity that was used, guidance included, also where a guidance interval begins or ends
      between the two steps.

    Args:
        velocity, noise, timesteps, callback: as in ``euler``, which also says what is returned and raised.
    """
    _check_arguments(noise, timesteps)
    x, previous = noise, None
    for i, (t, t_next) in enumerate(pairwise(timesteps)):
        current = velocity(x, t, t)
        v = current if previous is None else torch.sub(1.5 * current, previous, alpha=0.5)
        previous = current
        x = torch.add(x, v, alpha=t_next - t)
        if callback is not None:
            callback(i, t_next, x, v)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "heun-reuse": partial(heun, exact=False),
    "adams": adams,
    "flow_dpm": flow_dpm,
}

# Nodes of the two-point Gauss rule on [0, 1]; both weights are 1/2.
_GAUSS_NODES = (0.5 - math.sqrt(3.0) / 6.0, 0.5 + math.sqrt(3.0) / 6.0)


def _increases(times: Sequence[float]) -> bool:
    return all(earlier < later for earlier, later in pairwise(times))


def _check_arguments(noise: Tensor, timesteps: Sequence[float]) -> None:
    if noise.dtype not in (torch.float32, torch.float64):
        # In bf16 a step of 1/50 loses most of its digits; the model may still compute in bf16.
        raise TypeError(f"sampler: noise must be float32 or float64, got {noise.dtype}")
    if len(timesteps) < 2:
        raise UserError(f"sampler: timesteps must hold at least two times, got {len(timesteps)}")
    if not _increases(timesteps):
        raise UserError(f"sampler: timesteps must increase strictly, got {list(timesteps)}")
