"""The training objective: each term against its formula, what is computed, and what is saved."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from objectives import (
    B,
    C,
    MeanAbsolute,
    MeanTokens,
    P,
    TwoStages,
    grad_of,
    make_batch,
    make_objective,
    terms_of,
    to_tokens,
    values_of,
)
from pixelgen_kernels import select
from torch import Tensor

from pixelgen.config import LossConfig
from pixelgen.encoders.embedded import EmbeddedConfig, EmbeddedFeatures, EmbeddedTokens
from pixelgen.losses.build import build_objective
from pixelgen.losses.gate import masked_sum
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.times import Times
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import build_denoiser
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
    terms, per_sample = values_of(objective, batch)

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
    assert per_sample.keys() == expected.keys()
    for name, value in expected.items():
        assert per_sample[name].shape == (B,) and per_sample[name].dtype == torch.float32
        torch.testing.assert_close(per_sample[name], value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["flow_matching"], flow.mean())
    torch.testing.assert_close(terms["alignment"], repa.mean())
    torch.testing.assert_close(terms["lpips"], lpips[keep].mean())
    torch.testing.assert_close(terms["p_dino"], dino[keep].mean())
    loss = flow.mean() + 0.5 * repa.mean() + 0.1 * lpips[keep].mean() + 0.01 * dino[keep].mean()
    torch.testing.assert_close(terms["loss"], loss)
    assert float(terms["gated_fraction"]) == 0.75
    gradients = (grad_of(value, x_pred, features) for value in (terms["loss"], loss))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_clean_images_may_be_bytes_and_patches_channel_first():
    batch, first = make_batch(), lambda x: to_tokens(x).unflatten(2, (P * P, C)).transpose(2, 3).flatten(2)
    images = torch.randint(0, 256, batch["x"].shape, dtype=torch.uint8)
    batch["x"] = images.float() / 127.5 - 1
    objective = make_objective()
    expected = terms_of(objective, batch)
    other = make_objective(channel_order="first")
    other.load_state_dict(objective.state_dict())
    outcome = other(
        first(batch["x_pred"]), first(batch["x"]), images, Times.of(batch["t"]), batch["features"]
    )
    for name, value in {"loss": outcome.loss, **outcome.terms}.items():
        torch.testing.assert_close(value, expected[name])


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
    terms_of(make_objective(encoder=encoder), make_batch())
    assert encoder.calls == [False, True]


class Refuse(MeanAbsolute):
    """A distance that must not be asked for."""

    def encode(self, x: Tensor) -> list[Tensor]:
        raise AssertionError("a term of weight 0 must not be computed")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"alignment_weight": 0, "lpips_weight": 0, "p_dino_weight": 0}, set()),
        ({"alignment_weight": 0, "p_dino_weight": 0, "encoder": None}, {"lpips"}),
        ({"lpips_weight": 0, "lpips": Refuse()}, {"alignment", "p_dino"}),
        ({"perceptual_ratio": 0, "lpips": Refuse()}, {"alignment"}),
        ({"alignment_weight": 0, "lpips_weight": 0, "lpips": None}, {"p_dino"}),
    ],
)
def test_a_term_of_weight_zero_is_not_computed(overrides, names):
    objective = make_objective(**overrides)
    batch = make_batch()
    if "alignment" not in names:
        batch.pop("features")
    terms = terms_of(objective, batch)
    assert terms.keys() == names | {"loss", "flow_matching", "gated_fraction"}
    if not names:
        assert torch.equal(terms["loss"], terms["flow_matching"])
        assert objective.networks.encoder.calls == []
    if "p_dino" not in names and objective.networks.encoder is not None:
        assert True not in objective.networks.encoder.calls  # the prediction is not encoded


def test_weights_scale_their_terms():
    batch = make_batch()
    base, double = (terms_of(make_objective(alignment_weight=0, perceptual_ratio=r), batch) for r in (1, 2))
    perceptual = base["loss"] - base["flow_matching"]
    torch.testing.assert_close(double["loss"] - double["flow_matching"], 2 * perceptual, rtol=1e-3, atol=1e-6)


def test_embedded_trunk_runs_once_per_image_and_changes_nothing(monkeypatch):
    features = EmbeddedFeatures(EmbeddedConfig(channels=C, patch_size=P))
    tokens = EmbeddedTokens(features)
    count = 0
    run = EmbeddedFeatures.forward

    def counted(self: EmbeddedFeatures, x: Tensor) -> list[Tensor]:
        nonlocal count
        count += 1
        return run(self, x)

    monkeypatch.setattr(EmbeddedFeatures, "forward", counted)
    lpips = LPIPS(features, ops=select("auto"))
    batch = make_batch()
    objective = make_objective(encoder=tokens, lpips=lpips)
    terms = terms_of(objective, batch)
    assert count == 2
    apart = LPIPS(features, ops=select("auto"), resize_from_patch=16)
    plain = make_objective(encoder=tokens, lpips=apart)
    plain.load_state_dict(objective.state_dict())
    expected = terms_of(plain, batch)
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
    assert not objective.networks.encoder.training
    objective.to("meta")
    assert objective.networks.encoder.matrix.device.type == "meta"
    assert objective.networks.lpips.stages.first.weight.device.type == "meta"
    assert all(weight.device.type == "meta" for weight in objective.networks.lpips.stages.layer_weights)


def test_without_alignment_nothing_is_trained():
    objective = make_objective(alignment_weight=0)
    assert not list(objective.parameters()) and not objective.state_dict()


def test_bfloat16_autocast_keeps_terms_in_float32():
    objective = make_objective(lpips=LPIPS(TwoStages(), ops=select("auto")))
    batch = make_batch()
    exact = terms_of(objective, batch)
    half = batch | {name: batch[name].bfloat16() for name in ("x_pred", "features")}
    with torch.autocast("cpu", torch.bfloat16):
        terms, per_sample = values_of(objective, half)
    assert all(value.dtype == torch.float32 for value in (*terms.values(), *per_sample.values()))
    for name in exact:
        torch.testing.assert_close(terms[name], exact[name], rtol=3e-2, atol=3e-2)
    outside = terms_of(objective, half)
    assert outside["loss"].dtype == torch.float32 and outside["loss"].isfinite()


def test_non_finite_predictions_show_in_the_loss_and_name_their_sample():
    batch = make_batch()
    with torch.no_grad():
        batch["x_pred"][2, 0, 0, 0] = math.nan
    objective = make_objective(lpips=LPIPS(TwoStages(), ops=select("auto")))
    terms, per_sample = values_of(objective, batch)
    assert terms["loss"].isnan()
    for name in ("flow_matching", "lpips", "p_dino"):
        assert (~per_sample[name].isfinite()).tolist() == [False, False, True, False], name


def test_flat_features_have_finite_gradient():
    """All-zero feature maps, where the square root of LPIPS' norm has no derivative."""
    batch = make_batch()
    with torch.no_grad():
        batch["x_pred"].zero_()
    stages = TwoStages()
    stages.first.bias.fill_(-10)
    terms = terms_of(make_objective(lpips=LPIPS(stages, ops=select("auto"))), batch)
    assert all(grad.isfinite().all() for grad in grad_of(terms["loss"], batch["x_pred"], batch["features"]))


# --- errors ---


def test_times_of_other_samples_are_refused():
    batch = make_batch()
    x = to_tokens(batch["x"])
    with pytest.raises(ValueError, match="times must have 4 local samples, got 3"):
        make_objective()(x, x, batch["x"], Times.of(torch.zeros(B), range(3)), batch["features"])


@pytest.mark.parametrize("missing", ["encoder", "lpips"])
def test_a_network_that_a_term_needs_must_be_given(missing):
    with pytest.raises(ValueError, match=f"Objective: {missing} must be given"):
        make_objective(**{missing: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(x=b["x"][:3]), r"Objective: prediction and clean must be tokens"),
        (lambda b: b.update(t=torch.zeros(B, 1)), r"Times: whole must have shape \(W,\), got \(4, 1\)"),
        (lambda b: b.pop("features"), r"Objective: features must be given"),
        (
            lambda b: b.update(features=b["features"][:, 1:]),
            r"Objective: features must have one row per patch, .*\(4, 4\), got \(4, 3, 6\)",
        ),
    ],
)
def test_bad_batches_are_refused(change, message):
    batch = make_batch()
    change(batch)
    with pytest.raises(ValueError, match=message):
        terms_of(make_objective(), batch)


# --- from a configuration ---


def clean_batch(model: Denoiser, batch: int) -> tuple[Tensor, ...]:
    tokens = torch.zeros(batch, model.config.num_tokens, model.config.patch_dim)
    return tokens, torch.zeros(batch, model.config.channels, *model.config.image_height_width)


def test_build_objective_from_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr("pixelgen.encoders.embedded._PIXEL_BUDGET", 1)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8), torch.arange(16) % 10
    model = build_denoiser(model_config("tiny/2"))
    objective = build_objective(LossConfig(), model, run_dir=tmp_path, images=lambda: images)
    (x, pictures), times = clean_batch(model, 2), Times.of(torch.tensor([0.1, 0.9]))
    features = torch.randn(2, model.config.num_tokens, model.config.width)
    terms = objective(x, x, pictures, times, features).terms
    assert {"alignment", "lpips", "p_dino"} <= terms.keys()
    assert float(terms["lpips"]) == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "embedded_features.safetensors").is_file()

    def never() -> tuple[Tensor, Tensor]:
        raise AssertionError("no term needs the images")

    bare = LossConfig(alignment_weight=0, lpips_weight=0, p_dino_weight=0)
    plain = build_objective(bare, model, run_dir=tmp_path / "none", images=never)
    assert plain(x, x, pictures, times).terms.keys() == {"flow_matching", "gated_fraction"}
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:.*has random weights:UserWarning")
def test_build_objective_resizes_for_vgg_only():
    loss = LossConfig(alignment_weight=0, p_dino_weight=0, stages="vgg16", stages_weights="random")
    model = build_denoiser(model_config("tiny/2"))
    objective = build_objective(
        loss, model, run_dir="unused", images=lambda: (torch.empty(0), torch.empty(0))
    )
    assert objective.networks.lpips.resize_from_patch == 2  # 8x8 digits are seen by VGG16 at 64x64
    clean, pictures = clean_batch(model, 1)
    x_pred = torch.randn(clean.shape, requires_grad=True)
    lpips = objective(x_pred, clean, pictures, Times.of(torch.ones(1))).terms["lpips"]
    assert float(lpips) > 0 and (grad_of(lpips, x_pred)[0] != 0).any()
