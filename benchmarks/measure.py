"""Timing with a cold cache, memory, rates to compare with, and the check that comes before all of them."""

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from pixelgen_kernels import registry
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.case import Case, Op, leaves_of, outputs

# larger than the last-level cache: 32 to 64 MB per core complex of a server CPU, up to 126 MB on a GPU
FLUSH_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
# While a GPU flushes, the host gets ahead and enqueues what is timed: as in training, launches cost nothing.
FLUSHES = {"cpu": 1, "cuda": 4}
COPY_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
WARM_UP = 2
# Repeats that are not given: what fits this time for all providers of a row together, within these bounds.
SECONDS, FEWEST, MOST = 1.0, 7, 50

Prepare = Callable[[], Any]
Call = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of the calls of one row."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def summarise(milliseconds: list[float]) -> Timing:
    """Median and the 20th and 80th percentile."""
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(median_ms=statistics.median(milliseconds), p20_ms=fifths[0], p80_ms=fifths[-1])


def elapsed_ms(device: torch.device, call: Callable[[], Any]) -> float:
    """Milliseconds of a call; what it returns is freed outside the timed part."""
    if device.type == "cpu":
        begin = time.perf_counter()
        result = call()
        elapsed = (time.perf_counter() - begin) * 1e3
        del result
        return elapsed
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turns(
    once: dict[str, Callable[[], float]],
    repeats: int | None,
    *,
    warm_up: int = WARM_UP,
    seconds: float = SECONDS,
    fewest: int = FEWEST,
) -> dict[str, Timing]:
    """Timings of several providers, taken in turns, so that a disturbance hits all alike.

    Args:
        once: name -> a function that makes one call and returns its milliseconds.
        repeats: timed calls of each; None for as many as fit into `seconds`, at least `fewest`.
        warm_up: calls of each that do not count.
        seconds: see repeats.
        fewest: see repeats.
    """
    for _ in range(warm_up):
        begin = time.perf_counter()
        for call in once.values():
            call()
        turn = time.perf_counter() - begin
    if repeats is None:
        repeats = min(MOST, max(fewest, int(seconds / turn)))
    samples: dict[str, list[float]] = {name: [] for name in once}
    for _ in range(repeats):
        for name, call in once.items():
            samples[name].append(call())
    return {name: summarise(values) for name, values in samples.items()}


class ColdTimer:
    """Times calls whose inputs are in memory and not in a cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Read, not written: lines that were written would go back to memory while the call is timed. Ones,
        # since pages of zeros that nobody has written are one page.
        self._flush = torch.ones(FLUSH_BYTES[device.type] // 4, device=device)

    def once(self, prepare: Prepare, call: Call) -> float:
        """Milliseconds of `call(prepare())`, without those of `prepare`."""
        prepared = prepare()
        for _ in range(FLUSHES[self.device.type]):
            self._flush.sum()
        return elapsed_ms(self.device, lambda: call(prepared))

    def side_by_side(
        self, calls: dict[str, tuple[Prepare, Call]], repeats: int | None = None
    ) -> dict[str, Timing]:
        """Times (prepare, call) of several providers in turns."""
        return in_turns(
            {name: lambda parts=parts: self.once(*parts) for name, parts in calls.items()}, repeats
        )


def peak_bytes(
    device: torch.device,
    call: Call,
    prepare: Prepare = lambda: None,
    *,
    ignored: Collection[int] = (),
) -> int:
    """Memory that `call(prepare())` holds at its peak on top of what was there after `prepare`, in bytes.

    What the call returns counts. What `prepare` left behind and the call releases is subtracted. On the CPU
    every allocation and release of PyTorch's allocator is replayed from the profiler, which is exact; on a
    GPU the allocator keeps the number itself.

    Args:
        device: where it runs.
        call: gets what `prepare` returned.
        prepare: see above.
        ignored: allocations of these sizes do not count, on the CPU.
    """
    if device.type == "cuda":
        prepared = prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call(prepared)
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as recorded:
        prepared = prepare()
        with record_function("the call"):
            result = call(prepared)
    del result  # after the profile: its release is no part of the call
    events = recorded.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "the call")
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and abs(event.nbytes()) not in ignored
    ]
    levels = accumulate((change for moment, change in sorted(changes) if moment >= begin), initial=0)
    return max(levels)


def copy_timing(timer: ColdTimer, size: int, repeats: int | None = None) -> Timing:
    """Timing of a plain copy of so many bytes with a cold cache."""
    source = torch.ones(size // 4, device=timer.device)
    target = torch.zeros_like(source)
    return timer.side_by_side({"copy": (lambda: None, lambda _: target.copy_(source))}, repeats)["copy"]


def copy_gbps(timer: ColdTimer) -> float:
    """GB/s, read and write counted, of a plain copy with a cold cache."""
    size = COPY_BYTES[timer.device.type]
    return 2 * size / copy_timing(timer, size).median_ms / 1e6


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices, the fastest of 20: what the device can do."""
    size = {"cpu": 1536, "cuda": 8192}[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(elapsed_ms(device, lambda: a @ b) for _ in range(20)) * 1e3


def in_float64(value: Any) -> Any:
    """Floating tensors, and floating dtypes that are passed as values, as float64; all else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def results(
    fn: Op, inputs: dict[str, Any], differentiable: tuple[str, ...], cotangents: list[Tensor]
) -> dict[str, Tensor]:
    """Every output and gradient by name."""
    leaves = leaves_of(inputs, differentiable)
    y = outputs(fn(**{**inputs, **leaves}))
    named = {f"output {i}": output.detach() for i, output in enumerate(y)}
    if leaves:
        grads = torch.autograd.grad(y, list(leaves.values()), cotangents)
        named |= dict(zip((f"grad_{name}" for name in leaves), grads, strict=True))
    return named


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's `torch.library` ops: (op, arguments, what came out)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "pixelgen":
            self.calls.append((func, args, result))
        return result


def _bytes(value: Any) -> int:
    tensors = value if isinstance(value, tuple | list) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def traffic(case: Case, inputs: dict[str, Any]) -> dict[str, int]:
    """Bytes that have to move at least, by mode: every input read once, every output written once.

    Statistics that forward keeps for backward count, and what backward need not read of an input does not
    (`Op.idle`).
    """
    op = registry.ops()[case.op]
    with Recorder() as recorder:
        leaves = leaves_of(inputs, case.differentiable)
        y = outputs(case.fused(**{**inputs, **leaves}))
        if leaves:
            torch.autograd.grad(y, list(leaves.values()), [torch.ones_like(output) for output in y])
    moved = [_bytes(arguments) + _bytes(made) for _, arguments, made in recorder.calls]
    if op.call.bwd is not None:
        named = dict(zip(op.call.bwd.arguments, recorder.calls[-1][1], strict=True))
        moved[-1] -= sum(int(share * _bytes(named[key])) for key, share in op.idle.items())
    bwd = sum(moved[1:])
    return {"fwd": moved[0], "bwd": bwd, "fwd_bwd": moved[0] + bwd}


class Oracle:
    """What a case computes in float64, and how far eager is from that in the dtype of the case."""

    def __init__(self, case: Case, inputs: dict[str, Any]) -> None:
        self.case, self.inputs = case, inputs
        with torch.no_grad():
            y = outputs(case.eager(**inputs))
        generator = torch.Generator().manual_seed(7)
        self.cotangents = [torch.randn(output.shape, generator=generator).to(output) for output in y]
        doubles = {name: in_float64(value) for name, value in inputs.items()}
        double_cotangents = [cotangent.double() for cotangent in self.cotangents]
        self.expected = results(case.eager, doubles, case.differentiable, double_cotangents)
        self.eager = results(case.eager, inputs, case.differentiable, self.cotangents)

    def problems(self, fn: Op, factor: float) -> list[str]:
        """What `fn` computes further from the oracle than `factor` times eager's error and one eps."""
        actual = results(fn, self.inputs, self.case.differentiable, self.cotangents)
        found = []
        for name, expected in self.expected.items():
            eager, got = self.eager[name], actual[name]
            if (got.shape, got.dtype) != (eager.shape, eager.dtype):
                found.append(
                    f"{name} is {got.dtype} {tuple(got.shape)}, not {eager.dtype} {tuple(eager.shape)}"
                )
                continue
            eps = torch.finfo(eager.dtype).eps * expected.abs().max().item()
            error = (got.double() - expected).abs().max().item()
            allowed = factor * (eager.double() - expected).abs().max().item() + eps
            if not error <= allowed:
                found.append(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
        return found
