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
    terms_of,
    to_tokens,
    values_of,
)
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.config import LossConfig, TrainConfig
from pixelgen.errors import UserError
from pixelgen.losses.balance import BalanceWeight
from pixelgen.losses.gate import NoiseGate, Selection
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.objective import Objective
from pixelgen.losses.times import Times

# --- the gate in the objective ---


def test_gated_out_samples_get_exactly_zero_gradient():
    stages = TwoStages()
    objective = make_objective(lpips=LPIPS(stages, ops=select("auto")), alignment_weight=0)
    batch = make_batch()
    terms = terms_of(objective, batch)
    for name in ("lpips", "p_dino"):
        grad = grad_of(terms[name], batch["x_pred"])[0]
        assert (grad[0] == 0).all(), name
        assert all((grad[i] != 0).any() for i in (1, 2, 3)), name


def test_released_p_dino_gate_is_the_mean_over_all():
    objective = make_objective(p_dino_gate="released")
    batch = make_batch((0.1, 0.2, 0.29, 0.3))
    terms, per_sample = values_of(objective, batch)
    torch.testing.assert_close(terms["p_dino"], per_sample["p_dino"].mean())
    assert all((g != 0).any() for g in grad_of(terms["p_dino"], batch["x_pred"])[0])
    torch.testing.assert_close(terms["lpips"], per_sample["lpips"][3])  # LPIPS is gated per sample


@pytest.mark.parametrize(("mode", "p_dino"), [("paper", 0.0), ("released", 1.0)])
def test_nothing_gated_has_no_perceptual_gradient(mode, p_dino):
    objective = make_objective(p_dino_gate=mode)
    batch = make_batch((0.0, 0.1, 0.2, 0.29))
    terms = terms_of(objective, batch)
    assert float(terms["lpips"]) == 0 and float(terms["p_dino"]) == p_dino
    assert float(terms["gated_fraction"]) == 0
    assert not terms["lpips"].requires_grad and not terms["p_dino"].requires_grad
    grads = [grad_of(terms[name], batch["x_pred"])[0] for name in ("loss", "flow_matching")]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_gate_zero_is_no_gate(mode):
    objective = make_objective(p_dino_gate=mode, gate_t=0.0)
    terms, per_sample = values_of(objective, make_batch((0.0, 0.1, 0.2, 0.29)))
    for name in ("lpips", "p_dino"):
        torch.testing.assert_close(terms[name], per_sample[name].mean())
    assert float(terms["gated_fraction"]) == 1


# --- gathering ---

SCHEDULES = ("hard", "cosine", "sigmoid", "snr", "learned")
GATES = [("hard", "released"), *((schedule, "paper") for schedule in SCHEDULES)]


def masked(objective: Objective, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same values with every image through every network."""

    def everyone(times: Times, gate: NoiseGate) -> Selection:
        return Selection(None, gate.passes(times.t))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixelgen.losses.objective.select_samples", everyone)
        return values_of(objective, batch)


@pytest.mark.parametrize(("schedule", "mode"), GATES)
def test_gathering_gives_the_loss_and_gradients_of_masking(schedule, mode):
    stages = CountingStages()
    objective = make_objective(
        lpips=LPIPS(stages, ops=select("auto")),
        gate=schedule,
        gate_t=0.4,
        gate_width=0.05,
        p_dino_gate=mode,
        adversarial_weight=0.1,
    )
    batch = make_batch((0.1, 0.05, 0.9, 0.6))
    leaves = (batch["x_pred"], batch["features"], *objective.parameters())
    gathered, per_sample = values_of(objective, batch)
    assert stages.seen == 2 * 2
    grads = grad_of(gathered["loss"], *leaves)
    expected, expected_per_sample = masked(objective, batch)
    assert stages.seen == 2 * 2 + 2 * B
    for name in expected:
        torch.testing.assert_close(gathered[name], expected[name])
    for actual, wanted in zip(grads, grad_of(expected["loss"], *leaves), strict=True):
        torch.testing.assert_close(actual, wanted)
    for name, values in per_sample.items():
        is_seen = values != 0
        torch.testing.assert_close(values[is_seen], expected_per_sample[name][is_seen])


def test_no_network_runs_when_no_sample_passes():
    stages, encoder = CountingStages(), MeanTokens()
    objective = make_objective(
        lpips=LPIPS(stages, ops=select("auto")), encoder=encoder, adversarial_weight=0.1
    )
    terms = terms_of(objective, make_batch((0.0, 0.1, 0.2, 0.29)))
    assert stages.seen == 0
    assert encoder.calls == [False]  # the clean images, for the alignment
    assert "adversarial" not in terms and float(terms["lpips"]) == 0


def test_alignment_follows_its_schedule():
    encoder = MeanTokens()
    objective = make_objective(
        encoder=encoder, lpips_weight=0, p_dino_weight=0, alignment_schedule=((10, 0.1), (20, 0.0))
    )
    (alignment,) = [term for term in objective.terms if term.name == "alignment"]
    weights = [alignment.options.weight(step) for step in (0, 9, 10, 19, 20, 10**6)]
    assert weights == [0.5, 0.5, 0.1, 0.1, 0.0, 0.0]
    batch = make_batch()
    for step, weight in ((0, 0.5), (10, 0.1)):
        terms = terms_of(objective, batch, step=step)
        torch.testing.assert_close(terms["loss"], terms["flow_matching"] + weight * terms["alignment"])
    encoder.calls.clear()
    batch.pop("features")  # not needed any more
    assert "alignment" not in terms_of(objective, batch, step=20) and encoder.calls == []


def test_adversarial_term_starts_at_its_step():
    objective = make_objective(adversarial_weight=0.3, adversarial_start_step=5, alignment_weight=0)
    batch = make_batch()
    before = terms_of(objective, batch, step=4)
    assert "adversarial" not in before and "discriminator" not in before
    terms = terms_of(objective, batch, step=5)
    expected = before["loss"] + 0.3 * terms["adversarial"] + terms["discriminator"]
    torch.testing.assert_close(terms["loss"], expected)
    assert (grad_of(terms["adversarial"], batch["x_pred"])[0][0] == 0).all()  # gated out
    assert any(key.startswith("discriminator.") for key in objective.state_dict())


# --- the balance weight ---


def balanced(t: Tensor, **options: Any) -> float:
    """The balance weight after a step in which the prediction comes from a layer whose weight it looks at."""
    linear, batch = nn.Linear(5, C * P * P), make_batch()
    objective = make_objective(balance_start_step=0, balance_parameter=lambda: linear.weight, **options)
    tokens = linear(torch.randn(B, T, 5))
    outcome = objective(tokens, to_tokens(batch["x"]), batch["x"], Times.of(t), batch["features"])
    outcome.loss.backward()
    assert outcome.loss.isfinite() and objective.balance is not None
    if options.get("gate") == "learned":
        assert float(outcome.terms["gate_penalty"]) == 0
    return float(objective.balance.weight)


def test_global_balance_keeps_its_weight_when_nothing_passes():
    assert balanced(torch.zeros(B), balance="global", alignment_weight=0) == 1.0
    assert balanced(torch.ones(B), balance="global", alignment_weight=0) != 1.0


def test_balance_weight_follows_the_released_formula():
    linear = nn.Linear(5, C * P * P, bias=False)
    objective = make_objective(
        balance="released",
        balance_start_step=100,
        balance_every=50,
        perceptual_ratio=3.0,
        alignment_weight=0,
        balance_parameter=lambda: linear.weight,
    )
    assert objective.balance is not None
    hidden, batch = torch.randn(B, T, 5), make_batch()
    expected = 1.0
    for step in (99, 50, 100, 101, 149, 150):
        times = Times.of(batch["t"])
        outcome = objective(linear(hidden), to_tokens(batch["x"]), batch["x"], times, step=step)
        terms, weight = outcome.terms, objective.balance.weight
        if step in (100, 150):
            perceptual = 0.1 * terms["lpips"] + 0.01 * terms["p_dino"]
            flow_norm, perceptual_norm = (
                float(grad_of(value, linear.weight)[0].norm())
                for value in (terms["flow_matching"], perceptual)
            )
            expected = 0.8 * expected + 0.2 * min(max(flow_norm / (perceptual_norm + 1e-4), 0), 100)
        assert float(weight) == pytest.approx(expected, rel=1e-5), step
        total = terms["flow_matching"] + 3 * weight * (0.1 * terms["lpips"] + 0.01 * terms["p_dino"])
        torch.testing.assert_close(outcome.loss, total)
        outcome.loss.backward()
    assert expected != 1.0


def test_balance_weight_hits_its_clamp_when_nothing_is_gated():
    """As in the released code: with no perceptual gradient the ratio is clamped, the weight jumps to 20.8."""
    weight = balanced(torch.zeros(B), balance="released", alignment_weight=0)
    assert weight == pytest.approx(0.8 + 0.2 * 100)


def test_balance_weight_is_saved_and_restored():
    objective = make_objective(balance="released")
    objective.balance.weight.fill_(2.5)
    other = make_objective(balance="released")
    other.load_state_dict(objective.state_dict())
    assert other.balance is not None and float(other.balance.weight) == 2.5
    terms_of(other, make_batch(), step=1)  # not due
    assert float(other.balance.weight) == 2.5


def test_balance_needs_its_parameter():
    with pytest.raises(ValueError, match="balance_parameter must be given"):
        make_objective(balance="released", balance_parameter=None)


def test_global_balance_is_not_blown_up_by_a_ramp_that_is_nearly_zero():
    """All samples pass a cosine gate, with weights that sum to 1e-4 or so: as good as none."""
    gate = NoiseGate("cosine", 0.3, 0.2)
    t = torch.full((B,), 0.301)
    assert gate.passes(t).all() and 0 < float(gate(t).sum()) < 1e-3
    weight = balanced(t, gate="cosine", gate_t=0.3, gate_width=0.2, balance="global", alignment_weight=0)
    assert weight == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("form", ["released", "global"])
def test_a_learned_gate_and_a_balance_bear_a_batch_in_which_nothing_passes(form):
    assert math.isfinite(balanced(torch.zeros(B), gate="learned", balance=form))


def _move_balance(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    print(_balance_of(rank))
    torch.distributed.destroy_process_group()


def _balance_of(*parts: int) -> float:
    """The weight after an update by parts of a batch, each with its share of the terms and the gate."""
    balance = BalanceWeight(0, 1, form="global", parts=len(parts))
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
    objective = make_objective(
        gate=schedule,
        gate_t=0.4,
        p_dino_gate=p_dino_gate,
        lpips=LPIPS(TwoStages(), ops=select("auto")),
        adversarial_weight=0.2,
    )
    batch = make_batch((0.1, 0.2, 0.55, 0.9))
    leaves = (batch["x_pred"], *(parameter for parameter in objective.parameters()))
    whole = terms_of(objective, batch)
    wanted = grad_of(whole["loss"], *leaves)
    parts, gradients = [], []
    for rows in (range(2), range(2, 3), range(3, 4)):
        parts.append(terms_of(objective, batch, rows=rows))
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
    encoder, stages = MeanTokens(), TwoStages()
    lpips = LPIPS(stages, ops=select("auto"))
    objective = make_objective(
        gate=schedule,
        gate_t=0.4,
        lpips=lpips,
        encoder=encoder,
        lpips_weight=0.3,
        p_dino_weight=0.7,
        adversarial_weight=0.2,
    )
    gate = objective.gate
    if schedule == "learned":
        with torch.no_grad():
            gate.log_scale.copy_(torch.linspace(-1, 1, gate.bins))
    batch = make_batch((0.1, 0.42, 0.55, 0.9))
    x_pred, x, t, _ = batch.values()
    terms = terms_of(objective, batch)

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


def test_the_released_gate_knows_no_ramps():
    with pytest.raises(UserError, match=r"p_dino_gate must be paper with loss.gate cosine"):
        TrainConfig(loss=LossConfig(p_dino_gate="released", gate="cosine"))


if __name__ == "__main__":
    _move_balance(int(sys.argv[1]), sys.argv[2])
