"""Golden vectors of PixelGen's samplers; test_parity.py runs these tests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from parity import ADAMS_HIGH_ORDER, FORWARD, Vectors, assert_matches, params
from torch import Tensor

from pixelgen.conditions import Condition
from pixelgen.sampling.guidance import GuidedVelocity
from pixelgen.sampling.options import SampleConfig
from pixelgen.sampling.samplers import adams, adams_weights, euler, heun, timesteps


def sampler_of(case: dict):
    """Our solver for a class of the reference, and its name, which decides on the end of the interval."""
    name = case["class"].lower()
    if name.startswith("euler"):
        return euler, "euler"
    if name.startswith("heun"):
        return (lambda *args, **named: heun(*args, exact=case["exact_henu"], **named)), "heun"
    assert name.startswith("adam"), f"unknown sampler {case['class']}"
    return (lambda *args, **named: adams(*args, order=case["order"], **named)), "adams"


def run_sampler(
    vectors: Vectors, case: dict
) -> tuple[list[float], list[Tensor], list[Tensor], list[float], int]:
    """Our solver on the sidecar's analytic net: times, states, velocities, times of the net's calls, NFE."""
    tensors, net = vectors.tensors, vectors.sidecar["net"]
    net_t: list[float] = []

    def model_fn(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        net_t.append(t[0].item())
        c = tensors["c"][condition["label"]]
        return torch.tanh(net["a"] * x + net["b"] * t.view(-1, 1, 1, 1) + c.view(-1, 1, 1, 1))

    solver, sampler = sampler_of(case)
    settings = SampleConfig(
        sampler=sampler,
        guidance=case["guidance"],
        guidance_low=case["guidance_interval_min"],
        guidance_high=case["guidance_interval_max"],
        guidance_rule="released",
    )
    condition, null = {"label": tensors["condition"]}, {"label": tensors["uncondition"]}
    velocity = GuidedVelocity(model_fn, condition, null, settings)
    times = timesteps(case["num_steps"], case["timeshift"], case.get("last_step"))
    states = [tensors["noise"]]
    velocities: list[Tensor] = []

    def keep(step_index: int, t_next: float, x: Tensor, v: Tensor) -> None:
        assert (step_index, t_next) == (len(velocities), times[len(velocities) + 1])
        states.append(x)
        velocities.append(v)

    final = solver(velocity, tensors["noise"], times, callback=keep)
    assert torch.equal(final, states[-1])
    return times, states, velocities, net_t, velocity.nfe


@pytest.mark.parametrize(("vectors", "name"), params("samplers", "cases"))
def test_sampler(vectors: Vectors, name: str):
    case = vectors.sidecar["cases"][name]
    expected = {k.removeprefix(f"{name}."): v for k, v in vectors.tensors.items() if k.startswith(f"{name}.")}
    times, states, velocities, net_t, nfe = run_sampler(vectors, case)

    grid = torch.tensor(times)
    assert_matches(grid, expected.pop("timesteps"), FORWARD, f"{name} timesteps")
    if "timedeltas" in expected:
        assert_matches(grid.diff(), expected.pop("timedeltas"), FORWARD, f"{name} timedeltas")
    assert len(net_t) == case["net_calls"]
    assert torch.allclose(torch.tensor(net_t), torch.tensor(case["net_t"]), rtol=0, atol=1e-6)
    # The reference doubles every batch; we only those that need it, and never more.
    assert case["net_calls"] <= nfe <= 2 * case["net_calls"]
    assert nfe == case["net_calls"] or case["guidance"] != 1.0

    coefficients = expected.pop("solver_coeffs", None)
    tolerance = FORWARD
    if coefficients is not None and case["order"] > 2:
        # The reference's fp32 weights lose digits; what the solver does with them is held to FORWARD in
        # test_adams_with_the_weights_of_the_file.
        tolerance = ADAMS_HIGH_ORDER
    compare_trajectory(name, dict(expected), states, velocities, tolerance)
    if coefficients is not None:
        compare_adams_weights(vectors, name, coefficients, times)


def compare_trajectory(
    name: str,
    expected: dict[str, Tensor],
    states: Sequence[Tensor],
    velocities: Sequence[Tensor],
    tolerance: float,
) -> None:
    assert_matches(states[-1], expected.pop("final"), tolerance, f"{name} final")
    assert_matches(torch.stack(list(states)), expected.pop("x_traj"), tolerance, f"{name} x_traj")
    if "v_traj" in expected:  # ends with a row of zeros
        padded = torch.stack([*velocities, torch.zeros_like(velocities[0])])
        assert_matches(padded, expected.pop("v_traj"), tolerance, f"{name} v_traj")
    assert not expected, f"{name}: no comparison for {sorted(expected)}"


def compare_adams_weights(vectors: Vectors, name: str, expected: Tensor, times: Sequence[float]) -> None:
    """Our float64 weights differ from the reference's fp32 ones by what its sidecar says, and by no more."""
    order = vectors.sidecar["cases"][name]["order"]
    actual = torch.zeros_like(expected)
    for i, row in enumerate(actual):
        weights = adams_weights(times[max(0, i + 1 - order) : i + 1], times[i + 1])
        row[order - len(weights) :] = torch.tensor(weights)
    rounding = vectors.sidecar["cases"][name].get("coeff_error_vs_float64", 0.0)
    error = (actual - expected).abs().max().item()
    assert error <= 1.1 * rounding + 1e-6, (
        f"{name} solver_coeffs: error {error:.3e}, fp32 accounts for {rounding}"
    )


ADAMS = [p for p in params("samplers", "cases") if "order" in p.values[0].sidecar["cases"][p.values[1]]]


@pytest.mark.parametrize(("vectors", "name"), ADAMS)
def test_adams_with_the_weights_of_the_file(vectors: Vectors, name: str, monkeypatch: pytest.MonkeyPatch):
    """With the reference's own fp32 weights every order matches at full tolerance."""
    case = vectors.sidecar["cases"][name]
    rows = iter(vectors.tensors[f"{name}.solver_coeffs"].tolist())
    monkeypatch.setattr(
        "pixelgen.sampling.samplers.adams_weights", lambda past, t_next: next(rows)[-len(past) :]
    )
    _, states, velocities, _, _ = run_sampler(vectors, case)
    names = ("final", "x_traj", "v_traj")
    expected = {key: vectors.tensors[f"{name}.{key}"] for key in names if f"{name}.{key}" in vectors.tensors}
    compare_trajectory(name, expected, states, velocities, FORWARD)
