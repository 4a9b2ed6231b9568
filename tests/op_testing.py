"""What every op has to pass, written once.

An op is called by keyword with a dict of inputs. The oracle is its reference in float64 on the same values,
and accuracy is judged against what the reference (eager) reaches in the dtype under test, so no test invents
a tolerance.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

Inputs = dict[str, Any]


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


def as_chunk(tensor: Tensor, parts: int = 3, which: int = 1, dim: int = -1) -> Tensor:
    """The same values as a strided view: one chunk of a larger tensor whose other values are NaN."""
    shape = list(tensor.shape)
    shape[dim] *= parts
    packed = tensor.new_full(shape, float("nan"))
    view = packed.chunk(parts, dim)[which]
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the first two dimensions exchanged in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


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
    """Test 1: the outputs and every gradient, against the float64 oracle and relative to eager."""
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


def check_opcheck(op: Any, *args: Any) -> None:
    """Test 2: schema, fake and autograd registration of one `torch.library` op for these arguments."""
    torch.library.opcheck(op, args)


def check_gradcheck(fn: Callable, inputs: Inputs, differentiable: Sequence[str]) -> None:
    """Test 3: the analytic backward against finite differences in float64."""
    inputs = in_float64(inputs)
    leaves = [inputs[name].detach().requires_grad_() for name in differentiable]

    def call(*values: Tensor) -> Any:
        return fn(**{**inputs, **dict(zip(differentiable, values, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)


def check_compiles(fn: Callable, inputs: Inputs, differentiable: Sequence[str] = ()) -> None:
    """Test 4: `torch.compile(fullgraph=True)` gives what the call itself gives, forward and backward."""
    torch._dynamo.reset()
    outputs, grads = run(torch.compile(fn, fullgraph=True), inputs, differentiable)
    expected_outputs, expected_grads = run(fn, inputs, differentiable)
    torch.testing.assert_close(outputs, expected_outputs)
    torch.testing.assert_close(grads, expected_grads)


def check_refuses(fn: Callable, inputs: Inputs, error: type[Exception], match: str, **changes: Any) -> None:
    """Test 5: wrong arguments raise `error` with a text that names them."""
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
    path = Path(__file__).parent / test_file
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
