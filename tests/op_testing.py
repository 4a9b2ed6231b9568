"""What every op has to pass, written once.

An op is called by keyword with a dict of inputs, made by the cases that stand in its file. The oracle is its
reference in float64 on the same values, and accuracy is judged against what the reference (eager) reaches in
the dtype under test, so no test invents a tolerance.
"""

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

    def inputs(self, device: str = "cpu", seed: int = 0) -> tuple[Inputs, list[str]]:
        """The arguments, and the names of those that get a gradient."""
        dtypes = {"dtype": self.dtype, "other": self.other, "weights": self.other}
        draw = Draw(**dtypes, device=device, layout=self.layout, seed=seed)
        inputs = self.op.inputs(draw, self.shape, **self.options)
        names = [name for name in self.op.differentiable if isinstance(inputs.get(name), Tensor)]
        return inputs, names


def inputs_of(
    name: str, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> Inputs:
    """Dense arguments of the op of that name."""
    return Point(op=OPS[name], shape=shape, options=options, dtype=dtype).inputs(device)[0]


def combinations(op: Op) -> list[Inputs]:
    """Every combination of the options of an op, the most usual first."""
    options = op.options
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def pairwise(dimensions: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows, of one value of each dimension, in which any two values of any two dimensions meet.

    A row starts from the first two that have not met. Each other dimension adds the value that meets most of
    the row for the first time.
    """
    columns = [[(key, i) for i in range(len(values))] for key, values in dimensions.items()]
    pairs = (pair for two in itertools.combinations(columns, 2) for pair in itertools.product(*two))
    apart = dict.fromkeys(map(frozenset, pairs))  # a set that keeps its order
    rows = []
    while apart:
        row = dict(next(iter(apart)))
        for column in columns:
            if column[0][0] not in row:
                meets = [sum(frozenset((item, other)) in apart for other in row.items()) for item in column]
                row.update([column[meets.index(max(meets))]])
        for pair in itertools.combinations(row.items(), 2):
            apart.pop(frozenset(pair), None)
        rows.append({key: values[row[key]] for key, values in dimensions.items()})
    return rows


def layouts_of(op: Op, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The layouts that a shape can have: of another rank than the second one, rows at equal distances."""
    if 0 in shape:
        return ("dense",)
    return op.layouts if len(shape) == len(op.shapes[1]) else ("dense", "chunk", "odd address")


def points(op: Op) -> list[Point]:
    """Any two of shape, layout, dtype, other dtype and options are together at one of them.

    The smallest shape, empty ones and those of another rank meet each layout that they can have, each dtype
    and option; but what meets there may be without effect, and has to meet elsewhere as well.
    """
    whole = [shape for shape in op.shapes[1:] if len(shape) == len(op.shapes[1]) and 0 not in shape]
    others = {"layout": op.layouts, "dtype": DTYPES, "other": (None, *DTYPES), **op.options}
    rows = pairwise({"shape": whole, **others})
    for shape in op.shapes:
        if shape not in whole:
            here = {**others, "layout": layouts_of(op, shape)}
            turns = range(max(map(len, here.values())))
            rows += [
                {"shape": shape} | {key: each[i % len(each)] for key, each in here.items()} for i in turns
            ]
    options = [{key: row.pop(key) for key in op.options} for row in rows]
    return [Point(op=op, options=option, **row) for option, row in zip(options, rows, strict=True)]


def product(op: Op) -> list[Point]:
    """Every combination of options at every shape, and in every layout at the second one; any dtypes."""
    any_of = random.Random(op.name).choice
    places = [(shape, "dense") for shape in op.shapes] + [(op.shapes[1], layout) for layout in op.layouts]
    return [
        Point(
            op=op,
            shape=shape,
            options=options,
            dtype=any_of(DTYPES),
            other=any_of((None, *DTYPES)),
            layout=layout,
        )
        for shape, layout in places
        for options in combinations(op)
    ]


def cases(ops: Iterable[Op]) -> list[Any]:
    """Parameters of a test: the points of ops; and those of their products, which are slow."""
    ops = list(ops)
    found = {str(point): pytest.param(point, id=str(point)) for op in ops for point in points(op)}
    for point in (point for op in ops for point in product(op)):
        found.setdefault(str(point), pytest.param(point, id=str(point), marks=pytest.mark.slow))
    return list(found.values())


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
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    factor: float = 2.0,
    name: str = "output",
    similar: Iterable[tuple[Tensor, Tensor]] = (),
) -> None:
    """Asserts that `actual` is at most `factor` times as far from the oracle as eager is, plus one eps.

    `similar` makes more of eager and oracle: few numbers eager may all have exactly right by chance.
    """
    assert actual.shape == oracle.shape, f"{name}: {actual.shape}, expected {oracle.shape}"
    got, allowed = max_err(actual, oracle), -1.0
    for each, exact in itertools.chain([(eager, oracle)], similar):
        floor = torch.finfo(actual.dtype).eps * exact.abs().max().item() if exact.numel() else 0.0
        allowed = max(allowed, factor * max_err(each, exact) + floor)
        if got <= allowed:
            return
    raise AssertionError(f"{name}: max error {got:.3e} > {allowed:.3e} ({factor}x eager's error + one eps)")


def assert_same_bits(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


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


def named(results: tuple[list[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `run` gives, by name."""
    outputs, grads = results
    return {f"output {i}": y for i, y in enumerate(outputs)} | {f"grad_{key}": g for key, g in grads.items()}


def check_accuracy(
    fn: Callable,
    reference: Callable,
    inputs: Inputs,
    differentiable: Sequence[str] = (),
    similar: Callable[[], Iterable[Inputs]] = tuple,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs and every gradient, against the float64 oracle and relative to eager; returns them."""

    def by_reference(given: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        eager, oracle = (run(reference, each, differentiable) for each in (given, in_float64(given)))
        return named(eager), named(oracle)

    results = run(fn, inputs, differentiable)
    eager, oracle = by_reference(inputs)
    assert named(results).keys() == eager.keys()
    for name, result in named(results).items():
        assert result.dtype == eager[name].dtype, f"{name}: {result.dtype}, expected {eager[name].dtype}"
        # unless all arguments are float64, the arithmetic is that of float32
        judged = result.float() if result.dtype == torch.float64 else result
        others = ((eager[name], oracle[name]) for eager, oracle in map(by_reference, similar()))
        assert_as_accurate(judged, eager[name], oracle[name], name=name, similar=others)
    return results


def check_point(point: Point, device: str = "cpu") -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results at a point are accurate, and inputs are not written."""
    inputs, names = point.inputs(device)
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, Tensor)}

    def similar() -> Iterator[Inputs]:
        return (point.inputs(device, seed)[0] for seed in (100, 200, 300))

    results = check_accuracy(point.op.fused, point.op.eager, inputs, names, similar)
    assert_same_bits({key: inputs[key] for key in before}, before)
    return results


def check_gradcheck(fn: Callable, inputs: Inputs, differentiable: Sequence[str]) -> None:
    """The analytic backward against finite differences in float64."""
    inputs = in_float64(inputs)
    leaves = [inputs[name].detach().requires_grad_() for name in differentiable]

    def call(*values: Tensor) -> Any:
        return fn(**{**inputs, **dict(zip(differentiable, values, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)


def check_compiles(fn: Callable, inputs: Inputs, differentiable: Sequence[str], backend: str) -> None:
    """`torch.compile(fullgraph=True)` gives what the call itself gives, forward and backward."""
    torch._dynamo.reset()
    outputs, grads = run(torch.compile(fn, fullgraph=True, backend=backend), inputs, differentiable)
    expected_outputs, expected_grads = run(fn, inputs, differentiable)
    torch.testing.assert_close(outputs, expected_outputs)
    torch.testing.assert_close(grads, expected_grads)


def check_refuses(fn: Callable, inputs: Inputs, refused: Mapping[str, Inputs]) -> None:
    """Every change of right arguments raises its error, "Type: text ... text", which names the op."""
    for expected, changes in refused.items():
        kind, text = expected.split(": ", 1)
        with pytest.raises((TypeError, ValueError)) as caught:
            fn(**{**inputs, **changes})
        told = f"{type(caught.value).__name__}: {caught.value}"
        assert told.startswith(f"{kind}: {fn.__name__}: "), told
        assert all(part in told for part in text.split(" ... ")), f"{told}\ndoes not say: {text}"


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
