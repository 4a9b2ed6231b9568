"""Hundreds of malformed calls of every op: TypeError or ValueError, or, where the call was right, a result.

A call starts from right arguments, of which one to three are exchanged for something else. All draws are
seeded. Tensors lie between guard values, which no call may change.
"""

import dataclasses
import inspect
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from op_testing import OPS, Inputs, combinations, run
from pixelgen_kernels.cases import Draw
from pixelgen_kernels.registry import Op
from torch import Tensor

# PyTorch warns that sparse and nested tensors are young
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
)
GUARD = 32  # values before and after every tensor


@dataclasses.dataclass
class Call:
    """Arguments, the memory that their tensors lie in, and whether the result may be judged."""

    random: random.Random
    inputs: Inputs = dataclasses.field(default_factory=dict)
    memory: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    is_judged: bool = True
    changes: list[str] = dataclasses.field(default_factory=list)

    def place(self, values: Tensor) -> Tensor:
        """The same values between guards, dense."""
        flat = torch.full((values.numel() + 2 * GUARD,), 77, dtype=torch.int64).to(values.dtype)
        if values.is_floating_point() and values.dtype in FLOATS:
            flat.fill_(float("nan"))
        view = flat[GUARD : GUARD + values.numel()].view(values.shape)
        view.copy_(values)
        self.memory.append((flat, flat.clone()))
        return view

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        return self.place(torch.randn(shape, generator=generator).to(dtype))

    def float_dtype(self) -> torch.dtype:
        return self.random.choice((torch.float32, torch.float32, *FLOATS))

    def is_likely(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    def memory_is_unchanged(self) -> bool:
        def bits(tensor: Tensor) -> Tensor:
            return tensor.view(torch.uint8)

        return all(torch.equal(bits(flat), bits(before)) for flat, before in self.memory)


class GuardedDraw(Draw):
    """Draws for a call, between guard values."""

    def __init__(self, call: Call) -> None:
        dtypes = {key: call.float_dtype() for key in ("dtype", "other", "weights")}
        super().__init__(**dtypes, seed=call.random.randrange(2**31))
        self.call = call

    def place(self, values: Tensor, dtype: torch.dtype | None = None, layout: str | None = None) -> Tensor:
        return self.call.place(values.to(dtype or self.dtype))


def right_call(op: Op, random: random.Random) -> Call:
    """Right arguments, those that have defaults among them."""
    call = Call(random)
    options = random.choice(combinations(op))
    defaults = {key: p.default for key, p in inspect.signature(op.fused).parameters.items()}
    call.inputs = {
        key: value for key, value in defaults.items() if value not in (None, inspect.Parameter.empty)
    }
    call.inputs |= op.inputs(GuardedDraw(call), op.small, **options)
    return call


# --- what takes the place of an argument

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7),
    *(2**31, 2**32 + 2, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 2.0, -1.5, 1e-320, 1e-40, 1e39, 1e300, float("nan"), float("inf"), float("-inf"), 1j),
    *("", "first", "last", "rms", "layer", "RMS", "bfloat16", "8", b"last", "\0", "\ud800"),
    *(
        [],
        [8, 12],
        (8, 12),
        (12, 8),
        (8, 12, 1),
        (8,),
        (8.0, 12.0),
        ("8", "12"),
        (True, 12),
        (-8, -12),
        (0, 0),
    ),
    *((None, None), (2**62, 2**62), {}, {8: 12}, {8, 12}, range(8, 13, 4), object(), len, int, Ellipsis),
    *(torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.complex64, torch.float8_e4m3fn),
    *(torch.tensor(2), torch.tensor(1.0), torch.tensor([8, 12]), torch.tensor(True), torch.Size([8, 12])),
    *(torch.strided, torch.device("cpu"), torch.Generator(), torch.channels_last),
    *(np.int64(2), np.float32(0.5), np.float64(0.5), np.array([8, 12]), np.zeros((2, 3, 8), np.float32)),
    *(np.bool_(True), np.str_("last")),
)


def reshaped(call: Call, tensor: Tensor) -> Tensor:
    """Another rank, or another size of one dimension."""
    shape = list(tensor.shape)
    kind = call.random.choice(("add", "drop", "flatten", "scalar", "size", "size", "empty", "split"))
    dim = call.random.randrange(len(shape))
    if kind == "add":
        shape.insert(dim, 1)
    elif kind == "drop":
        del shape[dim]
    elif kind == "flatten":
        shape = [tensor.numel()]
    elif kind == "scalar":
        shape = []
    elif kind == "size":
        shape[dim] = max(0, call.random.choice((shape[dim] - 1, shape[dim] + 1, 2 * shape[dim], 1, 8193)))
    elif kind == "empty":
        shape[dim] = 0
    else:
        shape[dim : dim + 1] = [1, shape[dim]]
    if tensor.dtype in FLOATS:
        return call.draw(*shape, dtype=tensor.dtype)
    return call.place(torch.zeros(shape, dtype=tensor.dtype))


def restrided(call: Call, tensor: Tensor) -> Tensor:
    """The shape stays, the strides do not."""
    dim = call.random.randrange(tensor.ndim)
    kind = call.random.choice(("exchanged", "step", "chunk", "expanded", "overlapping", "odd address"))
    if kind == "exchanged":
        other = call.random.randrange(tensor.ndim)
        return call.place(tensor.transpose(dim, other).contiguous()).transpose(dim, other)
    if kind in ("step", "chunk"):
        shape = [2 * size if i == dim else size for i, size in enumerate(tensor.shape)]
        packed = call.place(torch.full(shape, 3, dtype=torch.int64).to(tensor.dtype))
        view = (
            packed.unflatten(dim, (-1, 2)).select(dim + 1, 0) if kind == "step" else packed.chunk(2, dim)[1]
        )
        view.copy_(tensor)
        call.memory = [(flat, flat.clone()) for flat, _ in call.memory]
        return view
    if kind == "expanded":
        return call.place(tensor.narrow(dim, 0, 1)).expand(tensor.shape)
    if kind == "overlapping":
        flat = call.place(tensor.flatten())
        return flat.as_strided(tensor.shape, [1] * tensor.ndim)
    return call.place(torch.cat([tensor.flatten()[:1], tensor.flatten()]))[1:].view(tensor.shape)


def relaid(call: Call, tensor: Tensor) -> Tensor:
    """Not a strided tensor of plain numbers."""
    kind = call.random.choice(("sparse", "csr", "mkldnn", "quantised", "nested", "negative bit"))
    values = tensor.float()
    if kind == "negative bit":  # a right argument: memory holds the numbers with the other sign
        return torch.view_as_complex(torch.stack([values, -values], -1)).conj().imag
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "csr":
        return (values if values.ndim == 2 else values.flatten()[None]).to_sparse_csr()
    if kind == "mkldnn":
        return values.to_mkldnn()
    if kind == "quantised":
        return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
    return torch.nested.nested_tensor([values[0], values[0]] if values.ndim > 1 else [values, values])


def can_be_huge(value: Any) -> bool:
    """Of a vector the result might be as large, and real."""
    return isinstance(value, Tensor) and value.ndim > 1


def huge(call: Call, tensor: Tensor) -> Tensor:
    """2^31 elements and more, of which memory holds one row; the last dimension has stride 0."""
    return call.place(tensor[..., :1]).expand(*tensor.shape[:-1], 2**31 + 1)


def filled(call: Call, tensor: Tensor) -> Tensor:
    """Some numbers are no numbers, or hardly."""
    values = tensor.clone(memory_format=torch.contiguous_format)
    if values.numel() and values.dtype in FLOATS:
        call.is_judged = False
        value = call.random.choice((float("nan"), float("inf"), float("-inf"), torch.finfo(values.dtype).max))
        values.view(-1)[call.random.randrange(values.numel())] = value
    return call.place(values)


def other_dtype(call: Call, tensor: Tensor) -> Tensor:
    values = tensor.float() if tensor.is_floating_point() else tensor
    return call.place(values.to(call.random.choice((*OTHER_DTYPES, *FLOATS))))


def change(call: Call, name: str) -> None:
    """Exchanges the argument `name`."""
    value = call.inputs[name]
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    is_plain = is_plain and value.device.type == "cpu" and value.dtype in (*FLOATS, torch.uint8, torch.int64)
    if not is_plain or value.ndim == 0 or not 0 < value.numel() < 10**5 or call.is_likely(0.1):
        call.inputs[name] = value = call.random.choice(VALUES)
        if name == "count" and isinstance(value, int) and 10**4 < value <= 2**34:
            call.inputs[name] = 2**34 + 1  # what may be asked for takes gigabytes
        if isinstance(call.inputs[name], int | float) and not 1e-6 < abs(call.inputs[name]) < 1e6:
            call.is_judged = False
        call.changes.append(f"{name}={str(call.inputs[name]).splitlines()[:1]!s:.80}")
        return
    kinds = (other_dtype, reshaped, reshaped, restrided, restrided, relaid, filled, on_meta, needs_grad)
    kind = call.random.choice(kinds)
    call.inputs[name] = kind(call, value.detach())
    call.changes.append(f"{kind.__name__}({name})")


def on_meta(call: Call, tensor: Tensor) -> Tensor:
    call.is_judged = False
    return tensor.to("meta")


def needs_grad(call: Call, tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def malform(call: Call) -> None:
    names = list(call.inputs)
    kind = call.random.random()
    if kind < 0.03:  # a name too few or too many
        del call.inputs[call.random.choice(names)]
        call.changes.append("one argument less")
    elif kind < 0.04:
        call.inputs["unknown"] = 1
        call.changes.append("one argument more")
    elif kind < 0.08 and (large := [name for name in names if can_be_huge(call.inputs[name])]):
        name = call.random.choice(large)
        call.inputs[name] = huge(call, call.inputs[name])
        call.changes.append(f"huge({name})")
    elif kind < 0.10:
        call.inputs = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in call.inputs.items()}
        call.is_judged = False
        call.changes.append("all on meta")
    else:
        for _ in range(call.random.choice((1, 1, 2, 3))):
            change(call, call.random.choice(names))


# --- the judgement


def describe(call: Call) -> str:
    def one(value: Any) -> str:
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
            return f"{type(value).__name__} {value!r}"[:60].replace("\n", " ")
        return f"{value.dtype} {tuple(value.shape)} strides {value.stride()} on {value.device}"

    return ", ".join([*call.changes, "in", *(f"{key}: {one(value)}" for key, value in call.inputs.items())])


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def check_result(op: Op, call: Call, result: Any) -> None:
    """What was accepted is what the reference gives, and so are the gradients."""
    # a huge int is a number, but PyTorch adds it to no tensor
    inputs = {k: float(v) if k in ("eps", "t_eps", "noise_scale") else v for k, v in call.inputs.items()}
    actual, eager = as_list(result), as_list(op.eager(**inputs))
    assert len(actual) == len(eager)
    for output, expected in zip(actual, eager, strict=True):
        for each in ("shape", "dtype", "device"):
            assert getattr(output, each) == getattr(expected, each)
        assert output.is_contiguous()
    if not call.is_judged:
        return
    # not judged against float64 as in the tests of the ops: of thousands of draws some exceed twice eager's
    # error by chance
    torch.testing.assert_close(actual, eager)
    leaves = [key for key in op.differentiable if isinstance(inputs.get(key), Tensor)]
    if any(inputs[key].requires_grad for key in leaves):
        (_, grads), (_, expected_grads) = run(op.fused, inputs, leaves), run(op.eager, inputs, leaves)
        dtypes = {value.dtype for value in inputs.values() if isinstance(value, Tensor)}
        if dtypes == {torch.float32}:
            torch.testing.assert_close(grads, expected_grads)
        assert all(grads[key].dtype == inputs[key].dtype and grads[key].isfinite().all() for key in leaves)


@pytest.mark.parametrize("refusals", [300, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_malformed_calls(op: Op, refusals: int) -> None:
    refused = 0
    for seed in itertools.count():
        call = right_call(op, random.Random(f"{op.name} {seed}"))
        malform(call)
        call.memory = [(flat, flat.clone()) for flat, _ in call.memory]
        try:
            try:
                result = op.fused(**call.inputs)
            except (TypeError, ValueError) as error:
                refused += 1
                assert str(error).startswith(op.name), repr(error)
            else:
                check_result(op, call, result)
            assert call.memory_is_unchanged(), "an input was written"
        except Exception as error:
            error.add_note(describe(call))
            raise
        if refused == refusals:
            return
