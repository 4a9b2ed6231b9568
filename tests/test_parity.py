"""Every golden vector of the parity folders against this package; their README.md say what they are.

PIXELGEN_PARITY_DIR=/some/folder runs the same tests on another set of vectors. Those of PixelDiT, and of
PixelGen's samplers, are in modules of their own and run as part of this one.
"""

from __future__ import annotations

import io
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from parity import (
    FOLDERS,
    FORWARD,
    Kernels,
    Vectors,
    assert_gradients_match,
    assert_matches,
    build_objective,
    config_from_reference,
    find_all,
    params,
    proj_dims,
)
from parity_pixeldit import (  # noqa: F401 - collected here
    test_pixeldit,
    test_pixeldit_at_other_sizes,
    test_pixeldit_objective,
    test_pixeldit_sampler,
    test_pixeldit_without_gradients,
    test_text_conditional_pixeldit,
)
from parity_samplers import test_adams_with_the_weights_of_the_file, test_sampler  # noqa: F401
from torch import Tensor, nn

from pixelgen.data.crop import center_crop
from pixelgen.flow import interpolate, logit_normal_time, shift_time
from pixelgen.losses.terms.alignment import projector as make_projector
from pixelgen.losses.times import Times
from pixelgen.models.jit import JiT
from pixelgen.models.released import (
    load_released_checkpoint,
    load_strictly,
    read_released_checkpoint,
)

KERNELS = get_args(Kernels)


def test_every_file_is_known():
    """No vector is passed over in silence."""
    everything = find_all()
    assert everything, f"no golden vectors in {FOLDERS}"
    unknown = {str(v.path): v.sidecar.get("kind") for v in everything if v.kind is None}
    assert not unknown, f"no test for {unknown}"
    described = {v.path.with_suffix(".safetensors") for v in everything}
    assert {path for folder in FOLDERS for path in folder.rglob("*.safetensors")} <= described


# --- denoiser ---


def denoiser(vectors: Vectors, state_file: str, config: dict, kernels: Kernels) -> JiT:
    model = JiT(config_from_reference(config), kernels)
    load_strictly(model, vectors.state(state_file), state_file)
    model.load_state_dict(vectors.state(state_file), strict=True)  # pos_embed included
    return model


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("vectors", "layer"), params("c2i", "return_layers"))
def test_denoiser(vectors: Vectors, layer: str, kernels: Kernels):
    tensors, what = vectors.tensors, f"{vectors.name} rl{layer}"
    model = denoiser(vectors, vectors.sidecar["state_file"], vectors.sidecar["config"], kernels).eval()
    x = tensors["x"].clone().requires_grad_()
    output, features = model(x, tensors["t"], tensors["y"], tap=int(layer))
    assert_matches(output, tensors["output"], FORWARD, f"{what} output")
    assert_matches(features, tensors[f"rl{layer}.feat"], FORWARD, f"{what} feat")

    products = torch.cat([(output * tensors["g"]).flatten(), (features * tensors["h"]).flatten()])
    loss = products.sum()
    # A sum of thousands of products of both signs: its error scales with them, not with what is left over.
    scale = max(loss.abs().item(), products.norm().item())
    assert abs(loss.item() - tensors[f"rl{layer}.loss"].item()) <= FORWARD * scale, f"{what} loss"
    loss.backward()
    compared = assert_gradients_match(vectors, f"rl{layer}.", model, {"x": x})
    assert compared == sum(key.startswith(f"rl{layer}.") for key in tensors) - 2  # all but feat and loss


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("vectors", params("c2i"))
def test_denoiser_without_features(vectors: Vectors, kernels: Kernels):
    model = denoiser(vectors, vectors.sidecar["state_file"], vectors.sidecar["config"], kernels).eval()
    with torch.inference_mode():
        output = model(*(vectors.tensors[name] for name in ("x", "t", "y")))
    assert_matches(output, vectors.tensors["output"], FORWARD, vectors.name)


@pytest.mark.parametrize("vectors", params("t2i"))
def test_text_conditional_denoiser(vectors: Vectors):
    layers = ", ".join(map(str, vectors.sidecar["return_layers"]))
    pytest.skip(
        f"text-conditional denoiser: to come ({vectors.name}: output, features, gradients, layers {layers})"
    )


# --- training objective ---

TERMS = {
    "loss": "loss",
    "fm_loss": "flow_matching",
    "cos_loss": "alignment",
    "lpips_loss": "lpips",
    "dino_percept_loss": "p_dino",
    "inter_cos_0": "p_dino",
    "percept_weight": "balance_weight",
}


def noisy_inputs(tensors: dict[str, Tensor], t: Tensor, noise_scale: float, model: JiT, layout: str):
    """(what the denoiser gets, the clean patches in the layout of its prediction)."""
    x, noise = tensors["x"], tensors["noise"]
    if layout == "images":
        return interpolate(x, noise * noise_scale, t), to_patches(model, x)
    return model.ops.noise_patchify(
        x,
        t,
        model.config.patch_size,
        noise=noise,
        noise_scale=noise_scale,
        channel_order="first",
        return_clean=True,
        clean_channel_order="last",
    )


def to_patches(model: JiT, images: Tensor) -> Tensor:
    return model.ops.patchify(images, model.config.patch_size, channel_order=model.output_order)


@pytest.mark.parametrize(("kernels", "layout"), [("auto", "tokens"), ("eager", "tokens"), ("auto", "images")])
@pytest.mark.parametrize(("vectors", "name"), params("objective", "cases"))
def test_objective(vectors: Vectors, name: str, kernels: Kernels, layout: str):
    tensors, sidecar = vectors.tensors, vectors.sidecar
    case = sidecar["cases"][name]
    arguments = case["constructor"]
    uncompared = {key for key in tensors if key.startswith(f"{name}.")}

    draw = tensors[f"{name}.draw"]
    base_t = (
        logit_normal_time(draw, arguments["P_mean"], arguments["P_std"]) if arguments["lognorm_t"] else draw
    )
    assert_matches(base_t, tensors[f"{name}.base_t"], FORWARD, f"{name} base_t")
    t = shift_time(base_t, arguments["timeshift"])
    assert_matches(t, tensors[f"{name}.t"], FORWARD, f"{name} t")
    uncompared -= {f"{name}.draw", f"{name}.base_t", f"{name}.t"}

    model = denoiser(vectors, sidecar["net"]["state_file"], sidecar["net"]["config"], kernels).train()
    objective, lpips = build_objective(vectors, case, model, kernels)
    projector = nn.ModuleList(  # gives the reference's names, 0.0.weight and so on
        [*objective.trained_with_the_denoiser().values()] or [make_projector(*proj_dims(vectors))]
    )

    def denoise(x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        y, layer = tensors["y"], arguments["align_layer"]
        if layout == "images":
            x_pred, features = model(x_t, t, y, layer)
            return to_patches(model, x_pred), features
        return model.forward_tokens(x_t, model.config.grid, t, {"label": y}, layer)

    x_t, clean = noisy_inputs(tensors, t, arguments["noise_scale"], model, layout)
    for step in case["global_steps"]:
        prefix = f"{name}.step{step}" if f"{name}.step{step}.loss" in tensors else name
        model.zero_grad(set_to_none=True)
        projector.zero_grad(set_to_none=True)
        x_pred, features = denoise(x_t)
        batch = (x_pred, clean, tensors["x"], Times.of(t), features)
        loss, terms, _ = objective(*batch, step=step)
        loss.backward()
        values = {**terms_of_weight_zero(vectors, case, model, *batch), **terms, "loss": loss}
        values["balance_weight"] = objective.balance.weight
        for theirs, ours in TERMS.items():
            if (key := f"{prefix}.{theirs}") in tensors:
                assert_matches(values[ours].view(1), tensors[key], FORWARD, f"{key} ({layout})")
                uncompared.discard(key)
        for module, part in ((model, "net"), (projector, "proj")):
            assert_gradients_match(vectors, f"{prefix}.{part}.", module)
            uncompared -= {key for key in uncompared if key.startswith(f"{prefix}.{part}.grad")}
    assert not uncompared, f"{name}: no comparison for {sorted(uncompared)}"
    if "gated" in case:
        assert terms["gated_fraction"].item() == pytest.approx(np.mean(case["gated"]))
    if objective.loss.needs("maps") and "lpips_input_shape" in case:
        # of the images; how many of them are seen is ours, since the gate skips the others
        shapes = {shape[1:] for shape in lpips.input_shapes}
        assert shapes == ({tuple(case["lpips_input_shape"][1:])} if terms["gated_fraction"] > 0 else set())


@pytest.mark.parametrize(("vectors", "name"), params("objective", "cases"))
def test_objective_in_paper_mode(vectors: Vectors, name: str):
    """The paper's gate differs from the released one in P-DINO alone, and not where every sample passes."""
    tensors, sidecar = vectors.tensors, vectors.sidecar
    case = sidecar["cases"][name]
    arguments = case["constructor"]
    model = denoiser(vectors, sidecar["net"]["state_file"], sidecar["net"]["config"], "auto").train()
    objective, _ = build_objective(vectors, case, model, "auto", p_dino_gate="paper")
    t = tensors[f"{name}.t"]
    passes = t >= arguments["percept_t_threshold"]
    x_t, clean = noisy_inputs(tensors, t, arguments["noise_scale"], model, "tokens")
    step = min(case["global_steps"])
    prefix = f"{name}.step{step}" if f"{name}.step{step}.loss" in tensors else name
    with torch.no_grad():
        x_pred, features = model.forward_tokens(
            x_t, model.config.grid, t, {"label": tensors["y"]}, arguments["align_layer"]
        )
    # before the balance
    loss, terms, _ = objective(x_pred, clean, tensors["x"], Times.of(t), features, step=1)
    terms["loss"] = loss
    same = ["fm_loss", "cos_loss", "lpips_loss"]
    same += ["dino_percept_loss", "inter_cos_0", "loss"] if passes.all() else []
    if step >= 400_000:
        same = [theirs for theirs in same if theirs != "loss"]  # it holds the balance
    for theirs in same:
        if TERMS[theirs] in terms and (key := f"{prefix}.{theirs}") in tensors:
            assert_matches(terms[TERMS[theirs]].view(1), tensors[key], FORWARD, key)
    if "p_dino" in terms and not passes.any():
        assert terms["p_dino"].item() == 0
    elif "p_dino" in terms:
        some = [value[passes] for value in (x_pred, clean, tensors["x"])]
        features = None if features is None else features[passes]
        alone = objective(*some, Times.of(t[passes]), features, step=1).terms
        assert_matches(terms["p_dino"].view(1), alone["p_dino"].view(1), FORWARD, f"{name} p_dino")


def terms_of_weight_zero(
    vectors: Vectors,
    case: dict,
    model: JiT,
    *batch: Any,
) -> dict[str, Tensor]:
    """Values of the terms that this case switches off: the reference reports them, ours leaves them out."""
    names = ("feat_loss_weight", "lpips_weight", "dino_weight", "percept_ratio")
    weights = {name: case["constructor"][name] for name in names}
    if all(weights.values()):
        return {}
    switched_on = {name: weight or 1.0 for name, weight in weights.items()}
    objective, _ = build_objective(
        vectors, {**case, "constructor": {**case["constructor"], **switched_on}}, model, "eager"
    )
    with torch.no_grad():
        return objective(*batch).terms


# --- data and checkpoints ---


@pytest.mark.parametrize(("vectors", "name"), params("crop", "images"))
def test_center_crop(vectors: Vectors, name: str):
    from PIL import Image

    case, tensors = vectors.sidecar["images"][name], vectors.tensors
    if case["input"] == "png":
        image = Image.open(io.BytesIO(tensors[f"{name}.png"].numpy().tobytes())).convert("RGB")
    else:
        image = Image.fromarray(tensors[f"{name}.{case['input']}"].numpy())
    assert image.size == (case["width"], case["height"])
    outputs = {key for key in tensors if key.startswith(f"{name}.out")}
    assert outputs == {f"{name}.out{size}" for size in case["resolutions"]}
    for size in case["resolutions"]:
        np.testing.assert_array_equal(center_crop(image, size), tensors[f"{name}.out{size}"].numpy())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("vectors", params("checkpoint"))
def test_released_checkpoint(vectors: Vectors, weights: Literal["raw", "ema"], kernels: Kernels):
    sidecar, tensors = vectors.sidecar, vectors.tensors
    path = vectors.sibling(sidecar["checkpoint"])
    model = load_released_checkpoint(path, config_from_reference(sidecar["config"]), weights, kernels)
    with torch.inference_mode():
        output = model(tensors["x"], tensors["t"], tensors["y"])
    assert_matches(output, tensors[f"output_{weights}"], FORWARD, f"{vectors.name} {weights}")


@pytest.mark.parametrize("vectors", params("t2i checkpoint"))
def test_released_text_conditional_checkpoint(vectors: Vectors):
    pytest.skip(f"text-conditional denoiser: to come ({vectors.name}: a published checkpoint)")


@pytest.mark.parametrize("vectors", params("checkpoint"))
def test_released_checkpoint_is_read_whole(vectors: Vectors):
    """All but the projector, which has no place in a denoiser."""
    path = vectors.sibling(vectors.sidecar["checkpoint"])
    states = read_released_checkpoint(path)
    projector = vectors.sidecar["proj_keys"]
    assert sum(map(len, states.values())) + len(projector) == vectors.sidecar["state_dict_keys"]
    in_file = torch.load(path, weights_only=True)["state_dict"]
    assert {key: list(in_file[key].shape) for key in projector} == projector
