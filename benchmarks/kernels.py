"""The suite of ops: every case of every op, each provider checked first, then timed beside the others."""

import argparse
import platform
import subprocess
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pixelgen_kernels import build_info
from torch import Tensor
from tqdm import tqdm

from benchmarks import bench_patchify, bench_rms_norm_modulate, bench_swiglu, report
from benchmarks.case import DTYPES, MODELS, Case
from benchmarks.measure import ColdTimer, copy_gbps, errors_against_oracle

SUITES = (bench_rms_norm_modulate, bench_patchify, bench_swiglu)
PROVIDERS = ("eager", "compile", "ours")
MODES = ("fwd", "bwd", "fwd_bwd")
# Error that a provider may have, in units of eager's. torch.compile adds the rows of a batch up one by one
# and is 11 times further off in grad_weight at XL/16 in bf16; that is no reason not to time it.
FACTORS = {"eager": 1.0, "compile": 100.0, "ours": 2.0}


def best_device() -> str:
    """ "cuda" where a device is usable, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the instruction set that the kernels use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model} ({build_info()['cpu_isa']})"


def commit() -> str:
    """Short hash of the checkout, with "-dirty" when files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def versions(device: torch.device) -> dict[str, str]:
    """Columns that say with what a row was measured."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "threads": str(torch.get_num_threads()),
        "device": device_name(device),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": (torch.version.cuda or "") if device.type == "cuda" else "",
    }


def build(case: Case, provider: str) -> Callable[..., Tensor]:
    """The callable of a provider."""
    if provider == "eager":
        return case.eager
    if provider == "ours":
        return case.fused
    return torch.compile(case.eager, fullgraph=True, dynamic=False)


def timed_parts(
    case: Case, fn: Callable[..., Tensor], mode: str, device: torch.device
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(prepare, call) of a mode: only `call` is timed."""
    inputs = case.inputs(device)
    if mode == "fwd":

        def forward(_: Any) -> Tensor:
            with torch.no_grad():
                return fn(**inputs)

        return lambda: None, forward

    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    arguments = {**inputs, **leaves}
    targets = list(leaves.values())
    grad_y = torch.ones_like(fn(**arguments).detach())
    if mode == "bwd":
        return lambda: fn(**arguments), lambda y: torch.autograd.grad(y, targets, grad_y)
    return lambda: None, lambda _: torch.autograd.grad(fn(**arguments), targets, grad_y)


def selected(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases that the command line asks for."""
    every = [case for suite in SUITES for case in suite.cases(device)]
    known = {
        "only": {case.op for case in every},
        "shapes": set(MODELS),
        "dtypes": set(DTYPES),
        "providers": set(PROVIDERS),
    }
    for option, names in known.items():
        for name in getattr(arguments, option) or ():
            if name not in names:
                raise ValueError(f"--{option} must be one of {', '.join(sorted(names))}, got {name}")
    cases = [
        case
        for case in every
        if (not arguments.only or case.op in arguments.only)
        and (not arguments.shapes or case.shape.split()[0] in arguments.shapes)
        and (not arguments.dtypes or case.dtype in arguments.dtypes)
    ]
    if not cases:
        raise ValueError("no case is left: --only, --shapes and --dtypes exclude each other")
    return cases


def right_providers(case: Case, names: list[str], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The providers whose results are right; a wrong one is named and left out, but ours stops the run."""
    providers = {}
    for name in names:
        fn = build(case, name)
        problems = errors_against_oracle(case, fn, device, FACTORS[name])
        if problems and name == "ours":
            raise RuntimeError(f"{case.op} {case.shape} {case.dtype} is wrong: {'; '.join(problems)}")
        if problems:
            tqdm.write(f"{case.op} {case.shape} {case.dtype}: {name} is not timed: {'; '.join(problems)}")
        else:
            providers[name] = fn
    return providers


def measure(
    case: Case, names: list[str], timer: ColdTimer, copy: float, repeats: int, bar: tqdm
) -> Iterator[report.Row]:
    """Rows of one case, without the columns of `versions`."""
    device = timer.device
    bar.set_postfix_str(f"{case.op} {case.dtype} {case.shape}: check")
    providers = right_providers(case, names, device)
    for mode in MODES:
        bar.set_postfix_str(f"{case.op} {case.dtype} {case.shape}: {mode}")
        parts = {name: timed_parts(case, fn, mode, device) for name, fn in providers.items()}
        for name, timing in timer.side_by_side(parts, repeats).items():
            gbps = case.bytes(mode) / timing.median_ms / 1e6
            peak = timer.peak_mb(*parts[name])
            yield {
                "op": case.op,
                "provider": name,
                "mode": mode,
                "dtype": case.dtype,
                "shape": case.shape,
                "median_ms": f"{timing.median_ms:.4g}",
                "p20_ms": f"{timing.p20_ms:.4g}",
                "p80_ms": f"{timing.p80_ms:.4g}",
                "gbps": f"{gbps:.4g}",
                "share_of_copy": f"{gbps / copy:.3f}",
                "peak_mb": "" if peak is None else f"{peak:.1f}",
            }
        bar.update()


def run(arguments: argparse.Namespace) -> None:
    """Times what the command line asks for, writes CSV, table and plot, prints table and ratios."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch.cuda.is_available() is False")
    device = torch.device(arguments.device or best_device())
    cases = selected(arguments, device)
    names = [
        name
        for name in PROVIDERS
        if name == "eager" or not arguments.providers or name in arguments.providers
    ]
    timer = ColdTimer(device)
    setting = versions(device)
    copy = copy_gbps(timer, arguments.repeats)
    print(f"{setting['device']}, {setting['threads']} CPU threads; a copy runs at {copy:.1f} GB/s")

    rows: list[report.Row] = []
    with tqdm(total=len(cases) * len(MODES), unit="row", dynamic_ncols=True) as bar:
        for case in cases:
            torch.compiler.reset()
            measured = measure(case, names, timer, copy, arguments.repeats, bar)
            rows += [{**row, **setting} for row in measured]

    stem = f"kernels_{report.slug(setting['device'])}_{date.today():%Y%m}"
    path = arguments.out / f"{stem}.csv"
    report.write_csv(path, rows)
    recorded = report.read_csv(path, setting)
    path.with_suffix(".md").write_text(report.markdown(recorded))
    report.plot(recorded, path.with_suffix(".png"))
    print(report.markdown(rows))
    for (op, shape, dtype, mode), group in report.grouped(rows).items():
        gains = [(name, report.ratio(group, name)) for name in ("eager", "compile")]
        told = ", ".join(f"{gain:.2f}x {name}" for name, gain in gains if gain is not None)
        if told:
            print(f"{op} {shape} {dtype} {mode}: ours {told}")
    print(f"\nrows {path}\ntable {path.with_suffix('.md')}\nplot {path.with_suffix('.png')}")
