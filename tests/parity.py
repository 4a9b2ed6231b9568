"""Golden vectors of the public PixelGen and PixelDiT code: reading, comparing, and the stand-ins they need.

The folders are tests/data/parity and tests/data/parity_pixeldit, or the one named by PIXELGEN_PARITY_DIR with
all folders in it. What a file holds is decided by the ``kind`` of its JSON sidecar, never by its name; every
size, constant and case comes from the sidecar as well.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from pixelgen_kernels import select
from safetensors.torch import load_file
from torch import Tensor, nn

from pixelgen.config import LossConfig
from pixelgen.encoders.base import StageEncoder, TokenEncoder
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.objective import Objective
from pixelgen.models.jit import JiT
from pixelgen.models.sizes import ModelConfig

DATA = Path(__file__).parent / "data"
GIVEN = os.environ.get("PIXELGEN_PARITY_DIR")
FOLDERS = [Path(GIVEN)] if GIVEN else [DATA / "parity", DATA / "parity_pixeldit"]

Kernels = Literal["auto", "eager"]

# Maximum absolute error divided by the largest absolute value expected (data/parity/README.md).
FORWARD = 1e-5
GRADIENT = 1e-4
ADAMS_HIGH_ORDER = 1e-4

# Beginning of a sidecar's "kind" -> our name for it.
KINDS = {
    "c2i denoiser forward": "c2i",
    "t2i denoiser forward": "t2i",
    "c2i denoiser weights": "weights",
    "t2i denoiser weights": "weights",
    "samplers": "samplers",
    "training objective": "objective",
    "adm centre crop": "crop",
    "adm center crop": "crop",
    "forward of the tiny c2i checkpoint": "checkpoint",
    "forward of the tiny t2i checkpoint": "t2i checkpoint",
    "class-conditional pixeldit forward": "pixeldit",
    "class-conditional pixeldit weights": "weights",
    "class-conditional samplers": "pixeldit samplers",
    "class-conditional training objective": "pixeldit objective",
    "text-conditional pixeldit forward": "t2i pixeldit",
    "text-conditional pixeldit weights": "weights",
    "text-conditional sampler": "t2i pixeldit samplers",
    "text-conditional training objective": "t2i pixeldit objective",
}


def config_from_reference(config: dict[str, Any]) -> ModelConfig:
    """The architecture that constructor arguments of the published class-conditional denoiser describe."""
    names = {
        "input_size": "image_size",
        "in_channels": "channels",
        "hidden_size": "width",
        "num_heads": "heads",
        "attn_drop": "attn_dropout",
        "proj_drop": "proj_dropout",
    }
    fields = {names.get(key, key): value for key, value in config.items() if key != "use_bottleneck"}
    if not config.get("use_bottleneck", True):  # the published default
        fields["bottleneck_dim"] = 0
    return ModelConfig(**fields)


@dataclass(frozen=True)
class Vectors:
    """One sidecar and the tensors beside it."""

    path: Path
    sidecar: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".json")

    @property
    def kind(self) -> str | None:
        kind = self.sidecar.get("kind", "").lower()
        return next((name for prefix, name in KINDS.items() if kind.startswith(prefix)), None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _load(self.path.with_name(f"{self.name}.safetensors"))

    def sibling(self, file: str) -> Path:
        return self.path.with_name(file)

    def state(self, file: str) -> dict[str, Tensor]:
        """A state dict; matrices are stored as float8 and are exact in fp32."""
        return {key: value.float() for key, value in _load(self.sibling(file)).items()}


@cache
def _load(path: Path) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # a test in that mode may be the first to ask
        return load_file(path)


def find_all() -> list[Vectors]:
    """Every sidecar of the folders."""
    paths = [path for folder in FOLDERS for path in sorted(folder.rglob("*.json"))]
    return [Vectors(path, json.loads(path.read_text())) for path in paths]


def find(kind: str) -> list[Vectors]:
    """The sidecars of one kind."""
    return [vectors for vectors in find_all() if vectors.kind == kind]


def params(kind: str, *names: str) -> list:
    """One pytest parameter per file of a kind; with ``names``, per entry of these parts of its sidecar."""
    found = []
    for vectors in find(kind):
        keys: list = [()]
        for name in names:
            keys = [(*key, entry) for key in keys for entry in vectors.sidecar[name]]
        found += [pytest.param(vectors, *key, id="-".join([vectors.name, *map(str, key)])) for key in keys]
    return found


def assert_matches(actual: Tensor | None, expected: Tensor, tolerance: float, what: str) -> None:
    """Fails where the largest error exceeds ``tolerance`` times the largest expected value.

    Expected zeros must be exact zeros. ``actual`` None (a gradient that was never reached) counts as zeros.
    """
    actual = torch.zeros_like(expected) if actual is None else actual.detach()
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    assert error <= tolerance * largest, f"{what}: error {error:.3e} > {tolerance:g} of {largest:.3e}"


def assert_gradients_match(
    vectors: Vectors, prefix: str, module: nn.Module, inputs: dict[str, Tensor] | None = None
) -> int:
    """Compares every tensor named ``<prefix>grad...`` with the gradients left in ``module`` and ``inputs``.

    Args:
        vectors: has ``row_stride`` for the sampled rows and ``grad_l2_order`` for the norms.
        prefix: for example ``"rl2."`` or ``"mixed.net."``.
        module: its state dict carries the reference's names.
        inputs: further tensors with gradients, such as ``{"x": x}``.

    Returns:
        How many tensors were compared.
    """
    sidecar = vectors.sidecar
    gradients = gradients_by_published_name(module)
    of_inputs = {name: value.grad for name, value in (inputs or {}).items()}
    compared = 0
    for key, expected in vectors.tensors.items():
        if not key.startswith(f"{prefix}grad"):
            continue
        kind, _, name = key.removeprefix(prefix).partition(".")
        if kind == "grad_l2" and name:
            actual: Tensor | None = torch.linalg.vector_norm(gradients[name]).view(1)
        elif kind == "grad_l2":
            order = sidecar["grad_l2_order"]
            assert sorted(order) == sorted(gradients), "trainable parameters"
            norms = [torch.linalg.vector_norm(gradients[name]) for name in order]
            actual = torch.stack(norms)
        elif kind == "grad":
            actual = {**gradients, **of_inputs}[name]
        elif kind == "grad_rows":
            actual = gradients[name][:: sidecar["row_stride"][name]]
        else:
            raise AssertionError(f"{vectors.name}: no comparison for {key}")
        assert_matches(actual, expected, GRADIENT, f"{vectors.name} {key}")
        compared += 1
    return compared


def gradients_by_published_name(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of the trainable parameters, zeros where there is none, named as the state dict is."""
    holder = copy.deepcopy(module)
    for parameter, of_holder in zip(module.parameters(), holder.parameters(), strict=True):
        gradient = parameter.grad
        of_holder.data = torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()
    fixed = {name for name, _ in module.named_buffers()}
    fixed |= {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in holder.state_dict().items() if name not in fixed}


class PatchMeans(TokenEncoder):
    """The sidecar's ``encoder_stand_in``: (mean of each patch of the image in [0, 1] - 0.5) @ matrix."""

    def __init__(self, matrix: Tensor, patch_size: int) -> None:
        super().__init__()
        self.matrix, self.patch_size, self.width = matrix, patch_size, matrix.shape[1]
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        means = F.avg_pool2d((x + 1) / 2, self.patch_size)
        return (means - 0.5).flatten(2).transpose(1, 2) @ self.matrix


class Pixels(StageEncoder):
    """One stage: the image itself."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class MeanDifference(LPIPS):
    """The sidecar's ``lpips_stand_in``: const * mean |pred - x|, after whatever resizing ``LPIPS`` does."""

    def __init__(self, constant: float, patch_size: int) -> None:
        super().__init__(Pixels(), ops=select("eager"), resize_from_patch=patch_size)
        self.constant = constant
        self.input_shapes: set[tuple[int, ...]] = set()

    def distance(self, maps: list[Tensor], target: list[Tensor]) -> Tensor:
        self.input_shapes |= {tuple(maps[0].shape), tuple(target[0].shape)}
        return self.constant * (maps[0] - target[0]).abs().mean((1, 2, 3))


def proj_dims(vectors: Vectors) -> tuple[int, int, int]:
    dims = vectors.sidecar["proj_dims"]
    return dims["proj_denoiser_dim"], dims["proj_hidden_dim"], dims["proj_encoder_dim"]


def build_objective(
    vectors: Vectors,
    case: dict,
    model: JiT,
    kernels: Kernels,
    p_dino_gate: Literal["paper", "released"] = "released",
) -> tuple[Objective, MeanDifference]:
    arguments, sidecar = case["constructor"], vectors.sidecar
    feature_width, projector_width, _ = proj_dims(vectors)
    lpips = MeanDifference(sidecar["lpips_stand_in"]["const"], arguments["patch_size"])
    loss = LossConfig(
        alignment_weight=arguments["feat_loss_weight"],
        lpips_weight=arguments["lpips_weight"],
        p_dino_weight=arguments["dino_weight"],
        perceptual_ratio=arguments["percept_ratio"],
        projector_width=projector_width,
        gate="hard",
        gate_t=arguments["percept_t_threshold"],
        p_dino_gate=p_dino_gate,
        balance="released",  # from step 400000 on, every 50 steps
    )
    objective = Objective(
        loss,
        feature_width=feature_width,
        patch_size=model.config.patch_size,
        encoder=PatchMeans(vectors.tensors["encoder_matrix"], sidecar["encoder_stand_in"]["P"]),
        lpips=lpips,
        t_eps=arguments["t_eps"],
        balance_parameter=model.balance_weight,
        kernels=kernels,
    )
    prefix = "proj.0."
    state = {k.removeprefix(prefix): v for k, v in vectors.tensors.items() if k.startswith(prefix)}
    for projector in objective.trained_with_the_denoiser().values():
        projector.load_state_dict(state, strict=True)
    return objective, lpips
