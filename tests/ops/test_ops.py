"""What holds for every op, at the cases of its file; what is special about one is in a file beside this."""

import inspect
import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from op_testing import (
    DEVICES,
    DIFFERENTIABLE,
    DTYPES,
    OPS,
    Inputs,
    Point,
    assert_same_bits,
    cases,
    check_accuracy,
    check_compiles,
    check_double_backward_refused,
    check_gradcheck,
    check_no_alias,
    check_point,
    combinations,
    layouts_of,
    pairwise,
    points,
    recorded,
    run,
    small,
)
from pixelgen_kernels import OP_NAMES, select
from pixelgen_kernels.cases import LAYOUTS
from pixelgen_kernels.registry import Op
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_differentiable_op = pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
KERNELS = {k.op: k for op in OPS.values() for k in (op.call.fwd, op.call.bwd) if k is not None}
EVERY_COMBINATION = [
    pytest.param(op, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name, op in DIFFERENTIABLE.items()
    for options in combinations(op)
]


def ends(items: Sequence[Any]) -> tuple[Any, Any]:
    return items[0], items[-1]


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


# the accuracy of normal numbers, in units in the last place, is in test_philox.py
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("point", cases(op for name, op in OPS.items() if name != "philox_normal"))
def test_accuracy(point: Point, device: str) -> None:
    """Outputs and gradients; moved numbers are equal to the last bit."""
    results = check_point(point, device)
    if point.op.is_exact:
        assert_same_bits(results, run(point.op.eager, *point.inputs(device)))


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see interpret_triton.py
# arguments that have the dtype of another
SAME_DTYPE = {"scale": "shift", "bias": "weight"}


@every_op
@pytest.mark.parametrize("device", DEVICES)
def test_any_mixture_of_dtypes(op: Op, device: str) -> None:
    """Each floating argument has a dtype of its own, which is that of its gradient."""
    for options in pairwise(op.options) or combinations(op):
        given, names = Point(op=op, shape=op.shapes[2], options=options).inputs(device)
        floats = [
            key for key, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()
        ]
        for row in pairwise({key: (*DTYPES, torch.float64) for key in floats if key not in SAME_DTYPE}):
            if IS_INTERPRETED and {torch.float64, torch.bfloat16} <= {*row.values()}:
                continue  # Triton's interpreter cannot store the one as the other
            inputs = {**given, **{key: given[key].to(row[SAME_DTYPE.get(key, key)]) for key in floats}}
            if row[floats[0]] == torch.float64:  # eager is the oracle itself
                assert_close(run(op.fused, inputs, names), run(op.eager, inputs, names))
            else:
                check_accuracy(op.fused, op.eager, inputs, names)


@every_op
def test_opcheck(op: Op) -> None:
    """Schema, fake and autograd registration of both directions, for the first layout and the last."""
    for options, layout in zip(ends(combinations(op)), ends(op.layouts), strict=True):
        inputs, names = Point(op=op, shape=op.shapes[1], options=options, layout=layout).inputs()
        calls = recorded(op.fused, inputs, names)
        assert {call[0] for call in calls} >= {op.call.fwd.op}
        for function, arguments, _ in calls:
            detached = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
            torch.library.opcheck(function, tuple(detached))
        function, arguments, _ = calls[0]
        takes = inspect.signature(op.call.fwd.reference).parameters
        leaves = tuple(
            a.detach().clone().requires_grad_() if isinstance(a, Tensor) and key in names else a
            for key, a in zip(takes, arguments, strict=True)
        )
        torch.library.opcheck(function, leaves)


@pytest.mark.parametrize(("op", "options"), EVERY_COMBINATION)
def test_gradcheck(op: Op, options: Inputs) -> None:
    inputs, names = small(op, **options)
    check_gradcheck(op.fused, inputs, names)


@every_op
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(op: Op, backend: str) -> None:
    for options in ends(combinations(op)):
        check_compiles(op.fused, *small(op, **options), backend)


@every_differentiable_op
def test_gradients_only_where_they_are_wanted(op: Op) -> None:
    inputs, names = small(op)
    assert not any(y.requires_grad for y in outputs_of(op.fused(**inputs)))
    for name in names:
        leaf = {**inputs, name: inputs[name].clone().requires_grad_()}
        assert all(y.requires_grad for y in outputs_of(op.fused(**leaf)))
        with torch.no_grad():
            assert not any(y.requires_grad for y in outputs_of(op.fused(**leaf)))


@every_op
def test_no_other_argument_has_a_gradient(op: Op) -> None:
    inputs, names = small(op)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in names:
            leaf = {**inputs, name: value.clone().requires_grad_()}
            for fn in (op.fused, op.eager):
                assert not any(y.requires_grad for y in outputs_of(fn(**leaf))), name


@every_differentiable_op
def test_second_derivatives(op: Op) -> None:
    """Refused, and never silently wrong; the ops that move numbers are linear and have them."""
    inputs, names = small(op)
    if not op.is_exact:
        check_double_backward_refused(op.fused, inputs, names)
        return
    leaf = inputs[names[0]].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: op.fused(**{**inputs, names[0]: x}), leaf)


@every_differentiable_op
def test_forward_mode_and_functorch_are_refused(op: Op) -> None:
    inputs, names = small(op)
    primal = inputs[names[0]]
    expected = f"{op.name}: torch.func and forward-mode derivatives are not supported"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=expected):
        op.fused(**{**inputs, names[0]: forward_ad.make_dual(primal, torch.ones_like(primal))})
    with pytest.raises(RuntimeError, match=expected):
        torch.func.grad(lambda x: outputs_of(op.fused(**{**inputs, names[0]: x}))[0].sum())(primal)


@every_op
def test_outputs_are_fresh(op: Op) -> None:
    for options in combinations(op):
        check_no_alias(op.fused, Point(op=op, shape=op.shapes[0], options=options).inputs()[0])


@every_op
@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(op: Op, device: str) -> None:
    """Whatever the number of threads of the CPU, and the order of the blocks of a GPU."""
    threads = torch.get_num_threads()
    for shape, options in itertools.product(op.shapes[1:], ends(combinations(op))):
        inputs, names = Point(op=op, shape=shape, options=options).inputs(device)
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run(op.fused, inputs, names))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert_same_bits(other, results[0])


@every_differentiable_op
@pytest.mark.parametrize("layout", [*LAYOUTS, "one number"])
def test_upstream_gradients_of_any_layout(op: Op, layout: str) -> None:
    """Autograd hands over gradients of any strides, expanded ones among them."""

    def relaid(grad: Tensor) -> Tensor:
        if layout == "one number":
            return grad.flatten()[0].expand(grad.shape)
        return LAYOUTS[layout](grad)

    def gradients(fn: Any) -> tuple[Tensor, ...]:
        outputs = outputs_of(fn(**{**inputs, **leaves}))
        grads = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
        return torch.autograd.grad(outputs, list(leaves.values()), list(map(relaid, grads)))

    for shape, options in itertools.product(op.shapes[1:3], ends(combinations(op))):
        inputs, names = Point(op=op, shape=shape, options=options).inputs()
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        assert_close(gradients(op.fused), gradients(op.eager))


@every_differentiable_op
def test_some_outputs_or_one_input(op: Op) -> None:
    """The gradients of any of the outputs, for all inputs and for each alone."""
    inputs, names = small(op, **combinations(op)[-1])

    def gradients(fn: Any, chosen: tuple[int, ...], wanted: list[str]) -> tuple[Tensor, ...]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
        outputs = outputs_of(fn(**{**inputs, **leaves}))
        nothing = sum(0 * leaf.sum() for leaf in leaves.values())
        loss = sum((outputs[i].square().sum() for i in chosen), nothing)
        return torch.autograd.grad(loss, list(leaves.values()))

    indices = range(len(outputs_of(op.eager(**inputs))))
    for size, wanted in itertools.product(range(1, 4), (names, *([name] for name in names))):
        for chosen in itertools.combinations(indices, size):
            assert_close(gradients(op.fused, chosen, wanted), gradients(op.eager, chosen, wanted))


@every_op
def test_autocast_changes_nothing(op: Op) -> None:
    inputs, names = small(op)
    expected = run(op.fused, inputs, names)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(op.fused, inputs, names), expected)


@every_differentiable_op
def test_activation_checkpointing(op: Op) -> None:
    inputs, names = small(op)

    def checkpointed(**arguments: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(op.fused, use_reentrant=False, **arguments)

    assert_same_bits(run(checkpointed, inputs, names), run(op.fused, inputs, names))


@every_op
def test_the_reference_serves_other_devices(op: Op) -> None:
    """What runs where there is no compiled code: the same results, in the layout that the fake promises."""
    for options in combinations(op):
        inputs, names = small(op, **options)
        for function, arguments, result in recorded(op.fused, inputs, names):
            with torch.no_grad():
                expected = KERNELS[function].by_reference(*arguments)
            assert_close(result, expected)
            for a, b in zip(outputs_of(result), outputs_of(expected), strict=True):
                assert a.stride() == b.stride()


@pytest.mark.parametrize("name", OP_NAMES)
def test_fused_and_eager_have_one_signature(name: str) -> None:
    fused, eager = getattr(select("auto"), name), getattr(select("eager"), name)
    assert fused is not eager
    assert inspect.signature(fused) == inspect.signature(eager)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels must be 'auto' or 'eager', got 'cuda'"):
        select("cuda")


# --- the tests themselves


def test_fresh_memory_is_poisoned() -> None:
    assert all(torch.empty(5, dtype=dtype).isnan().all() for dtype in (*DTYPES, torch.float64))
    assert torch.ones(5).new_empty(3).isnan().all() and torch.empty_like(torch.ones(2, 3)).isnan().all()
    assert torch.empty(5, dtype=torch.int64).min() == torch.iinfo(torch.int64).max


def test_any_two_values_meet() -> None:
    dimensions = {"a": range(9), "b": range(7), "c": (None, 1, 2), "d": "xyz", "e": [[1], (2,)]}
    rows = pairwise(dimensions)
    assert len(rows) == len(dimensions["a"]) * len(dimensions["b"])  # as few as there can be
    for (a, values), (b, others) in itertools.combinations(dimensions.items(), 2):
        assert all(any(row[a] == x and row[b] == y for row in rows) for x in values for y in others)


@every_op
def test_points_have_every_shape_layout_and_option(op: Op) -> None:
    found = points(op)
    assert len(set(map(str, found))) == len(found)
    met = {(point.shape, point.layout) for point in found}
    assert met == {(shape, layout) for shape in op.shapes for layout in layouts_of(op, shape)}
    for key, values in op.options.items():
        met = {(point.shape, point.options[key]) for point in found}
        assert met == set(itertools.product(op.shapes, values))
