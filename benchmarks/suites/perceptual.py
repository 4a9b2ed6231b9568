"""The suite of the perceptual branch: LPIPS, P-DINO and REPA's targets, gathered and masked; and its ops."""

import argparse
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from pixelgen_kernels import select
from torch import Tensor
from tqdm import tqdm

from benchmarks import kernels, plots, report, setting, tables
from benchmarks.case import DTYPES, cases, normal
from benchmarks.measure import ColdTimer, Timing, copy_gbps, in_turns, peak_bytes
from pixelgen.config import LossConfig, TimeConfig
from pixelgen.encoders.dinov2 import DINOv2
from pixelgen.encoders.vgg16 import VGG16
from pixelgen.errors import UserError
from pixelgen.flow import logit_normal_time
from pixelgen.losses.gate import NoiseGate, Selection
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.objective import Objective

# Op -> its providers; the first is the baseline.
OPS = {
    "branch": ("masked", "ours"),
    "lpips_distance": kernels.PROVIDERS,
    "cosine_distance": kernels.PROVIDERS,
}
PROVIDERS = ("masked", *kernels.PROVIDERS)
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
        self.objective = Objective(
            feature_width=TINY,
            projector_width=TINY,
            patch_size=PATCH,
            image_size=(size.side, size.side),
            encoder=encoder,
            lpips=lpips,
            alignment_weight=weights["alignment"],
            lpips_weight=weights["lpips"],
            p_dino_weight=weights["p_dino"],
            gate=NoiseGate("hard", LossConfig().gate_t),
        ).to(device)
        self.objective.speed_up_networks(half=size.dtype != "fp32", compiled=False)
        num_tokens = (size.side // PATCH) ** 2
        self.x = normal(size.batch, num_tokens, 3 * PATCH**2, dtype="fp32", device=device).clamp(-1, 1)
        wrong = normal(*self.x.shape, dtype="fp32", device=device, seed=1)
        features = normal(size.batch, num_tokens, TINY, dtype="fp32", device=device, seed=2)
        self.leaves = tuple(leaf.requires_grad_() for leaf in (self.x + 0.3 * wrong, features))
        self.host_times = draw_times(size.batches, size.batch)
        self.times = self.host_times.to(device)
        self.seen = self.objective.gate.passes(self.host_times).sum(1).tolist()

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
        return self.objective(x_pred, self.x, self.times[index], features, host_t=self.host_times[index])

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

    def _forget(self) -> None:
        self.objective.per_sample = {}  # of the call before: its release would look like room made

    def measure(
        self, names: list[str], timer: ColdTimer, repeats: int, bar: tqdm
    ) -> dict[str, tuple[Timing, int]]:
        """Provider -> mean over the batches of its times, and its peak memory in bytes."""
        of_batches = []
        for index in range(self.size.batches):
            once = {
                name: partial(timer.once, lambda: None, partial(self._timed, name, index)) for name in names
            }
            warm_up = 0 if self.device.type == "cpu" else 2  # seconds a call: the median leaves the first out
            of_batches.append(in_turns(once, repeats, warm_up=warm_up))
            bar.update()
        return {
            name: (
                Timing(
                    **{
                        column: statistics.fmean(getattr(timings[name], column) for timings in of_batches)
                        for column in ("median_ms", "p20_ms", "p80_ms")
                    }
                ),
                peak_bytes(self.device, partial(self._timed, name, self.fullest), self._forget),
            )
            for name in names
        }


# The objective gathers wherever it knows t on the host, so masking has to be put in its place.
def _everyone(t: Tensor, gate: NoiseGate, *, device: torch.device) -> Selection:
    """Published style: every sample goes through the networks, and the gate multiplies what comes out."""
    return Selection(None, None, gate.passes(t).to(device, non_blocking=True))


def branches(size: Size, device: torch.device) -> Iterator[tuple[str, Branch]]:
    """(term, branch) of everything that is timed; the networks are shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights cost what trained ones do
        lpips = LPIPS(VGG16("random"), ops=select("auto"))
        encoder = DINOv2(size.tokens, "random", patch_size=PATCH)
    for term, names in TERMS.items():
        yield term, Branch(names, size, device, lpips, encoder)


def branch_rows(
    size: Size, device: torch.device, names: list[str], timer: ColdTimer, repeats: int | None, bar: tqdm
) -> Iterator[report.Row]:
    """Rows of the op `branch`, without the columns of `setting`; where ours is wrong, of masked alone."""
    for term, branch in branches(size, device):
        bar.set_postfix_str(f"{term}: check")
        problems = branch.problems() if "ours" in names else []
        if problems:
            tqdm.write(f"branch {term}: ours is wrong and not timed: {'; '.join(problems)}")
        bar.update()
        bar.set_postfix_str(f"{term}: time")
        seen = f"seen={sum(branch.seen)}/{size.batches * size.batch}"
        right = [name for name in names if name != "ours" or not problems]
        for name, (timing, peak) in branch.measure(right, timer, repeats or size.repeats, bar).items():
            yield {
                "op": "branch",
                "provider": name,
                "mode": "fwd_bwd",
                "dtype": size.dtype,
                "shape": f"{term} B={size.batch} H=W={size.side} {seen}",
                "median_ms": f"{timing.median_ms:.4g}",
                "p20_ms": f"{timing.p20_ms:.4g}",
                "p80_ms": f"{timing.p80_ms:.4g}",
                # what has to move is not known of whole networks
                "gbps": "",
                "share_of_copy": "",
                "peak_mb": f"{peak / 1e6:.3f}",
            }


def selected(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Op -> the providers to time of it, in order: those asked for and, where it has one, its baseline.

    Raises:
        UserError: unknown names, or no op that is asked for has a provider that is.
    """
    ops = setting.chosen("--only", arguments.only, list(OPS))
    names = setting.chosen("--providers", arguments.providers, list(PROVIDERS))
    found = {}
    for op in ops:
        baseline = OPS[op][0]
        if any(name in names for name in OPS[op]):
            found[op] = [name for name in OPS[op] if name == baseline or name in names]
    if not found:
        has = "; ".join(f"{op} has {', '.join(OPS[op])}" for op in ops)
        raise UserError(f"nothing is left to time: {has} and not {', '.join(names)}")
    return found


def run(arguments: argparse.Namespace) -> int:
    """Times what the command line asks for, writes CSV, table and plot, prints the ratios.

    Returns:
        0, or 1 when ours was wrong somewhere.
    """
    providers = selected(arguments)
    device, columns, folder = setting.start(arguments)
    size = SIZES[device.type]
    size = replace(size, batch=arguments.batch or size.batch)
    chosen = [case for case in cases(device, of_models=False) if case.op in providers]
    # as in the suite of ops: on the CPU bf16 is no one's choice, and compiling takes longer than timing
    chosen = [case for case in chosen if device.type == "cuda" or case.dtype == "fp32"]
    timer = ColdTimer(device)
    copy = copy_gbps(timer)
    print(f"{columns['device']}, {columns['threads']} CPU threads; a copy runs at {copy:.1f} GB/s")

    path = folder / "perceptual.csv"
    rows: list[report.Row] = []

    def keep(timed: Iterator[report.Row]) -> None:
        measured = [{**row, **columns} for row in timed]
        report.write_csv(path, report.KERNELS, measured)  # now: a run that is stopped keeps its rows
        rows.extend(measured)

    total = sum(1 + len(case.modes) for case in chosen)
    total += len(TERMS) * (1 + size.batches) if "branch" in providers else 0
    with tqdm(total=total, unit="part", dynamic_ncols=True) as bar:
        if "branch" in providers:
            keep(branch_rows(size, device, providers["branch"], timer, arguments.repeats, bar))
        for case in chosen:
            torch.compiler.reset()
            keep(kernels.measure(case, providers[case.op], timer, copy, arguments.repeats, bar))

    recorded = report.read_csv(path, columns)
    (folder / "perceptual.md").write_text(tables.perceptual(recorded))
    plots.times(recorded, folder / "perceptual.png")
    print("\n".join(filter(None, (tables.ratios(rows), *tables.all_stages(rows)))))
    print(f"\n{path} and, drawn from it, perceptual.md and perceptual.png")
    expected = sum("ours" in providers[case.op] for case in chosen)
    expected += len(TERMS) * ("ours" in providers.get("branch", ()))
    right = {(row["op"], row["shape"], row["dtype"]) for row in rows if row["provider"] == "ours"}
    return 0 if len(right) == expected else 1
