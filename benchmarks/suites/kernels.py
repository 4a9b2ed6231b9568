"""The suite of ops: every case of every op, each provider checked first, then timed beside the others."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.case import DTYPES, MODELS, Case, Op, Outputs, cases, leaves_of, outputs
from benchmarks.measure import ColdTimer, Oracle, copy_gbps, peak_bytes, traffic
from benchmarks.report import Row, row
from benchmarks.suite import Part, Run, Suite
from pixelgen.errors import UserError

PROVIDERS = ("eager", "compile", "liger", "ours")
# Error that a provider may have, in units of eager's. torch.compile adds the rows of a batch up one by one
# and is 11 times further off in grad_weight at XL/16 in bf16; that is no reason not to time it.
FACTORS = {"eager": 1.0, "compile": 100.0, "liger": 100.0, "ours": 2.0}
# On the CPU, unless --dtypes asks for more: compiling what is left out would take half of the suite's time.
CPU_BF16_MODEL = "L/16"


def build(case: Case, provider: str) -> Op | None:
    """The callable of a provider; None if it has none for this op."""
    if provider == "eager":
        return case.eager
    if provider == "ours":
        return case.fused
    if provider == "liger":
        from benchmarks import liger

        return liger.OPS.get(case.op)
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


def right_providers(run: Run, case: Case, names: list[str], inputs: dict[str, Any]) -> dict[str, Op]:
    """The providers whose results are right; one that is wrong is named and will not be timed."""
    oracle = Oracle(case, inputs)
    providers = {}
    for name in names:
        if (fn := build(case, name)) is None:
            continue
        if problems := oracle.problems(fn, FACTORS[name]):
            run.wrong(str(case), name, "; ".join(problems), is_ours=name == "ours")
        else:
            providers[name] = fn
    return providers


class Bench:
    """Times cases of ops, with the bandwidth of a plain copy to hold them against."""

    def __init__(self, run: Run, names: list[str]) -> None:
        self.run, self.names = run, names
        self.timer = ColdTimer(run.device)
        self.copy = copy_gbps(self.timer)
        device, threads = run.setting["device"], run.setting["threads"]
        print(f"{device}, {threads} CPU threads; a copy runs at {self.copy:.1f} GB/s")

    def parts(self, cases: list[Case]) -> list[Part]:
        """One part per case."""
        return [Part(case=case.op, label=str(case), rows=partial(self.rows, case)) for case in cases]

    def rows(self, case: Case) -> Iterator[Row]:
        """Rows of one case: every provider that is right, in every mode."""
        torch.compiler.reset()
        inputs = case.inputs(self.timer.device)
        providers = right_providers(self.run, case, self.names, inputs)
        moved = traffic(case, inputs)
        for mode in case.modes:
            parts = {name: timed_parts(case, fn, mode, inputs) for name, fn in providers.items()}
            for name, timing in self.timer.side_by_side(parts, self.run.arguments.repeats).items():
                gbps = moved[mode] / timing.median_ms / 1e6
                prepare, call = parts[name]
                yield row(
                    case.op,
                    name,
                    timing,
                    shape=case.shape,
                    dtype=case.dtype,
                    mode=mode,
                    gbps=gbps,
                    share_of_copy=gbps / self.copy,
                    peak_mb=peak_bytes(self.timer.device, call, prepare) / 1e6,
                )


def usable_providers(run: Run) -> list[str]:
    """The providers that are asked for; eager always, and Liger's, Triton kernels, where they can run."""
    names = run.chosen("providers", PROVIDERS, always=("eager",))
    missing = None
    if run.device.type != "cuda":
        missing = "it runs on CUDA devices only"
    elif find_spec("liger_kernel") is None:
        missing = 'liger-kernel is not installed: pip install ".[bench]"'
    if missing and "liger" in names:
        if run.arguments.providers:
            raise UserError(f"--providers liger: {missing}")
        names.remove("liger")
        if run.device.type == "cuda":
            print(f"liger is left out: {missing}")
    return names


def parts(run: Run) -> list[Part]:
    every = cases(run.device, of_models=True)
    models = run.chosen("shapes", list(MODELS))
    dtypes = run.chosen("dtypes", list(DTYPES))

    def is_chosen(case: Case) -> bool:
        is_default = run.device.type == "cuda" or case.dtype == "fp32" or case.model == CPU_BF16_MODEL
        is_asked_for = bool(run.arguments.dtypes) or is_default
        return case.model in models and case.dtype in dtypes and is_asked_for

    names = usable_providers(run)
    run.chosen("only", list(dict.fromkeys(case.op for case in every)))  # a wrong name is told before the copy
    return Bench(run, names).parts([case for case in every if is_chosen(case)])


SUITE = Suite(
    name="kernels",
    parts=parts,
    baselines=("eager",),
    plots={"_time": ("median_ms",), "_bandwidth": ("share_of_copy",)},
    is_wide=True,
)
