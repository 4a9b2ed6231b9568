"""Memory of every op on the CPU at a model's shapes: outputs and what backward needs, nothing else.

Partial sums may add 1/500 of the inputs in forward, and 3 % of the gradients in backward.
"""

import pytest
import torch
from op_testing import OPS, Inputs, combinations, recorded
from pixelgen_kernels.cases import Benchmark, Draw
from pixelgen_kernels.registry import Op
from torch import Tensor

from benchmarks.measure import peak_bytes

CPU = torch.device("cpu")
CASES = {
    f"{name} {benchmark.label} {layout}": (op, benchmark, layout)
    for name, op in OPS.items()
    for benchmark in op.benchmarks("cpu")
    for layout in ("dense", "channels last")
    if benchmark.label.startswith(("B/16", "VGG16-relu3_3", "DINOv2-S")) and layout in op.layouts
}


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tensors_in(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [item for item in value if isinstance(item, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "benchmark", "layout"), CASES.values(), ids=CASES)
def test_an_op_allocates_its_outputs_and_statistics(
    op: Op, benchmark: Benchmark, layout: str, dtype: torch.dtype
) -> None:
    draw = Draw(dtype=dtype, other=benchmark.other, layout=layout)
    options: Inputs = {**combinations(op)[0], **benchmark.options}
    inputs = op.inputs(draw, benchmark.shape, **options)
    given = [name for name in op.differentiable if isinstance(inputs.get(name), Tensor)]
    names = [name for name in given if name not in benchmark.constant]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    (_, arguments, made), *_ = recorded(op.fused, inputs, names)
    least = size(tensors_in(made))
    allowed = least + size(tensors_in(arguments)) // 500

    def forward(_: object = None) -> list[Tensor]:
        return tensors_in(op.fused(**{**inputs, **leaves}))

    outputs = forward()
    peak = peak_bytes(CPU, forward)
    assert least <= peak <= allowed, f"forward: {peak} bytes for outputs of {least}"
    if not names:
        return
    cotangents = [torch.ones_like(output) for output in outputs]

    def backward(y: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(leaves.values()), cotangents)

    least = size(list(backward(outputs)))  # also warms up what is allocated once
    peak = peak_bytes(CPU, backward, forward)
    assert least <= peak <= 1.03 * least, f"backward: {peak} bytes for gradients of {least}"
