"""Timing with a cold cache, the bandwidth of a copy, and the check that comes before both."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case

# larger than the last-level cache: 32 to 64 MB per core complex of a server CPU, 50 to 126 MB of L2 on a GPU
FLUSH_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of the calls of one row."""

    median_ms: float
    p20_ms: float
    p80_ms: float


class ColdTimer:
    """Times calls whose inputs are in memory and not in a cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.zeros(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)

    def once(self, prepare: Callable[[], Any], call: Callable[[Any], Any]) -> float:
        """Milliseconds of `call(prepare())`, without those of `prepare`."""
        prepared = prepare()
        self._flush.add_(1)
        if self.device.type == "cpu":
            begin = time.perf_counter()
            result = call(prepared)
            elapsed = (time.perf_counter() - begin) * 1e3
            del result  # freed outside the timed part
            return elapsed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(prepared)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def side_by_side(
        self, calls: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]], repeats: int
    ) -> dict[str, Timing]:
        """Times (prepare, call) of several providers in turns, so that a disturbance hits all alike."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(WARM_UP + repeats):
            for name, (prepare, call) in calls.items():
                elapsed = self.once(prepare, call)
                if repeat >= WARM_UP:
                    samples[name].append(elapsed)
        return {name: summarise(values) for name, values in samples.items()}

    def peak_mb(self, prepare: Callable[[], Any], call: Callable[[Any], Any]) -> float | None:
        """Device memory that `call` needs on top of what there was, in MB; None on the CPU (not counted)."""
        if self.device.type == "cpu":
            return None
        prepared = prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(prepared)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def summarise(milliseconds: list[float]) -> Timing:
    """Median and the 20th and 80th percentile."""
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(median_ms=statistics.median(milliseconds), p20_ms=fifths[0], p80_ms=fifths[-1])


def copy_gbps(timer: ColdTimer, repeats: int, size: int = 32 * 2**20) -> float:
    """GB/s, read and write counted, of a plain copy of `size` bytes with a cold cache."""
    source = torch.ones(size // 4, device=timer.device)
    target = torch.zeros_like(source)
    timing = timer.side_by_side({"copy": (lambda: None, lambda _: target.copy_(source))}, repeats)
    return 2 * size / timing["copy"].median_ms / 1e6


def forward_and_gradients(
    fn: Callable[..., Tensor], inputs: dict[str, Any], differentiable: tuple[str, ...], grad_y: Tensor | None
) -> dict[str, Tensor]:
    """y and the gradients by name; grad_y is all ones when it is None."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable}
    y = fn(**{**inputs, **leaves})
    grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y) if grad_y is None else grad_y)
    return {"y": y.detach(), **dict(zip((f"grad_{name}" for name in leaves), grads, strict=True))}


def errors_against_oracle(
    case: Case, fn: Callable[..., Tensor], device: torch.device, factor: float
) -> list[str]:
    """What is further from the float64 oracle than `factor` times eager's error and one eps."""
    inputs = case.inputs(device)
    doubles = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        y = case.eager(**inputs)
    generator = torch.Generator().manual_seed(7)
    grad_y = torch.randn(y.shape, generator=generator).to(y)
    oracle = forward_and_gradients(case.eager, doubles, case.differentiable, grad_y.double())
    eager = forward_and_gradients(case.eager, inputs, case.differentiable, grad_y)
    actual = forward_and_gradients(fn, inputs, case.differentiable, grad_y)

    problems = []
    for name, expected in oracle.items():
        eps = torch.finfo(actual[name].dtype).eps * expected.abs().max().item()
        got = (actual[name].double() - expected).abs().max().item()
        allowed = factor * (eager[name].double() - expected).abs().max().item() + eps
        if not got <= allowed:
            problems.append(f"{name} is off by {got:.3g}, allowed {allowed:.3g}")
    return problems
