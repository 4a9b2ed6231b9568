"""The suite of one pixel block of PixelDiT-XL, forward and backward: in fp32 on a CPU, in bf16 on a GPU.

Modes: `block` is all of it; `outside` what is left when the matrix products of the modulation and of the
compaction, and attention, are taken out, their results given: norms, modulations, gates, the per-pixel MLP;
`pixel_modulate` and `pixel_mlp` are these ops as the block calls them, with a handover.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pixelgen_kernels.handover import Handover
from torch import Tensor

from benchmarks.measure import ColdTimer, peak_bytes
from benchmarks.report import Row, row
from benchmarks.suite import Part, Run, Suite
from pixelgen.models.pixeldit import PixelBlock, extent_rope_table
from pixelgen.models.pixeldit_sizes import PIXELDIT_SIZES

CONFIG = PIXELDIT_SIZES["PixelDiT-XL/16"]
# provider -> kernels, whether the block is compiled, whether its modulation is recomputed
PROVIDERS = {
    "eager": ("eager", False, False),
    "compile": ("eager", True, False),
    "ours": ("auto", False, False),
    "ours_recomputed": ("auto", False, True),
}
MODES = ("block", "outside", "pixel_modulate", "pixel_mlp")
BATCH = {"cpu": 2, "cuda": 16}
TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}  # of the largest value of every result


class Runner:
    """A block of one provider, its inputs and the gradient of its output."""

    def __init__(self, device: torch.device, provider: str, batch: int) -> None:
        from pixelgen_kernels import select

        kernels, is_compiled, is_recomputed = PROVIDERS[provider]
        self.ops = select(kernels)  # type: ignore[arg-type]
        torch.manual_seed(0)
        block = PixelBlock(replace(CONFIG, recompute_modulation=is_recomputed), self.ops)
        torch.nn.init.normal_(block.adaLN_modulation[0].weight, std=0.02)  # zeros would tell nothing
        self.block = block.to(device)
        rows, columns = CONFIG.grid
        T, Q, d = rows * columns, CONFIG.patch_pixels, CONFIG.pixel_width
        shape = batch * T, Q, d
        self.x, self.y, self.grad = (torch.randn(shape, device=device) for _ in range(3))
        self.s = torch.randn(batch, T, CONFIG.width, device=device)
        is_half = device.type == "cuda"
        dtype = torch.bfloat16 if is_half else torch.float32
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=is_half)
        self.y = self.y.to(dtype)
        self.modulation = torch.randn(*shape[:2], CONFIG.num_kinds * d, device=device, dtype=dtype)
        self.rope = tuple(t.to(device) for t in extent_rope_table(CONFIG.head_dim, rows, columns))
        self.parameters = list(self.block.parameters())
        compiled: Callable[..., Any] = torch.compile if is_compiled else lambda fn: fn
        self.forward: Callable[..., Tensor] = compiled(block)
        self.forward_outside = compiled(self._outside)
        self.pixel_modulate, self.pixel_mlp = compiled(self._pixel_modulate), compiled(self._pixel_mlp)
        # gradients leave as soon as they are there: no peak is theirs
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(_drop)

    def prepare_block(self) -> list[Tensor]:
        """Leaves of a call."""
        return _leaves(self.x, self.s)

    def run_block(self, leaves: list[Tensor]) -> list[Tensor]:
        """Output and gradients of the inputs."""
        with self.autocast():
            output = self.forward(*leaves, self.rope)
        output.backward(self.grad)
        return [output.detach(), *_gradients(leaves)]

    def prepare_outside(self) -> list[Tensor]:
        """Leaves of a call; the modulation is new, as a projection makes it."""
        return _leaves(self.x, self.y, self.modulation.clone())

    def run_outside(self, leaves: list[Tensor]) -> list[Tensor]:
        """Gradients of the inputs."""
        x, y, modulation = leaves
        # a view: what is handed over belongs to the graph
        results = self.forward_outside(x, y, modulation.view_as(modulation), Handover())
        torch.autograd.backward(results, [self.grad, self.grad])
        return _gradients(leaves)

    def prepare_pixel_modulate(self) -> list[Tensor]:
        """Leaves of a call."""
        return _leaves(self.x, self.modulation.clone())

    def run_pixel_modulate(self, leaves: list[Tensor]) -> list[Tensor]:
        """Gradients of the inputs; in the block `pixel_mlp` has written its own over the modulation."""
        x, modulation = leaves
        view, handover = modulation.view_as(modulation), Handover()
        results, gradients = [self.pixel_modulate(x, view, handover)], [self.grad]
        if handover.carrier is not None:
            results.append(handover.carrier)
            gradients.append(view.detach())
        torch.autograd.backward(results, gradients)
        return _gradients(leaves)

    prepare_pixel_mlp = prepare_outside

    def run_pixel_mlp(self, leaves: list[Tensor]) -> list[Tensor]:
        """Gradients of the inputs."""
        x, y, modulation = leaves
        view, handover = modulation.view_as(modulation), Handover()
        handover.carrier = view
        self.pixel_mlp(x, y, view, handover).backward(self.grad)
        return _gradients(leaves)

    def _outside(self, x: Tensor, y: Tensor, modulation: Tensor, handover: Handover) -> tuple[Tensor, Tensor]:
        normed = self._pixel_modulate(x, modulation, handover)
        return normed, self._pixel_mlp(x, y, modulation, handover)

    def _pixel_modulate(self, x: Tensor, modulation: Tensor, handover: Handover) -> Tensor:
        return self.ops.pixel_modulate(x, modulation, self.block.norm1.weight, handover=handover)

    def _pixel_mlp(self, x: Tensor, y: Tensor, modulation: Tensor, handover: Handover) -> Tensor:
        block, fc1, fc2 = self.block, self.block.mlp.fc1, self.block.mlp.fc2
        weights = block.norm2.weight, fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return self.ops.pixel_mlp(x, y, modulation, *weights, handover=handover)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _gradients(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def problems(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> list[str]:
    """Results that are further from eager's than the tolerance says."""
    names = ("output", "gradient of x", "gradient of s")
    found = []
    for name, got, want in zip(names, actual, expected, strict=True):
        error, scale = (got - want).abs().max().item(), want.abs().max().item()
        if not error <= tolerance * scale:
            found.append(f"{name} is off by {error:.3g} of {scale:.3g}")
    return found


def rows(run: Run) -> Iterator[Row]:
    """All modes of all providers, in turns."""
    device = run.device
    batch = run.arguments.batch or BATCH[device.type]
    timer, runners, expected = ColdTimer(device), {}, None
    for name in run.chosen("providers", list(PROVIDERS), always=("eager",)):
        run.show(f"{name}: check")
        runner = Runner(device, name, batch)
        results = runner.run_block(runner.prepare_block())
        expected = expected or results
        if found := problems(results, expected, TOLERANCE[device.type]):
            run.wrong("pixel_block", name, "; ".join(found))
        else:
            runners[name] = runner
    # of the large matrices, whose sizes no activation has
    gradients = {p.nbytes for p in next(iter(runners.values())).parameters if p.nbytes > 2**20}
    shape = f"PixelDiT-XL B={batch}"
    for mode in MODES:
        parts: dict[str, tuple[Any, Any]] = {
            name: (getattr(runner, f"prepare_{mode}"), getattr(runner, f"run_{mode}"))
            for name, runner in runners.items()
            if mode == "block" or name != "ours_recomputed"
        }
        run.show(f"{mode}: time")
        for name, timing in timer.side_by_side(parts, run.arguments.repeats).items():
            prepare, call = parts[name]
            peak = peak_bytes(device, call, prepare, ignored=gradients)
            dtype = "fp32" if device.type == "cpu" else "bf16"
            yield row("pixel_block", name, timing, shape=shape, dtype=dtype, mode=mode, peak_mb=peak / 1e6)


def parts(run: Run) -> list[Part]:
    return [Part(case="pixel_block", label="pixel_block", rows=partial(rows, run))]


SUITE = Suite(
    name="pixel_block",
    parts=parts,
    baselines=("eager",),
    plots={"": ("median_ms", "peak_mb")},
)
