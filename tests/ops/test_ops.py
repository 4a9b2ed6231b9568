"""What holds for every op, at the cases of its file; what is special about one is in a file beside this."""

import inspect
from typing import Any

import pytest
import torch
from op_testing import (
    DEVICES,
    DIFFERENTIABLE,
    OPS,
    Inputs,
    Point,
    check_accuracy,
    check_compiles,
    check_double_backward_refused,
    check_gradcheck,
    check_no_alias,
    combinations,
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

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_differentiable_op = pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
# the accuracy of normal numbers, in units in the last place, is in test_philox.py
ALL_POINTS = [point for name, op in OPS.items() if name != "philox_normal" for point in points(op)]
KERNELS = {k.op: k for op in OPS.values() for k in (op.call.fwd, op.call.bwd) if k is not None}
EVERY_COMBINATION = [
    pytest.param(op, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name, op in DIFFERENTIABLE.items()
    for options in combinations(op)
]


def assert_same_bits(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("point", ALL_POINTS, ids=str)
def test_accuracy(point: Point, device: str) -> None:
    """Outputs and gradients; moved numbers are equal to the last bit; inputs are not written."""
    op = point.op
    inputs, names = point.inputs(device)
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, Tensor)}
    check_accuracy(op.fused, op.eager, inputs, names)
    if op.is_exact:
        outputs, expected = run(op.fused, inputs, names), run(op.eager, inputs, names)
        assert_same_bits(outputs, expected)
    for key, value in before.items():
        assert_same_bits(inputs[key], value)


@every_op
def test_opcheck(op: Op) -> None:
    """Schema, fake and autograd registration of both directions, for the first layout and the last."""
    for options in (combinations(op)[0], combinations(op)[-1]):
        for layout in (op.layouts[0], op.layouts[-1]):
            point = Point(op=op, shape=op.shapes[1], options=options, layout=layout)
            inputs, names = point.inputs()
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
def test_compiles_in_one_graph(op: Op) -> None:
    for options in (combinations(op)[0], combinations(op)[-1]):
        inputs, names = small(op, **options)
        check_compiles(op.fused, inputs, names)


@every_differentiable_op
def test_gradients_only_where_they_are_wanted(op: Op) -> None:
    inputs, names = small(op)
    leaf = {**inputs, names[0]: inputs[names[0]].clone().requires_grad_()}
    assert all(y.requires_grad for y in outputs_of(op.fused(**leaf)))
    assert not any(y.requires_grad for y in outputs_of(op.fused(**inputs)))
    with torch.no_grad():
        assert not any(y.requires_grad for y in outputs_of(op.fused(**leaf)))


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
        point = Point(op=op, shape=op.shapes[0], options=options)
        check_no_alias(op.fused, point.inputs()[0])


@every_op
def test_bits_do_not_depend_on_the_thread_count(op: Op) -> None:
    inputs, names = Point(op=op, shape=op.shapes[1], options=combinations(op)[-1]).inputs()
    threads = torch.get_num_threads()
    try:
        results = []
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
    inputs, names = Point(op=op, shape=op.shapes[1], options=combinations(op)[-1]).inputs()
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}

    def gradients(fn: Any) -> tuple[Tensor, ...]:
        outputs = outputs_of(fn(**{**inputs, **leaves}))
        drawn = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
        if layout == "one number":
            grads = [grad.flatten()[0].expand(grad.shape) for grad in drawn]
        else:
            grads = [LAYOUTS[layout](grad) for grad in drawn]
        return torch.autograd.grad(outputs, list(leaves.values()), grads)

    torch.testing.assert_close(gradients(op.fused), gradients(op.eager))


@every_differentiable_op
def test_one_output_or_one_input_alone(op: Op) -> None:
    """The gradient of each output alone, and for each input alone."""
    inputs, names = small(op, **combinations(op)[-1])

    def gradient(fn: Any, which: int, wanted: list[str]) -> tuple[Tensor, ...]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
        output = outputs_of(fn(**{**inputs, **leaves}))[which]
        if not output.requires_grad:
            return tuple(torch.zeros_like(leaf) for leaf in leaves.values())
        grads = torch.autograd.grad(output.square().sum(), list(leaves.values()), allow_unused=True)
        return tuple(
            leaf.detach() * 0 if grad is None else grad
            for leaf, grad in zip(leaves.values(), grads, strict=True)
        )

    for which in range(len(outputs_of(op.eager(**inputs)))):
        for wanted in (names, *([name] for name in names)):
            torch.testing.assert_close(gradient(op.fused, which, wanted), gradient(op.eager, which, wanted))


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
            torch.testing.assert_close(result, expected)
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
