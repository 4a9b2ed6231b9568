"""What every op has to pass, written once.

An op is called by keyword with a dict of inputs, made by the cases that stand in its file. The oracle is its
reference in float64 on the same values, and accuracy is judged against what the reference (eager) reaches in
the dtype under test, so no test invents a tolerance.
"""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pixelgen_kernels import registry
from pixelgen_kernels.cases import Draw
from pixelgen_kernels.registry import Op
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are not installed
from benchmarks.measure import Recorder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
OPS = registry.ops()
DIFFERENTIABLE = {name: op for name, op in OPS.items() if op.differentiable}

Inputs = dict[str, Any]


# --- the points at which an op is tested


@dataclass(frozen=True, kw_only=True)
class Point:
    """One set of inputs of an op."""

    op: Op
    shape: tuple[int, ...]
    options: Inputs = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    other: torch.dtype | None = None
    layout: str = "dense"

    def __str__(self) -> str:
        def text(value: Any) -> str:
            return str(value).removeprefix("torch.").replace(" ", "")

        parts = [self.op.name, text(self.shape), *map(text, self.options.values()), text(self.dtype)]
        return "-".join([*parts, *([text(self.other)] if self.other else []), self.layout])

    def inputs(self, device: str = "cpu") -> tuple[Inputs, list[str]]:
        """The arguments, and the names of those that get a gradient."""
        draw = Draw(dtype=self.dtype, other=self.other, weights=self.other, device=device, layout=self.layout)
        inputs = self.op.inputs(draw, self.shape, **self.options)
        names = [name for name in self.op.differentiable if isinstance(inputs.get(name), Tensor)]
        return inputs, names


def combinations(op: Op) -> list[Inputs]:
    """Every combination of the options of an op, the most usual first."""
    options = op.options
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def points(op: Op) -> list[Point]:
    """Every combination of options at every shape and in every layout, dtypes in turns; and mixed dtypes."""
    every = combinations(op)
    turns = itertools.cycle(DTYPES)
    odd = op.shapes[1]
    found = [
        Point(op=op, shape=shape, options=options, dtype=next(turns))
        for shape in op.shapes
        for options in every
    ]
    found += [Point(op=op, shape=odd, options=options, dtype=dtype) for options in every for dtype in DTYPES]
    found += [
        Point(op=op, shape=odd, options=options, dtype=next(turns), layout=layout)
        for layout in op.layouts[1:]
        for options in every
    ]
    found += [
        Point(op=op, shape=odd, options=options, dtype=dtype, other=other)
        for options in (every[0], every[-1])
        for dtype, other in itertools.permutations(DTYPES, 2)
    ]
    return list({str(point): point for point in found}.values())


def small(op: Op, **options: Any) -> tuple[Inputs, list[str]]:
    """Inputs of the shape that is there for slow checks."""
    return Point(op=op, shape=op.small, options={**combinations(op)[0], **options}).inputs()


# --- what happens inside of a call


def recorded(fn: Callable, inputs: Inputs, differentiable: Sequence[str]) -> list[tuple[Any, Any, Any]]:
    """The ops that forward and backward call."""
    with Recorder() as recorder:
        run(fn, inputs, differentiable)
    return recorder.calls


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel leaves out shows."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


# --- accuracy


def max_err(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, 0 for empty tensors."""
    if actual.numel() == 0:
        return 0.0
    return (actual.double() - expected.double()).abs().max().item()


def assert_as_accurate(
    actual: Tensor, eager: Tensor, oracle: Tensor, factor: float = 2.0, name: str = "output"
) -> None:
    """Asserts that `actual` is at most `factor` times as far from the oracle as eager is, plus one eps."""
    assert actual.shape == oracle.shape, f"{name}: {actual.shape}, expected {oracle.shape}"
    floor = torch.finfo(actual.dtype).eps * oracle.abs().max().item() if oracle.numel() else 0.0
    got, allowed = max_err(actual, oracle), factor * max_err(eager, oracle) + floor
    assert got <= allowed, f"{name}: max error {got:.3e} > {allowed:.3e} ({factor}x eager's error + one eps)"


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor, and every dtype that is passed as a value, as float64."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        return value

    return {name: convert(value) for name, value in inputs.items()}


def run(
    fn: Callable, inputs: Inputs, differentiable: Sequence[str] = ()
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of `fn(**inputs)` and the gradients of a fixed projection of them, by input name.

    The projection weights are multiples of 1/8 in [-1, 1], exact in every dtype.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable}
    result = fn(**{**inputs, **leaves})
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not differentiable:
        return outputs, {}
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        (torch.randint(-8, 9, output.shape, generator=generator) / 8).to(output) for output in outputs
    ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return [output.detach() for output in outputs], dict(zip(leaves, grads, strict=True))


def check_accuracy(
    fn: Callable, reference: Callable, inputs: Inputs, differentiable: Sequence[str] = ()
) -> None:
    """The outputs and every gradient, against the float64 oracle and relative to eager."""
    with poisoned():
        outputs, grads = run(fn, inputs, differentiable)
    eager_outputs, eager_grads = run(reference, inputs, differentiable)
    oracle_outputs, oracle_grads = run(reference, in_float64(inputs), differentiable)
    assert len(outputs) == len(eager_outputs)
    for index, (output, eager, oracle) in enumerate(zip(outputs, eager_outputs, oracle_outputs, strict=True)):
        assert output.dtype == eager.dtype, f"output {index}: dtype {output.dtype}, expected {eager.dtype}"
        assert_as_accurate(output, eager, oracle, name=f"output {index}")
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype, f"grad_{name}: dtype {grad.dtype}"
        assert_as_accurate(grad, eager_grads[name], oracle_grads[name], name=f"grad_{name}")


def check_gradcheck(fn: Callable, inputs: Inputs, differentiable: Sequence[str]) -> None:
    """The analytic backward against finite differences in float64."""
    inputs = in_float64(inputs)
    leaves = [inputs[name].detach().requires_grad_() for name in differentiable]

    def call(*values: Tensor) -> Any:
        return fn(**{**inputs, **dict(zip(differentiable, values, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)


def check_compiles(fn: Callable, inputs: Inputs, differentiable: Sequence[str] = ()) -> None:
    """`torch.compile(fullgraph=True)` gives what the call itself gives, forward and backward."""
    torch._dynamo.reset()
    outputs, grads = run(torch.compile(fn, fullgraph=True), inputs, differentiable)
    expected_outputs, expected_grads = run(fn, inputs, differentiable)
    torch.testing.assert_close(outputs, expected_outputs)
    torch.testing.assert_close(grads, expected_grads)


def check_refuses(fn: Callable, inputs: Inputs, error: type[Exception], match: str, **changes: Any) -> None:
    """Wrong arguments raise `error` with a text that names them."""
    with pytest.raises(error, match=match):
        fn(**{**inputs, **changes})


def check_double_backward_refused(fn: Callable, inputs: Inputs, differentiable: Sequence[str]) -> None:
    """A second derivative raises instead of being silently wrong."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable}
    result = fn(**{**inputs, **leaves})
    outputs = [result] if isinstance(result, Tensor) else list(result)
    loss = torch.stack([output.float().square().sum() for output in outputs]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum(grad.float().sum() for grad in grads), list(leaves.values()))


def check_no_alias(fn: Callable, inputs: Inputs) -> None:
    """No output shares memory with an input or with another output."""

    def storages(tensors: list[Tensor]) -> list[int]:
        return [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]

    outputs = storages(run(fn, inputs)[0])
    assert len(set(outputs)) == len(outputs)
    assert not set(outputs) & set(storages([value for value in inputs.values() if isinstance(value, Tensor)]))


def run_interpreted(test_file: str) -> None:
    """Runs a file of Triton tests under the interpreter, in a process of its own.

    Triton decides at import whether functions are interpreted, also for its own library, so one process
    cannot do both.
    """
    pytest.importorskip("triton", reason="needs triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}
    path = Path(__file__).parent / "ops" / test_file
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=path.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def compile_to_ptx(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any]) -> str:
    """PTX of a Triton kernel for sm_90, made without a GPU, as for aligned pointers and multiples of 16.

    Args:
        kernel: the `triton.jit` function.
        signature: type of every run-time argument by name, such as "*bf16", "i32", "fp32".
        constexprs: value of every constexpr by name.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index = {name: i for i, name in enumerate(kernel.arg_names)}
    assert set(index) == set(signature) | set(constexprs)
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        {(index[name],): value for name, value in constexprs.items()},
        {(index[name],): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] in "*i"},
    )
    target, options = GPUTarget("cuda", 90, 32), {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options).asm["ptx"]
