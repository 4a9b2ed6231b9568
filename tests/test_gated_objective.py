"""Gate, schedules and balance weight in the objective, and what the gate keeps from the networks."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import Forked
from objectives import (
    B,
    C,
    CountingStages,
    MeanTokens,
    P,
    T,
    TwoStages,
    grad_of,
    make_batch,
    make_objective,
    to_tokens,
)
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.losses.balance import BalanceWeight
from pixelgen.losses.gate import SCHEDULES, NoiseGate, Selection
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.objective import Objective

# --- the gate in the objective ---


def test_gated_out_samples_get_exactly_zero_gradient():
    stages = TwoStages()
    objective = make_objective(lpips=LPIPS(stages, ops=select("auto")), alignment_weight=0)
    batch = make_batch()
    terms = objective(**batch)
    for name in ("lpips", "p_dino"):
        grad = grad_of(terms[name], batch["x_pred"])[0]
        assert (grad[0] == 0).all(), name
        assert all((grad[i] != 0).any() for i in (1, 2, 3)), name


def test_released_p_dino_gate_is_the_mean_over_all():
    objective = make_objective(p_dino_gate="released")
    batch = make_batch((0.1, 0.2, 0.29, 0.3))
    terms = objective(**batch)
    torch.testing.assert_close(terms["p_dino"], objective.per_sample["p_dino"].mean())
    assert all((g != 0).any() for g in grad_of(terms["p_dino"], batch["x_pred"])[0])
    torch.testing.assert_close(terms["lpips"], objective.per_sample["lpips"][3])  # LPIPS is gated per sample


@pytest.mark.parametrize(("mode", "p_dino"), [("paper", 0.0), ("released", 1.0)])
def test_nothing_gated_has_no_perceptual_gradient(mode, p_dino):
    objective = make_objective(p_dino_gate=mode)
    batch = make_batch((0.0, 0.1, 0.2, 0.29))
    terms = objective(**batch)
    assert float(terms["lpips"]) == 0 and float(terms["p_dino"]) == p_dino
    assert float(terms["gated_fraction"]) == 0
    assert not terms["lpips"].requires_grad and not terms["p_dino"].requires_grad
    grads = [grad_of(terms[name], batch["x_pred"])[0] for name in ("loss", "flow_matching")]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_gate_zero_is_no_gate(mode):
    objective = make_objective(p_dino_gate=mode, gate=NoiseGate("hard", 0.0))
    terms = objective(**make_batch((0.0, 0.1, 0.2, 0.29)))
    for name in ("lpips", "p_dino"):
        torch.testing.assert_close(terms[name], objective.per_sample[name].mean())
    assert float(terms["gated_fraction"]) == 1


# --- gathering ---

GATES = [("hard", "released"), *((schedule, "paper") for schedule in SCHEDULES)]


def masked(objective: Objective, batch: dict[str, Tensor], **arguments: Any) -> dict[str, Tensor]:
    """The same terms with every image through every network, as where the host does not know t."""

    def everyone(t: Tensor, gate: NoiseGate, *, device: torch.device) -> Selection:
        return Selection(None, None, gate.passes(t))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixelgen.losses.objective.select_samples", everyone)
        return objective(**batch, **arguments)


@pytest.mark.parametrize(("schedule", "mode"), GATES)
def test_gathering_gives_the_loss_and_gradients_of_masking(schedule, mode):
    stages = CountingStages()
    objective = make_objective(
        lpips=LPIPS(stages, ops=select("auto")),
        gate=NoiseGate(schedule, 0.4, 0.05),
        p_dino_gate=mode,
        adversarial_weight=0.1,
    )
    batch = make_batch((0.1, 0.05, 0.9, 0.6))
    leaves = (batch["x_pred"], batch["features"], *objective.parameters())
    gathered = objective(**batch)
    assert stages.seen == 2 * 2
    grads = grad_of(gathered["loss"], *leaves)
    per_sample = objective.per_sample
    expected = masked(objective, batch)
    assert stages.seen == 2 * 2 + 2 * B
    for name in expected:
        torch.testing.assert_close(gathered[name], expected[name])
    for actual, wanted in zip(grads, grad_of(expected["loss"], *leaves), strict=True):
        torch.testing.assert_close(actual, wanted)
    for name, values in per_sample.items():
        is_seen = values != 0
        torch.testing.assert_close(values[is_seen], objective.per_sample[name][is_seen])


def test_no_network_runs_when_no_sample_passes():
    stages, encoder = CountingStages(), MeanTokens()
    objective = make_objective(
        lpips=LPIPS(stages, ops=select("auto")), encoder=encoder, adversarial_weight=0.1
    )
    terms = objective(**make_batch((0.0, 0.1, 0.2, 0.29)))
    assert stages.seen == 0
    assert encoder.calls == [False]  # the clean images, for the alignment
    assert "adversarial" not in terms and float(terms["lpips"]) == 0


def test_alignment_follows_its_schedule():
    encoder = MeanTokens()
    objective = make_objective(
        encoder=encoder, lpips_weight=0, p_dino_weight=0, alignment_schedule=[(10, 0.1), (20, 0.0)]
    )
    weights = [objective.alignment_weight(step) for step in (0, 9, 10, 19, 20, 10**6)]
    assert weights == [0.5, 0.5, 0.1, 0.1, 0.0, 0.0]
    batch = make_batch()
    for step, weight in ((0, 0.5), (10, 0.1)):
        terms = objective(**batch, step=step)
        torch.testing.assert_close(terms["loss"], terms["flow_matching"] + weight * terms["alignment"])
    encoder.calls.clear()
    batch.pop("features")  # not needed any more
    assert "alignment" not in objective(**batch, step=20) and encoder.calls == []


def test_adversarial_term_starts_at_its_step():
    objective = make_objective(adversarial_weight=0.3, adversarial_start_step=5, alignment_weight=0)
    batch = make_batch()
    before = objective(**batch, step=4)
    assert "adversarial" not in before and "discriminator" not in before
    terms = objective(**batch, step=5)
    expected = before["loss"] + 0.3 * terms["adversarial"] + terms["discriminator"]
    torch.testing.assert_close(terms["loss"], expected)
    assert (grad_of(terms["adversarial"], batch["x_pred"])[0][0] == 0).all()  # gated out
    assert any(key.startswith("discriminator.") for key in objective.state_dict())


# --- the balance weight ---


def balanced(objective: Objective, t: Tensor, step: int = 0) -> dict[str, Tensor]:
    """The terms where the prediction comes from a layer whose weight the balance looks at."""
    linear, batch = nn.Linear(5, C * P * P), make_batch()
    x_pred, x = linear(torch.randn(B, T, 5)), to_tokens(batch["x"])
    return objective(x_pred, x, t, batch["features"], step=step, balance_parameter=linear.weight)


def test_global_balance_keeps_its_weight_when_nothing_passes():
    objective = make_objective(balance="global", balance_start_step=0, alignment_weight=0)
    assert float(balanced(objective, torch.zeros(B))["balance_weight"]) == 1.0
    assert float(balanced(objective, torch.ones(B))["balance_weight"]) != 1.0


def test_balance_weight_follows_the_released_formula():
    objective = make_objective(
        balance="released", balance_start_step=100, balance_every=50, perceptual_ratio=3.0, alignment_weight=0
    )
    assert objective.balance is not None
    linear = nn.Linear(5, C * P * P, bias=False)
    hidden, batch = torch.randn(B, T, 5), make_batch()
    expected = 1.0
    for step in (99, 50, 100, 101, 149, 150):
        terms = objective(
            linear(hidden), to_tokens(batch["x"]), batch["t"], step=step, balance_parameter=linear.weight
        )
        if step in (100, 150):
            perceptual = 0.1 * terms["lpips"] + 0.01 * terms["p_dino"]
            flow_norm, perceptual_norm = (
                float(grad_of(value, linear.weight)[0].norm())
                for value in (terms["flow_matching"], perceptual)
            )
            expected = 0.8 * expected + 0.2 * min(max(flow_norm / (perceptual_norm + 1e-4), 0), 100)
        assert float(terms["balance_weight"]) == pytest.approx(expected, rel=1e-5), step
        total = terms["flow_matching"] + 3 * terms["balance_weight"] * (
            0.1 * terms["lpips"] + 0.01 * terms["p_dino"]
        )
        torch.testing.assert_close(terms["loss"], total)
        terms["loss"].backward()
    assert expected != 1.0


def test_balance_weight_hits_its_clamp_when_nothing_is_gated():
    """As in the released code: with no perceptual gradient the ratio is clamped, the weight jumps to 20.8."""
    objective = make_objective(balance="released", balance_start_step=0, alignment_weight=0)
    weight = balanced(objective, torch.zeros(B))["balance_weight"]
    assert float(weight) == pytest.approx(0.8 + 0.2 * 100)


def test_balance_weight_is_saved_and_restored():
    objective = make_objective(balance="released")
    objective.balance.weight.fill_(2.5)
    other = make_objective(balance="released")
    other.load_state_dict(objective.state_dict())
    assert other.balance is not None and float(other.balance.weight) == 2.5
    terms = other(**make_batch(), step=1)  # not due: needs no parameter
    assert float(terms["balance_weight"]) == 2.5


def test_balance_needs_its_parameter_and_sane_constants():
    objective = make_objective(balance="released", balance_start_step=0)
    with pytest.raises(ValueError, match="balance_parameter must be given"):
        objective(**make_batch(), step=0)
    with pytest.raises(ValueError, match=r"every >= 1, got 0 and 0"):
        BalanceWeight(0, 0)


def test_global_balance_is_not_blown_up_by_a_ramp_that_is_nearly_zero():
    """All samples pass a cosine gate, with weights that sum to 1e-4 or so: as good as none."""
    gate = NoiseGate("cosine", 0.3, 0.2)
    objective = make_objective(gate=gate, balance="global", balance_start_step=0, alignment_weight=0)
    t = torch.full((B,), 0.301)
    assert gate.passes(t).all() and 0 < float(gate(t).sum()) < 1e-3
    assert float(balanced(objective, t)["balance_weight"]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("form", ["released", "global"])
def test_a_learned_gate_and_a_balance_bear_a_batch_in_which_nothing_passes(form):
    objective = make_objective(gate=NoiseGate("learned"), balance=form, balance_start_step=0)
    terms = balanced(objective, torch.zeros(B))
    terms["loss"].backward()
    assert terms["loss"].isfinite() and float(terms["gate_penalty"]) == 0


def _move_balance(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    print(_balance_of(rank))
    torch.distributed.destroy_process_group()


def _balance_of(*parts: int) -> float:
    """The weight after an update by parts of a batch, each with its share of the terms and the gate."""
    balance = BalanceWeight(0, 1, form="global")
    balance.parts = len(parts)
    parameter = torch.ones(3, requires_grad=True)
    for part in parts:
        assert float(balance.weight) == 1
        flow = (parameter * torch.tensor([1.0 + part, 2.0, -part])).sum() / 2
        perceptual = (parameter**2).sum() * (1 + 4 * part) / 2
        # the gates' weights sum to 0.75: to less than one sample
        balance.update(flow, perceptual, parameter, torch.tensor(0.25 + 0.25 * part))
    return float(balance.weight)


def test_global_balance_agrees_over_processes_and_parts(tmp_path):
    with (tmp_path / "errors").open("w") as errors:
        processes = [
            Forked([__file__, str(rank), str(tmp_path / "store")], stderr=errors) for rank in range(2)
        ]
    printed = ["".join(process.lines(120)) for process in processes]
    assert [process.wait(60) for process in processes] == [0, 0], (tmp_path / "errors").read_text()
    first, second = map(float, printed)
    flow, perceptual = math.hypot(1.5, 2, -0.5), math.sqrt(3) * 6
    rate = 0.2 * 0.75
    expected = (1 - rate) * 1 + rate * flow / (perceptual + 1e-4)
    assert first == second == pytest.approx(expected, rel=1e-5)
    assert _balance_of(0, 1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("schedule", "p_dino_gate"), GATES)
def test_the_terms_of_parts_add_up_to_those_of_the_whole(schedule, p_dino_gate):
    """Values and gradients, whatever the parts hold: here one in which nothing passes the gate."""
    gate = NoiseGate(schedule, 0.4, 0.2)
    objective = make_objective(
        gate=gate,
        p_dino_gate=p_dino_gate,
        lpips=LPIPS(TwoStages(), ops=select("auto")),
        adversarial_weight=0.2,
    )
    batch = make_batch((0.1, 0.2, 0.55, 0.9))
    leaves = (batch["x_pred"], *(parameter for parameter in objective.parameters()))
    whole = objective(**batch)
    wanted = grad_of(whole["loss"], *leaves)
    parts, gradients = [], []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 4)):
        part = {name: value[rows] for name, value in batch.items()}
        parts.append(objective(**part, whole_t=batch["t"]))
        gradients.append(grad_of(parts[-1]["loss"], *leaves))
    for name, value in whole.items():
        total = sum(float(part.get(name, 0)) for part in parts)
        assert total == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    for expected, *shares in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(torch.stack(shares).sum(0), expected, rtol=1e-4, atol=1e-6)


# --- schedules ---


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_weighs_the_terms(schedule):
    """The terms and the loss are sums of gate times distance, by the number that pass; no more, no less."""
    gate, encoder, stages = NoiseGate(schedule, 0.4, 0.2), MeanTokens(), TwoStages()
    if schedule == "learned":
        with torch.no_grad():
            gate.log_scale.copy_(torch.linspace(-1, 1, gate.bins))
    lpips = LPIPS(stages, ops=select("auto"))
    objective = make_objective(
        gate=gate, lpips=lpips, encoder=encoder, lpips_weight=0.3, p_dino_weight=0.7, adversarial_weight=0.2
    )
    batch = make_batch((0.1, 0.42, 0.55, 0.9))
    x_pred, x, t, _ = batch.values()
    terms = objective(**batch)

    keep, weight = gate.passes(t), gate(t)
    assert keep.tolist() == [False, True, True, True]
    if schedule != "hard":
        assert len(set(weight[keep].tolist())) == 3 or schedule == "cosine"
    of_lpips = lpips(x_pred, x)
    of_dino = 1 - F.cosine_similarity(encoder(x_pred), encoder(x), dim=-1).mean(1)
    # The adversarial term does not train the gate.
    of_generator = weight.detach() * objective.discriminator.generator_term(encoder(x_pred))
    expected = {
        "lpips": (weight * of_lpips)[keep].sum() / 3,
        "p_dino": (weight * of_dino)[keep].sum() / 3,
        "adversarial": of_generator[keep].sum() / 3,
    }
    total = terms["flow_matching"] + 0.5 * terms["alignment"] + terms["discriminator"]
    total = total + 0.3 * expected["lpips"] + 0.7 * expected["p_dino"] + 0.2 * expected["adversarial"]
    if schedule == "learned":
        mean = (0.3 * of_lpips + 0.7 * of_dino)[keep].mean().detach()
        bins = (t * gate.bins).long()
        expected["gate_penalty"] = mean * gate.log_scale[bins][keep].mean()
        total = total + expected["gate_penalty"]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(terms["loss"], total, rtol=1e-5, atol=1e-6)
    leaves = (x_pred, *gate.parameters())
    for actual, wanted in zip(grad_of(terms["loss"], *leaves), grad_of(total, *leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("passing", [0, 2])
def test_the_released_gate_needs_no_count_on_the_host(passing):
    """With t on another device all samples are encoded; whether one passes is decided there."""
    objective = make_objective(p_dino_gate="released")
    batch = make_batch((0.9,) * passing + (0.1,) * (B - passing))
    expected = objective(**batch)["p_dino"]
    torch.testing.assert_close(masked(objective, batch)["p_dino"], expected)
    assert float(expected) == 1 if passing == 0 else 0 < float(expected) < 1


def test_the_released_gate_knows_no_ramps():
    with pytest.raises(ValueError, match=r"p_dino_gate must be 'paper' .*'released' and 'cosine'"):
        make_objective(p_dino_gate="released", gate=NoiseGate("cosine"))


if __name__ == "__main__":
    _move_balance(int(sys.argv[1]), sys.argv[2])
