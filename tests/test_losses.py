"""The training objective: each term against its formula, what is computed, and what is saved."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from objectives import (
    B,
    C,
    MeanTokens,
    P,
    TwoStages,
    grad_of,
    make_batch,
    make_objective,
    mean_absolute,
    to_tokens,
)
from pixelgen_kernels import select
from torch import Tensor

from pixelgen.config import LossConfig
from pixelgen.encoders.embedded import EmbeddedConfig, EmbeddedFeatures, EmbeddedStages, EmbeddedTokens
from pixelgen.losses.build import build_objective
from pixelgen.losses.gate import masked_sum
from pixelgen.losses.lpips import LPIPS
from pixelgen.models.sizes import model_config

# --- the reductions ---


def test_masked_sum_is_the_sum_of_what_is_kept():
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    kept = masked_sum(values, torch.tensor([True, False, True]))
    assert float(kept) == 7.0 and grad_of(kept, values)[0].tolist() == [1.0, 0.0, 1.0]
    assert float(masked_sum(torch.tensor([1.0, math.nan]), torch.tensor([True, False]))) == 1.0
    nothing = masked_sum(values, torch.zeros(3, dtype=torch.bool))
    assert float(nothing) == 0 and grad_of(nothing, values)[0].tolist() == [0.0, 0.0, 0.0]


# --- the terms ---


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_terms_equal_their_formulas(kernels):
    stages, encoder = TwoStages(), MeanTokens()
    objective = make_objective(encoder=encoder, lpips=LPIPS(stages, ops=select(kernels)), kernels=kernels)
    batch = make_batch()
    x_pred, x, t, features = batch.values()
    terms = objective(**batch)

    velocity_error = (x_pred - x) / (1 - t).clamp_min(0.05)[:, None, None, None]
    flow = velocity_error.square().mean((1, 2, 3))
    target = encoder(x)
    repa = 1 - F.cosine_similarity(objective.projector(features), target, dim=-1).mean(1)
    dino = 1 - F.cosine_similarity(encoder(x_pred), target, dim=-1).mean(1)
    lpips = torch.zeros(B)
    for p, q, w in zip(stages(x_pred), stages(x), stages.layer_weights, strict=True):
        difference = F.normalize(p, dim=1, eps=1e-10) - F.normalize(q, dim=1, eps=1e-10)
        lpips = lpips + (difference.square() * w[:, None, None]).sum(1).mean((1, 2))
    keep = t >= 0.3
    expected = {"flow_matching": flow, "alignment": repa, "lpips": lpips * keep, "p_dino": dino * keep}
    assert objective.per_sample.keys() == expected.keys()
    for name, value in expected.items():
        assert objective.per_sample[name].shape == (B,) and objective.per_sample[name].dtype == torch.float32
        torch.testing.assert_close(objective.per_sample[name], value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["flow_matching"], flow.mean())
    torch.testing.assert_close(terms["alignment"], repa.mean())
    torch.testing.assert_close(terms["lpips"], lpips[keep].mean())
    torch.testing.assert_close(terms["p_dino"], dino[keep].mean())
    loss = flow.mean() + 0.5 * repa.mean() + 0.1 * lpips[keep].mean() + 0.01 * dino[keep].mean()
    torch.testing.assert_close(terms["loss"], loss)
    assert float(terms["gated_fraction"]) == 0.75 and "balance_weight" not in terms
    gradients = (grad_of(value, x_pred, features) for value in (terms["loss"], loss))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_tokens_and_images_give_the_same_terms_and_gradients():
    objective = make_objective()
    batch = make_batch()
    expected = objective(**batch)
    grad = grad_of(expected["loss"], batch["x_pred"])[0]
    x_pred = to_tokens(batch["x_pred"]).detach().requires_grad_()
    terms = objective(x_pred, to_tokens(batch["x"]), batch["t"], batch["features"])
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name])
    torch.testing.assert_close(grad_of(terms["loss"], x_pred)[0], to_tokens(grad))


def test_lpips_resizes_to_16_pixels_per_patch():
    seen: list[tuple[int, ...]] = []

    class Record(TwoStages):
        def forward(self, x: Tensor) -> list[Tensor]:
            seen.append(tuple(x.shape))
            self.last = x
            return super().forward(x)

    stages = Record()
    x = torch.randn(1, C, 24, 40)
    LPIPS(stages, ops=select("auto"))(x, x)
    LPIPS(stages, ops=select("auto"), resize_from_patch=32)(x, x)
    assert seen == [(1, C, 24, 40)] * 2 + [(1, C, 12, 20)] * 2
    expected = F.interpolate(x, size=(12, 20), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(stages.last, expected)


# --- what is computed ---


def test_one_target_encoding_without_gradient_serves_both_terms():
    encoder = MeanTokens()
    make_objective(encoder=encoder)(**make_batch())
    assert encoder.calls == [False, True]


def refuse(*_: Tensor) -> Tensor:
    raise AssertionError("a term of weight 0 must not be computed")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"alignment_weight": 0, "lpips_weight": 0, "p_dino_weight": 0}, set()),
        ({"alignment_weight": 0, "p_dino_weight": 0, "encoder": None}, {"lpips"}),
        ({"lpips_weight": 0, "lpips": refuse}, {"alignment", "p_dino"}),
        ({"perceptual_ratio": 0, "lpips": refuse}, {"alignment"}),
        ({"alignment_weight": 0, "lpips_weight": 0, "lpips": None}, {"p_dino"}),
    ],
)
def test_a_term_of_weight_zero_is_not_computed(overrides, names):
    objective = make_objective(**overrides)
    batch = make_batch()
    if "alignment" not in names:
        batch.pop("features")
    terms = objective(**batch)
    assert terms.keys() == names | {"loss", "flow_matching", "gated_fraction"}
    if not names:
        assert torch.equal(terms["loss"], terms["flow_matching"])
        assert objective.encoder.calls == []
    if "p_dino" not in names and objective.encoder is not None:
        assert True not in objective.encoder.calls  # the prediction is not encoded


def test_weights_scale_their_terms():
    batch = make_batch()
    base, double = (make_objective(alignment_weight=0, perceptual_ratio=r)(**batch) for r in (1, 2))
    perceptual = base["loss"] - base["flow_matching"]
    torch.testing.assert_close(double["loss"] - double["flow_matching"], 2 * perceptual, rtol=1e-3, atol=1e-6)


def test_embedded_trunk_runs_once_per_image_and_changes_nothing(monkeypatch):
    features = EmbeddedFeatures(EmbeddedConfig(channels=C, patch_size=P))
    stages, tokens = EmbeddedStages(features), EmbeddedTokens(features)
    count = 0
    run = EmbeddedFeatures.stages

    def counted(self: EmbeddedFeatures, x: Tensor) -> list[Tensor]:
        nonlocal count
        count += 1
        return run(self, x)

    monkeypatch.setattr(EmbeddedFeatures, "stages", counted)
    lpips = LPIPS(stages, ops=select("auto"))
    batch = make_batch()
    objective = make_objective(encoder=tokens, lpips=lpips)
    terms = objective(**batch)
    assert count == 2
    plain = make_objective(encoder=tokens, lpips=lambda x_pred, x: lpips(x_pred, x))
    plain.load_state_dict(objective.state_dict())
    expected = plain(**batch)
    assert count == 6
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name])
    grads = [grad_of(value["loss"], batch["x_pred"])[0] for value in (terms, expected)]
    torch.testing.assert_close(*grads)


# --- what is trained, saved and moved ---


def test_frozen_encoders_are_neither_saved_nor_trained_but_follow_the_device():
    objective = make_objective(lpips=LPIPS(TwoStages(), ops=select("auto")), balance="released")
    keys = {f"projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert objective.state_dict().keys() == keys | {"balance.weight"}
    assert {name for name, _ in objective.named_parameters()} == keys
    objective.train()
    assert not objective.encoder.training
    objective.to("meta")
    assert objective.encoder.matrix.device.type == "meta"
    assert objective.lpips.stages.first.weight.device.type == "meta"
    assert all(weight.device.type == "meta" for weight in objective.lpips.stages.layer_weights)


def test_without_alignment_nothing_is_trained():
    objective = make_objective(alignment_weight=0)
    assert not list(objective.parameters()) and not objective.state_dict()


def test_bfloat16_autocast_keeps_terms_in_float32():
    objective = make_objective(lpips=LPIPS(TwoStages(), ops=select("auto")))
    batch = make_batch()
    exact = objective(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(batch["x_pred"].bfloat16(), batch["x"], batch["t"], batch["features"].bfloat16())
    assert all(value.dtype == torch.float32 for value in (*terms.values(), *objective.per_sample.values()))
    for name in exact:
        torch.testing.assert_close(terms[name], exact[name], rtol=3e-2, atol=3e-2)
    outside = objective(batch["x_pred"].bfloat16(), batch["x"], batch["t"], batch["features"].bfloat16())
    assert outside["loss"].dtype == torch.float32 and outside["loss"].isfinite()


def test_non_finite_predictions_show_in_the_loss_and_name_their_sample():
    batch = make_batch()
    with torch.no_grad():
        batch["x_pred"][2, 0, 0, 0] = math.nan
    objective = make_objective(lpips=LPIPS(TwoStages(), ops=select("auto")))
    assert objective(**batch)["loss"].isnan()
    for name in ("flow_matching", "lpips", "p_dino"):
        assert (~objective.per_sample[name].isfinite()).tolist() == [False, False, True, False], name


def test_flat_features_have_finite_gradient():
    """All-zero feature maps, where the square root of LPIPS' norm has no derivative."""
    batch = make_batch()
    with torch.no_grad():
        batch["x_pred"].zero_()
    stages = TwoStages()
    stages.first.bias.fill_(-10)
    terms = make_objective(lpips=LPIPS(stages, ops=select("auto")))(**batch)
    assert all(grad.isfinite().all() for grad in grad_of(terms["loss"], batch["x_pred"], batch["features"]))


# --- errors ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lpips_weight": -0.1}, r"lpips_weight must not be negative, got -0.1"),
        ({"p_dino_gate": "none"}, r"p_dino_gate must be 'paper' or 'released', got 'none'"),
        ({"balance": "on"}, r"balance must be 'off', 'released' or 'global', got 'on'"),
        (
            {"alignment_schedule": [(5, 0.1), (5, 0.0)]},
            r"alignment_schedule's steps must increase, got \[5, 5\]",
        ),
        ({"alignment_schedule": [(5, -1.0)]}, r"alignment_schedule's weight of step 5 must not be negative"),
        ({"encoder": None}, r"encoder must be given"),
        ({"lpips": None}, r"lpips must be given"),
    ],
)
def test_bad_construction_is_refused(overrides, message):
    with pytest.raises(ValueError, match=f"Objective: {message}"):
        make_objective(**overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(x=b["x"][:3]), r"x_pred and x must both be tokens"),
        (lambda b: b.update(t=torch.zeros(B, 1)), r"t must have shape \(B,\) = \(4,\), got \(4, 1\)"),
        (lambda b: b.pop("features"), r"features must be given"),
        (
            lambda b: b.update(features=b["features"][:, 1:]),
            r"features must have one row per token .*\(4, 3, 6\)",
        ),
    ],
)
def test_bad_batches_are_refused(change, message):
    batch = make_batch()
    change(batch)
    with pytest.raises(ValueError, match=f"Objective: {message}"):
        make_objective()(**batch)


def test_lpips_of_another_shape_is_refused():
    def four_dimensional(x_pred: Tensor, x: Tensor) -> Tensor:
        return mean_absolute(x_pred, x)[:, None, None, None]

    with pytest.raises(ValueError, match=r"lpips must return \(B,\) = \(3,\), got \(3, 1, 1, 1\)"):
        make_objective(lpips=four_dimensional)(**make_batch())


# --- from a configuration ---


def test_build_objective_from_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", 1)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8), torch.arange(16) % 10
    model = model_config("tiny/2")
    objective = build_objective(LossConfig(), model, run_dir=tmp_path, images=lambda: images)
    x = torch.randn(2, model.num_tokens, model.patch_dim)
    terms = objective(x, x, torch.tensor([0.1, 0.9]), torch.randn(2, model.num_tokens, model.width))
    assert {"alignment", "lpips", "p_dino"} <= terms.keys()
    assert float(terms["lpips"]) == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "embedded_features.safetensors").is_file()

    def never() -> tuple[Tensor, Tensor]:
        raise AssertionError("no term needs the images")

    bare = LossConfig(alignment_weight=0, lpips_weight=0, p_dino_weight=0)
    plain = build_objective(bare, model, run_dir=tmp_path / "none", images=never)
    assert plain(x, x, torch.tensor([0.1, 0.9])).keys() == {"loss", "flow_matching", "gated_fraction"}
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:.*has random weights:UserWarning")
def test_build_objective_resizes_for_vgg_only():
    loss = LossConfig(alignment_weight=0, p_dino_weight=0, stages="vgg16", stages_weights="random")
    model = model_config("tiny/2")
    objective = build_objective(
        loss, model, run_dir="unused", images=lambda: (torch.empty(0), torch.empty(0))
    )
    assert objective.lpips.resize_from_patch == 2  # 8x8 digits are seen by VGG16 at 64x64
    x_pred = torch.randn(1, model.num_tokens, model.patch_dim, requires_grad=True)
    terms = objective(x_pred, torch.zeros_like(x_pred), torch.ones(1))
    assert float(terms["lpips"]) > 0 and (grad_of(terms["lpips"], x_pred)[0] != 0).any()
