"""The suite of the perceptual branch: LPIPS, P-DINO and REPA's targets, gathered and masked; and its ops."""

import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from unittest import mock

import torch
from pixelgen_kernels import select
from torch import Tensor

from benchmarks.case import DTYPES, cases, normal
from benchmarks.measure import ColdTimer, Timing, in_turns, peak_bytes
from benchmarks.report import Row, row
from benchmarks.suite import Part, Run, Suite
from benchmarks.suites import kernels
from pixelgen.config import LossConfig, TimeConfig
from pixelgen.encoders.dinov2 import DINOv2
from pixelgen.encoders.vgg16 import VGG16
from pixelgen.flow import logit_normal_time
from pixelgen.losses.gate import NoiseGate, Selection
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.objective import Objective
from pixelgen.losses.times import Times

BRANCH_PROVIDERS = ("masked", "ours")
PROVIDERS = ("masked", "eager", "compile", "ours")
# The terms that are timed together and alone. Of REPA only the encoding of the targets belongs here: its
# projector is made tiny.
TERMS = {
    "all": ("lpips", "p_dino", "alignment"),
    "lpips": ("lpips",),
    "p_dino": ("p_dino",),
    "alignment": ("alignment",),
}
PATCH, TINY = 16, 8
# Relative differences between the two providers: batches of other sizes are summed in another order.
# Of the value, and of the gradient's norm.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 5e-2)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is timed on a device.

    Attributes:
        side: of the images.
        batch: images of a batch.
        batches: drawn batches; every time is the mean over them.
        repeats: timed calls of each batch, unless the command line says otherwise.
        dtype: key of DTYPES; below fp32 the networks run as the trainer runs them there.
        tokens: name of the DINOv2, whose weights are random as those of VGG16 are.
    """

    side: int
    batch: int
    batches: int
    repeats: int
    dtype: str
    tokens: str


SIZES = {
    "cpu": Size(side=128, batch=8, batches=3, repeats=3, dtype="fp32", tokens="dinov2_vits14"),
    "cuda": Size(side=256, batch=64, batches=6, repeats=10, dtype="bf16", tokens="dinov2_vitb14"),
}


def draw_times(batches: int, batch: int) -> Tensor:
    """Times (batches, batch) from the paper's distribution: one from each of as many equal parts, shuffled.

    Their share above any threshold is the distribution's own, while that of each batch varies as in training.
    """
    total, time = batches * batch, TimeConfig()
    parts = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    draws = torch.special.ndtri(parts)[order].float()
    return logit_normal_time(draws, time.mean, time.std).view(batches, batch)


class Branch:
    """Some terms of the training objective on drawn batches.

    Args:
        names: the terms.
        size: what is timed.
        device: where.
        lpips: the distance.
        encoder: the DINOv2.
    """

    def __init__(
        self, names: tuple[str, ...], size: Size, device: torch.device, lpips: LPIPS, encoder: DINOv2
    ) -> None:
        self.names, self.size, self.device = names, size, device
        weights = {name: float(name in names) for name in TERMS["all"]}
        torch.manual_seed(0)  # the projector
        loss = LossConfig(
            projector_width=TINY, **{f"{name}_weight": value for name, value in weights.items()}
        )
        self.objective = Objective(
            loss, feature_width=TINY, patch_size=PATCH, encoder=encoder, lpips=lpips
        ).to(device)
        self.objective.networks.speed_up(half=size.dtype != "fp32", compiled=False)
        num_tokens = (size.side // PATCH) ** 2
        self.x = normal(size.batch, num_tokens, 3 * PATCH**2, dtype="fp32", device=device).clamp(-1, 1)
        wrong = normal(*self.x.shape, dtype="fp32", device=device, seed=1)
        features = normal(size.batch, num_tokens, TINY, dtype="fp32", device=device, seed=2)
        self.leaves = tuple(leaf.requires_grad_() for leaf in (self.x + 0.3 * wrong, features))
        sides = (size.side, size.side)
        self.images = self.objective.ops.unpatchify(self.x, PATCH, sides, channel_order="last")
        drawn = draw_times(size.batches, size.batch)
        self.times = [Times.of(t, device=device) for t in drawn]
        self.seen = self.objective.gate.passes(drawn).sum(1).tolist()

    def call(self, provider: str, index: int) -> tuple[Tensor, ...]:
        """The terms' sum and its gradients for one drawn batch."""
        x_pred, features = self.leaves
        dtype = DTYPES[self.size.dtype]
        with torch.autocast(self.device.type, dtype, enabled=self.size.dtype != "fp32"):
            if provider == "ours":
                terms = self._terms(x_pred, features, index)
            else:
                with mock.patch("pixelgen.losses.objective.select_samples", _everyone):
                    terms = self._terms(x_pred, features, index)
        value = torch.stack([terms[name] for name in self.names]).sum()
        if not value.requires_grad:  # no sample of a small batch is above the gate
            return value, *(torch.zeros_like(leaf) for leaf in self.leaves)
        return value.detach(), *torch.autograd.grad(value, self.leaves, materialize_grads=True)

    def _terms(self, x_pred: Tensor, features: Tensor, index: int) -> dict[str, Tensor]:
        return self.objective(x_pred, self.x, self.images, self.times[index], features).terms

    def problems(self) -> list[str]:
        """Where gathering computes something else than masking; on the batch with most samples."""
        fullest = self.fullest
        (value, *grads), (expected, *expected_grads) = (
            self.call(name, fullest) for name in ("ours", "masked")
        )
        of_value, of_grads = TOLERANCES[self.size.dtype]
        found = []
        if not abs(value - expected) <= of_value * abs(expected):
            found.append(f"the loss is {value.item():.7g}, masked {expected.item():.7g}")
        for name, grad, wanted in zip(("x_pred", "features"), grads, expected_grads, strict=True):
            error, norm = (grad - wanted).norm().item(), wanted.norm().item()
            if not error <= of_grads * norm:
                found.append(f"grad_{name} is off by {error:.3g} of {norm:.3g}")
        return found

    @property
    def fullest(self) -> int:
        """The batch with most samples above the gate."""
        return self.seen.index(max(self.seen))

    def _timed(self, provider: str, index: int, _: object) -> tuple[Tensor, ...]:
        return self.call(provider, index)

    def measure(self, names: list[str], timer: ColdTimer, repeats: int) -> dict[str, tuple[Timing, int]]:
        """Provider -> mean over the batches of its times, and its peak memory in bytes."""
        of_batches = []
        for index in range(self.size.batches):
            once = {
                name: partial(timer.once, lambda: None, partial(self._timed, name, index)) for name in names
            }
            warm_up = 0 if self.device.type == "cpu" else 2  # seconds a call: the median leaves the first out
            of_batches.append(in_turns(once, repeats, warm_up=warm_up))
        return {
            name: (
                Timing(
                    **{
                        column: statistics.fmean(getattr(timings[name], column) for timings in of_batches)
                        for column in ("median_ms", "p20_ms", "p80_ms")
                    }
                ),
                peak_bytes(self.device, partial(self._timed, name, self.fullest)),
            )
            for name in names
        }


# The objective gathers wherever it knows t on the host, so masking has to be put in its place.
def _everyone(times: Times, gate: NoiseGate) -> Selection:
    """Published style: every sample goes through the networks, and the gate multiplies what comes out."""
    return Selection(None, gate.passes(times.t))


def branch_of(size: Size, device: torch.device, names: tuple[str, ...]) -> Branch:
    """The branch of some terms; its networks have random weights, which cost what trained ones do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lpips, encoder = _networks(size.tokens)
    return Branch(names, size, device, lpips, encoder)


@cache
def _networks(tokens: str) -> tuple[LPIPS, DINOv2]:
    return LPIPS(VGG16("random"), ops=select("auto")), DINOv2(tokens, "random", patch_size=PATCH)


def branch_rows(run: Run, size: Size, names: list[str], timer: ColdTimer, term: str) -> Iterator[Row]:
    """Rows of the case `branch` for one set of terms; where ours is wrong, of masked alone."""
    branch = branch_of(size, run.device, TERMS[term])
    problems = branch.problems() if "ours" in names else []
    if problems:
        run.wrong(f"branch {term}", "ours", "; ".join(problems))
    seen = f"seen={sum(branch.seen)}/{size.batches * size.batch}"
    right = [name for name in names if name != "ours" or not problems]
    for name, (timing, peak) in branch.measure(right, timer, run.arguments.repeats or size.repeats).items():
        yield row(
            "branch",
            name,
            timing,
            shape=f"{term} B={size.batch} H=W={size.side} {seen}",
            dtype=size.dtype,
            mode="fwd_bwd",
            peak_mb=peak / 1e6,
        )


def parts(run: Run) -> list[Part]:
    names = run.chosen("providers", PROVIDERS, always=("masked", "eager"))
    asked_for = set(run.arguments.providers or PROVIDERS)
    of_branch = [name for name in BRANCH_PROVIDERS if name in names]
    size = SIZES[run.device.type]
    size = replace(size, batch=run.arguments.batch or size.batch)
    bench = kernels.Bench(run, [name for name in kernels.PROVIDERS if name in names])
    found = [
        Part(
            case="branch",
            label=f"branch {term}",
            rows=partial(branch_rows, run, size, of_branch, bench.timer, term),
        )
        for term in TERMS
        if asked_for & set(BRANCH_PROVIDERS)
    ]
    # as in the suite of ops: on the CPU bf16 is no one's choice, and compiling takes longer than timing
    of_ops = [
        case
        for case in cases(run.device, of_models=False)
        if run.device.type == "cuda" or case.dtype == "fp32"
    ]
    if not asked_for.isdisjoint(kernels.PROVIDERS):
        found += bench.parts(of_ops)
    return found


SUITE = Suite(
    name="perceptual",
    parts=parts,
    baselines=("masked", "eager"),
    plots={"": ("median_ms",)},
    is_wide=True,
)
