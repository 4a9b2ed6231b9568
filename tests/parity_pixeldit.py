"""Golden vectors of the public PixelDiT code; test_parity.py runs these tests.

data/parity_pixeldit/README.md says what the vectors are and how closely they must be matched, FACTS.md beside
it what the public code does.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from parity import (
    KINDS,
    Kernels,
    PatchMeans,
    Vectors,
    assert_gradients_match,
    assert_matches,
    find,
    params,
)
from torch import Tensor, nn

from pixelgen.conditions import Condition
from pixelgen.config import LossConfig
from pixelgen.flow import interpolate, logit_normal_time, shift_time
from pixelgen.losses.objective import Objective
from pixelgen.losses.times import Times
from pixelgen.models.pixeldit import PixelDiT
from pixelgen.models.pixeldit_sizes import PixelDiTConfig
from pixelgen.models.released import load_strictly
from pixelgen.sampling.guidance import GuidedVelocity
from pixelgen.sampling.options import SampleConfig
from pixelgen.sampling.samplers import SAMPLERS, timesteps

KERNELS = get_args(Kernels)

# Maximum absolute error divided by the largest absolute value expected (data/parity_pixeldit/README.md).
FORWARD = 2e-5
MODEL_LOSS = 1e-4
TERM = 1e-5
SAMPLE = 1e-5

CONFIG_NAMES = {
    "in_channels": "channels",
    "num_groups": "heads",
    "hidden_size": "width",
    "pixel_hidden_size": "pixel_width",
    "patch_depth": "depth",
    "use_pixel_abs_pos": "pixel_positions",
    "pit_adaln_post_modulation": "post_modulation",
}


def pixeldit_config(config: dict[str, Any], height: int, width: int) -> PixelDiTConfig:
    """The architecture that constructor arguments of the published class-conditional denoiser describe."""
    fields = {CONFIG_NAMES.get(key, key): value for key, value in config.items()}
    return PixelDiTConfig(image_size=(height, width), **fields)


# --- denoiser ---


def denoiser(vectors: Vectors, kernels: Kernels) -> PixelDiT:
    sidecar = vectors.sidecar
    config = pixeldit_config(sidecar["config"], sidecar["height"], sidecar["width"])
    model = PixelDiT(config, kernels)
    load_strictly(model, vectors.state(sidecar["state_file"]), sidecar["state_file"])
    return model.eval()


def assert_case_matches(vectors: Vectors, model: PixelDiT, inputs: str, name: str, tap: int | None) -> None:
    """Output, features and gradients of one case, and that nothing of it in the file is left out.

    Args:
        vectors: of the denoiser.
        model: with the weights of the file.
        inputs: before the names of x, t, y, g and output: nothing, or ``"wide."`` for another size.
        name: before the names of loss and gradients, such as ``"plain."``.
        tap: patch blocks after which features are taken.
    """
    tensors, what = vectors.tensors, f"{vectors.name} {name}"
    x, t, y, g, expected = (tensors[f"{inputs}{key}"] for key in ("x", "t", "y", "g", "output"))
    x = x.clone().requires_grad_()
    answer = model(x, t, y, tap=tap)
    output, features = (answer, None) if tap is None else answer
    assert_matches(output, expected, FORWARD, f"{what} output")
    loss = (output * g).sum()
    if features is not None:
        assert_matches(features, tensors[f"{name}feat"], FORWARD, f"{what} feat")
        loss = loss + (features * tensors["h"]).sum()
    assert_matches(loss.view(1), tensors[f"{name}loss"], MODEL_LOSS, f"{what} loss")
    loss.backward()
    compared = assert_gradients_match(vectors, name, model, {"x": x})
    in_file = {key.removeprefix(name) for key in tensors if key.startswith(name)}
    assert compared > 0
    assert compared == len(in_file - {"x", "t", "y", "g", "output", "feat", "loss"})


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("vectors", params("pixeldit"))
def test_pixeldit(vectors: Vectors, kernels: Kernels):
    """The case without features and every tap."""
    for tap in (None, *vectors.sidecar["taps"]):
        name = "plain." if tap is None else f"tap{tap}."
        assert_case_matches(vectors, denoiser(vectors, kernels), "", name, tap)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("vectors", "size"), params("pixeldit", "other_sizes"))
def test_pixeldit_at_other_sizes(vectors: Vectors, size: str, kernels: Kernels):
    """The same weights on images of other heights and widths, also of a single row or column of patches."""
    tensors, case = vectors.tensors, vectors.sidecar["other_sizes"][size]
    model = denoiser(vectors, kernels)
    assert tensors[f"{size}.x"].shape[2:] == (case["height"], case["width"])
    if case["gradients"]:
        assert_case_matches(vectors, model, f"{size}.", f"{size}.", None)
    else:
        output = model(*(tensors[f"{size}.{name}"] for name in ("x", "t", "y")))
        assert_matches(output, tensors[f"{size}.output"], FORWARD, f"{vectors.name} {size}")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("vectors", params("pixeldit"))
def test_pixeldit_without_gradients(vectors: Vectors, kernels: Kernels):
    """One model for all sizes in turn, as when sampling."""
    model = denoiser(vectors, kernels)
    with torch.inference_mode():
        for size in ("", *(f"{name}." for name in vectors.sidecar["other_sizes"]), ""):
            output = model(*(vectors.tensors[f"{size}{name}"] for name in ("x", "t", "y")))
            assert_matches(output, vectors.tensors[f"{size}output"], FORWARD, f"{vectors.name} {size}")


# --- samplers ---


def sampler_name(vectors: Vectors, case: dict) -> str:
    """Our name of the solver that a case was made with."""
    name = vectors.sidecar["samplers"][case["sampler"]]
    if name == "HeunSampler":
        return "heun" if case["exact_henu"] else "heun-reuse"
    return {"FlowDPMSolverSampler": "flow_dpm", "EulerSampler": "euler"}[name]


def guided_times(case: dict, times: list[float]) -> set[float]:
    """The times within the guidance interval, from the indices of their steps: a list, or ``"11..99"``."""
    steps = case["guided_steps"]
    if isinstance(steps, str):
        first, last = steps.split("..")
        steps = range(int(first), int(last) + 1)
    return {times[step] for step in steps}


@pytest.mark.parametrize(("vectors", "name"), params("pixeldit samplers", "cases"))
def test_pixeldit_sampler(vectors: Vectors, name: str):
    """Whole trajectories; the network is evaluated as often, at the same times, in half as many batches."""
    tensors, sidecar = vectors.tensors, vectors.sidecar
    case, net = sidecar["cases"][name], sidecar["net"]
    expected = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    calls: list[tuple[float, int]] = []  # time and size of the batch

    def model_fn(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        calls.append((t[0].item(), len(x)))
        c = tensors["c"][condition["label"]]
        return torch.tanh(net["a"] * x + net["b"] * t.view(-1, 1, 1, 1) + c.view(-1, 1, 1, 1))

    settings = SampleConfig(
        sampler=sampler_name(vectors, case),
        guidance=case["guidance"],
        guidance_low=case["guidance_interval_min"],
        guidance_high=case["guidance_interval_max"],
        guidance_rule="pixeldit",
    )
    condition, null = {"label": tensors["condition"]}, {"label": tensors["uncondition"]}
    velocity = GuidedVelocity(model_fn, condition, null, settings, t_eps=None)
    times = timesteps(case["num_steps"], case["timeshift"], case["last_step"])
    assert_matches(torch.tensor(times), expected.pop("timesteps"), SAMPLE, f"{name} timesteps")

    noise = tensors["noise"]
    states, used, evaluated = [noise], [], []

    def guided_velocity(x_t: Tensor, t: float, step_t: float) -> Tensor:
        evaluated.append(velocity(x_t, t, step_t))
        return evaluated[-1]

    def keep(step_index: int, t_next: float, x: Tensor, v: Tensor) -> None:
        states.append(x)
        used.append(v)

    final = SAMPLERS[settings.sampler](guided_velocity, noise, times, callback=keep)
    assert_matches(final, expected["x_traj"][-1], SAMPLE, f"{name} sample")
    assert_matches(torch.stack(states), expected.pop("x_traj"), SAMPLE, f"{name} x_traj")
    if "v_traj" in expected:
        # before flow_dpm weighs them; of Heun's, that which the step is taken with
        velocities = evaluated if settings.sampler == "flow_dpm" else used
        assert_matches(torch.stack(velocities), expected.pop("v_traj"), SAMPLE, f"{name} v_traj")
    assert not expected, f"{name}: no comparison for {sorted(expected)}"

    assert len(calls) == case["net_calls"]
    net_t = case.get("net_t", times[:-1])
    assert torch.allclose(torch.tensor([t for t, _ in calls]), torch.tensor(net_t), rtol=0, atol=1e-6)
    # The reference doubles every batch; we only those that are guided.
    is_guided = case["guidance"] != 1.0
    guided = guided_times(case, times) if is_guided else set()
    assert [size for _, size in calls] == [len(noise) * (2 if t in guided else 1) for t, _ in calls]
    assert 2 * len(noise) == case["net_batch"]


# --- training objective ---

TERMS = {"loss": "loss", "fm_loss": "flow_matching", "cos_loss": "alignment"}


def build_objective(
    vectors: Vectors, case: dict, model: PixelDiT, kernels: Kernels, alignment_weight: float
) -> Objective:
    """The objective of a case, with a projector whose weights are still to be loaded."""
    arguments, dims = case["constructor"], vectors.sidecar["proj_dims"]
    assert dims["proj_denoiser_dim"] == model.config.width
    loss = LossConfig(
        alignment_weight=alignment_weight,
        alignment_layer=arguments["align_layer"],
        projector_width=dims["proj_hidden_dim"],
        lpips_weight=0.0,
        p_dino_weight=0.0,
    )
    return Objective(
        loss,
        feature_width=model.config.width,
        patch_size=model.config.patch_size,
        encoder=PatchMeans(vectors.tensors["encoder_matrix"], case["encoder_patch"]),
        channel_order=model.output_order,
        prediction=model.prediction,
        kernels=kernels,
    )


def draw_time(vectors: Vectors, arguments: dict[str, Any]) -> Tensor:
    """The t of a case, as our trainer forms it from the same draw."""
    draws = vectors.tensors
    base = logit_normal_time(draws["normal"], 0.0, 1.0) if arguments["lognorm_t"] else draws["uniform"]
    return shift_time(base, arguments["timeshift"])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("vectors", "name"), params("pixeldit objective", "cases"))
def test_pixeldit_objective(vectors: Vectors, name: str, kernels: Kernels):
    """Terms and gradients, also where encoder and denoiser have other numbers of tokens."""
    tensors, sidecar = vectors.tensors, vectors.sidecar
    case = sidecar["cases"][name]
    arguments, (height, width) = case["constructor"], case["image"]
    uncompared = {key for key in tensors if key.startswith(f"{name}.")}

    t = draw_time(vectors, arguments)
    assert_matches(t, tensors[f"{name}.t"], TERM, f"{name} t")
    uncompared -= {f"{name}.t"}

    model = PixelDiT(pixeldit_config(sidecar["net"]["config"], height, width), kernels)
    load_strictly(model, vectors.state(sidecar["net"]["state_file"]), sidecar["net"]["state_file"])
    weight = arguments["feat_loss_weight"]
    # The reference reports an alignment of weight 0, which we leave out: then it has a weight here.
    objective = build_objective(vectors, case, model, kernels, weight or 1.0)
    projector = nn.ModuleList(objective.trained_with_the_denoiser().values())  # named 0.0.weight and so on
    prefix = "proj."
    projector.load_state_dict(
        {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}
    )

    x = ((tensors["raw_image"] - 0.5) / 0.5)[..., :height, :width]
    noise = tensors["noise"][..., :height, :width]

    def patches(images: Tensor, order: Any) -> Tensor:
        return model.ops.patchify(images.contiguous(), model.config.patch_size, channel_order=order)

    tokens = patches(interpolate(x, noise, t), model.input_order)
    tap = objective.feature_layer(0)
    output, features = model.forward_tokens(tokens, model.config.grid, t, {"label": tensors["y"]}, tap)
    assert output.shape[1] == case["denoiser_tokens"]
    loss, terms, _ = objective(
        output,
        patches(x, model.output_order),
        x,
        Times.of(t),
        features,
        noise=patches(noise, model.output_order),
    )
    loss = loss if weight else terms["flow_matching"]
    loss.backward()
    values = {**terms, "loss": loss}
    for theirs, ours in TERMS.items():
        assert_matches(values[ours].view(1), tensors[f"{name}.{theirs}"], TERM, f"{name}.{theirs}")
        uncompared.discard(f"{name}.{theirs}")
    for module, part in ((model, "net"), (projector, "proj")):
        assert_gradients_match(vectors, f"{name}.{part}.", module)
        uncompared -= {key for key in uncompared if key.startswith(f"{name}.{part}.grad")}
    assert not uncompared, f"{name}: no comparison for {sorted(uncompared)}"


# --- text-conditional ---


TEXT_KINDS = [kind for kind in KINDS.values() if kind.startswith("t2i pixeldit")]


@pytest.mark.parametrize("vectors", [pytest.param(v, id=v.name) for kind in TEXT_KINDS for v in find(kind)])
def test_text_conditional_pixeldit(vectors: Vectors):
    pytest.skip(f"text-conditional PixelDiT: to come ({vectors.name}: {vectors.sidecar['kind']})")
