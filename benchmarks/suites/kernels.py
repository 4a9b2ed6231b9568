"""The suite of ops: every case of every op, each provider checked first, then timed beside the others."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import plots, report, setting, tables
from benchmarks.case import DTYPES, MODELS, Case, Op, Outputs, cases, leaves_of, outputs
from benchmarks.measure import ColdTimer, Oracle, copy_gbps, peak_bytes, traffic
from pixelgen.errors import UserError

PROVIDERS = ("eager", "compile", "ours")
# Error that a provider may have, in units of eager's. torch.compile adds the rows of a batch up one by one
# and is 11 times further off in grad_weight at XL/16 in bf16; that is no reason not to time it.
FACTORS = {"eager": 1.0, "compile": 100.0, "ours": 2.0}
# On the CPU, unless --dtypes asks for more: compiling what is left out would take half of the suite's time.
CPU_BF16_MODEL = "L/16"


def build(case: Case, provider: str) -> Op:
    """The callable of a provider."""
    if provider == "eager":
        return case.eager
    if provider == "ours":
        return case.fused
    return torch.compile(case.eager, fullgraph=True, dynamic=False)


def timed_parts(
    case: Case, fn: Op, mode: str, inputs: dict[str, Any]
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(prepare, call) of a mode: only `call` is timed.

    The forward pass is that of a training step: it keeps what backward needs. So one compilation serves all
    modes.
    """
    leaves = leaves_of(inputs, case.differentiable)
    arguments = {**inputs, **leaves}
    if mode == "fwd":
        return lambda: None, lambda _: fn(**arguments)

    targets = list(leaves.values())
    cotangents = [torch.ones_like(output) for output in outputs(fn(**arguments))]

    def backward(y: Outputs) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs(y), targets, cotangents)

    if mode == "bwd":
        return lambda: fn(**arguments), backward
    return lambda: None, lambda _: backward(fn(**arguments))


def selected(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases that the command line asks for."""
    every = cases(device, of_models=True)
    ops = setting.chosen("--only", arguments.only, list(dict.fromkeys(case.op for case in every)))
    models = setting.chosen("--shapes", arguments.shapes, list(MODELS))
    dtypes = setting.chosen("--dtypes", arguments.dtypes, list(DTYPES))

    def is_default(case: Case) -> bool:
        return device.type == "cuda" or case.dtype == "fp32" or case.model == CPU_BF16_MODEL

    chosen = [
        case
        for case in every
        if case.op in ops
        and case.model in models
        and case.dtype in dtypes
        and (arguments.dtypes or is_default(case))
    ]
    if not chosen:
        raise UserError("no case is left: --only, --shapes and --dtypes exclude each other")
    return chosen


def right_providers(
    case: Case, names: list[str], inputs: dict[str, Any], tell: Callable[[str], Any] = tqdm.write
) -> dict[str, Op]:
    """The providers whose results are right; one that is wrong is named and will not be timed."""
    oracle = Oracle(case, inputs)
    providers = {}
    for name in names:
        fn = build(case, name)
        if problems := oracle.problems(fn, FACTORS[name]):
            tell(f"{case}: {name} is wrong and not timed: {'; '.join(problems)}")
        else:
            providers[name] = fn
    return providers


def measure(
    case: Case, names: list[str], timer: ColdTimer, copy: float, repeats: int | None, bar: tqdm
) -> Iterator[report.Row]:
    """Rows of one case, without the columns of `setting`."""
    bar.set_postfix_str(f"{case}: check")
    inputs = case.inputs(timer.device)
    providers = right_providers(case, names, inputs)
    moved = traffic(case, inputs)
    bar.update()
    for mode in case.modes:
        bar.set_postfix_str(f"{case}: {', '.join(providers)} {mode}")
        parts = {name: timed_parts(case, fn, mode, inputs) for name, fn in providers.items()}
        for name, timing in timer.side_by_side(parts, repeats).items():
            gbps = moved[mode] / timing.median_ms / 1e6
            prepare, call = parts[name]
            peak = peak_bytes(timer.device, call, prepare)
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
                "peak_mb": f"{peak / 1e6:.3f}",
            }
        bar.update()


def run(arguments: argparse.Namespace) -> int:
    """Times what the command line asks for, writes CSV, table and plots, prints the ratios.

    Returns:
        0, or 1 when ours was wrong somewhere.
    """
    device, columns, folder = setting.start(arguments)
    chosen = selected(arguments, device)
    names = setting.chosen("--providers", arguments.providers, list(PROVIDERS))
    names = [name for name in PROVIDERS if name == "eager" or name in names]
    timer = ColdTimer(device)
    copy = copy_gbps(timer)
    print(f"{columns['device']}, {columns['threads']} CPU threads; a copy runs at {copy:.1f} GB/s")

    path = folder / "kernels.csv"
    rows: list[report.Row] = []
    with tqdm(total=sum(1 + len(case.modes) for case in chosen), unit="row", dynamic_ncols=True) as bar:
        for case in chosen:
            torch.compiler.reset()
            timed = measure(case, names, timer, copy, arguments.repeats, bar)
            measured = [{**row, **columns} for row in timed]
            report.write_csv(path, report.KERNELS, measured)  # now: a run that is stopped keeps its rows
            rows += measured

    recorded = report.read_csv(path, columns)
    (folder / "kernels.md").write_text(tables.kernels(recorded))
    plots.times(recorded, folder / "kernels_time.png")
    plots.bandwidth(recorded, folder / "kernels_bandwidth.png")
    print(tables.ratios(rows))
    print(f"\n{path} and, drawn from it, kernels.md, kernels_time.png, kernels_bandwidth.png")
    is_complete = len({(row["op"], row["shape"], row["dtype"]) for row in rows if row["provider"] == "ours"})
    return 0 if "ours" not in names or is_complete == len(chosen) else 1
