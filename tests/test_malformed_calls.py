"""Thousands of malformed calls of every op: TypeError or ValueError, or, where the call was right, a result.

A call starts from right arguments, of which one to three are exchanged for something else. All draws are
seeded. Tensors lie between guard values, which no call may change.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_testing import Inputs, run
from pixelgen_kernels import OP_NAMES, select
from torch import Tensor

# PyTorch warns that sparse and nested tensors are young
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
REFUSALS = 2000  # per op, at least
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
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

    def times(self, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        return self.place(torch.rand(size, generator=generator) * 0.9)

    def float_dtype(self) -> torch.dtype:
        return self.random.choice((torch.float32, torch.float32, *FLOATS))

    def is_likely(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    def memory_is_unchanged(self) -> bool:
        def bits(tensor: Tensor) -> Tensor:
            return tensor.view(torch.uint8)

        return all(torch.equal(bits(flat), bits(before)) for flat, before in self.memory)


# --- right arguments of every op


def norm_options(call: Call, x_shape: tuple[int, ...], shapes: list[tuple[int, ...]]) -> Inputs:
    inputs: Inputs = {"norm": call.random.choice(("rms", "layer")), "eps": 1e-5}
    if call.is_likely(0.8):
        shape, dtype = call.random.choice(shapes), call.float_dtype()
        inputs |= {"shift": call.draw(*shape, dtype=dtype), "scale": call.draw(*shape, dtype=dtype)}
    if call.is_likely():
        dtype = call.float_dtype()
        inputs["weight"] = call.draw(x_shape[-1], dtype=dtype)
        if call.is_likely():
            inputs["bias"] = call.draw(x_shape[-1], dtype=dtype)
    return inputs


def patchify_inputs(call: Call) -> Inputs:
    x = call.draw(2, 3, 8, 12, dtype=call.float_dtype())
    order = call.random.choice(("first", "last"))
    return {"x": x, "patch_size": call.random.choice((2, 4)), "channel_order": order}


def unpatchify_inputs(call: Call) -> Inputs:
    P = call.random.choice((2, 4))
    tokens = call.draw(2, 96 // P**2, 3 * P**2, dtype=call.float_dtype())
    order = call.random.choice(("first", "last"))
    return {"tokens": tokens, "patch_size": P, "image_size": (8, 12), "channel_order": order}


def noise_patchify_inputs(call: Call) -> Inputs:
    dtype = call.random.choice((torch.uint8, *FLOATS))
    pixels = call.random.choice((torch.arange(144) % 256, torch.linspace(-1, 1, 144).double()))
    image = call.place((pixels * 127 if dtype == torch.uint8 else pixels).reshape(2, 3, 4, 6).abs().to(dtype))
    inputs: Inputs = {"image": image, "t": call.times(2), "patch_size": 2}
    if call.is_likely():
        inputs["noise"] = call.draw(2, 3, 4, 6, dtype=call.float_dtype())
    else:
        inputs |= {"seed": 5, "step": 2, "sample_index": call.place(torch.tensor([3, 2**40]))}
    if call.is_likely():
        inputs |= {"noise_scale": 2.0, "channel_order": "last", "return_clean": True}
        inputs |= {"clean_channel_order": "first", "dtype": torch.bfloat16}
    return inputs


def flow_matching_loss_inputs(call: Call) -> Inputs:
    dtype = call.float_dtype()
    x_pred, x = call.draw(3, 4, 5, dtype=dtype), call.draw(3, 4, 5, dtype=call.float_dtype())
    return {"x_pred": x_pred, "x": x, "t": call.times(3), "t_eps": 0.05}


def rms_norm_modulate_inputs(call: Call) -> Inputs:
    x = call.draw(2, 3, 8, dtype=call.float_dtype())
    return {"x": x, **norm_options(call, (2, 3, 8), [(2, 8), (2, 3, 8)])}


def gate_residual_norm_modulate_inputs(call: Call) -> Inputs:
    inputs = {name: call.draw(2, 3, 8, dtype=call.float_dtype()) for name in ("x", "y")}
    gate = call.draw(*call.random.choice(((2, 8), (2, 3, 8))), dtype=call.float_dtype())
    return {**inputs, "gate": gate, **norm_options(call, (2, 3, 8), [(2, 8), (2, 3, 8)])}


def qk_norm_rope_inputs(call: Call) -> Inputs:
    qkv = call.draw(2, 5, 3 * 2 * 4, dtype=call.float_dtype())
    inputs: Inputs = {"qkv": qkv, "num_heads": 2, "num_prefix_tokens": 1, "eps": 1e-5}
    inputs |= {name: call.draw(4, dtype=call.float_dtype()) for name in ("q_weight", "k_weight")}
    if call.is_likely(0.7):
        angles = torch.linspace(0, 3, 8).view(4, 2)
        inputs |= {"cos": call.place(angles.cos()), "sin": call.place(angles.sin())}
    return inputs


def swiglu_inputs(call: Call) -> Inputs:
    shape = call.random.choice(((8,), (3, 8), (2, 3, 8), (2, 2, 3, 8)))
    return {"x": call.draw(*shape, dtype=call.float_dtype())}


def lpips_distance_inputs(call: Call) -> Inputs:
    inputs = {name: call.draw(2, 4, 3, 3, dtype=call.float_dtype()) for name in ("pred", "target")}
    return {**inputs, "weight": call.times(4), "eps": 1e-10}


def cosine_distance_inputs(call: Call) -> Inputs:
    inputs = {name: call.draw(2, 3, 5, dtype=call.float_dtype()) for name in ("pred", "target")}
    return {**inputs, "eps": 1e-8}


def pixel_modulate_inputs(call: Call) -> Inputs:
    shape, dtype = (2, 3, 4, 8), call.float_dtype()
    inputs: Inputs = {"x": call.draw(*shape, dtype=call.float_dtype())}
    inputs |= {name: call.draw(*shape, dtype=dtype) for name in ("shift", "scale")}
    if call.is_likely():
        inputs["weight"] = call.draw(8, dtype=call.float_dtype())
    if call.is_likely():
        inputs |= {name: call.draw(*shape, dtype=call.float_dtype()) for name in ("y", "gate")}
    return {**inputs, "norm": call.random.choice(("rms", "layer")), "eps": 1e-5}


INPUTS: dict[str, Callable[[Call], Inputs]] = {
    "patchify": patchify_inputs,
    "unpatchify": unpatchify_inputs,
    "noise_patchify": noise_patchify_inputs,
    "flow_matching_loss": flow_matching_loss_inputs,
    "rms_norm_modulate": rms_norm_modulate_inputs,
    "gate_residual_norm_modulate": gate_residual_norm_modulate_inputs,
    "qk_norm_rope": qk_norm_rope_inputs,
    "swiglu": swiglu_inputs,
    "lpips_distance": lpips_distance_inputs,
    "cosine_distance": cosine_distance_inputs,
    "pixel_modulate": pixel_modulate_inputs,
}
DIFFERENTIABLE = {
    "patchify": ("x",),
    "unpatchify": ("tokens",),
    "noise_patchify": (),
    "flow_matching_loss": ("x_pred",),
    "rms_norm_modulate": ("x", "shift", "scale", "weight", "bias"),
    "gate_residual_norm_modulate": ("x", "y", "gate", "shift", "scale", "weight", "bias"),
    "qk_norm_rope": ("qkv", "q_weight", "k_weight"),
    "swiglu": ("x",),
    "lpips_distance": ("pred", "target"),
    "cosine_distance": ("pred", "target"),
    "pixel_modulate": ("x", "shift", "scale", "weight", "y", "gate"),
}

# --- what takes the place of an argument

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        7,
        2**31,
        2**32 + 2,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**400,
    ),
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
        call.inputs[name] = call.random.choice(VALUES)
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
    elif kind < 0.08:
        name = call.random.choice([name for name in names if isinstance(call.inputs[name], Tensor)])
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


def check_result(name: str, call: Call, result: Any) -> None:
    """What was accepted is what the reference gives, and so are the gradients."""
    op, reference = getattr(select("auto"), name), getattr(select("eager"), name)
    # a huge int is a number, but PyTorch adds it to no tensor
    inputs = {k: float(v) if k in ("eps", "t_eps", "noise_scale") else v for k, v in call.inputs.items()}
    actual, eager = as_list(result), as_list(reference(**inputs))
    assert len(actual) == len(eager)
    for output, expected in zip(actual, eager, strict=True):
        assert (output.shape, output.dtype, output.device) == (
            expected.shape,
            expected.dtype,
            expected.device,
        )
        assert output.is_contiguous()
    if not call.is_judged:
        return
    # not judged against float64 as in the tests of the ops: of thousands of draws some exceed twice eager's
    # error by chance
    torch.testing.assert_close(actual, eager)
    leaves = [key for key in DIFFERENTIABLE[name] if isinstance(inputs.get(key), Tensor)]
    if any(inputs[key].requires_grad for key in leaves):
        (_, grads), (_, expected_grads) = run(op, inputs, leaves), run(reference, inputs, leaves)
        dtypes = {value.dtype for value in inputs.values() if isinstance(value, Tensor)}
        if dtypes == {torch.float32}:
            torch.testing.assert_close(grads, expected_grads)
        assert all(grads[key].dtype == inputs[key].dtype and grads[key].isfinite().all() for key in leaves)


@pytest.mark.parametrize("name", OP_NAMES)
def test_malformed_calls(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    op = getattr(select("auto"), name)
    counts: Counter[str] = Counter()
    seed = 0
    while counts["refused"] < REFUSALS:
        call = Call(random.Random(f"{name} {seed}"))
        seed += 1
        call.inputs = INPUTS[name](call)
        malform(call)
        call.memory = [(flat, flat.clone()) for flat, _ in call.memory]
        try:
            result = op(**call.inputs)
        except (TypeError, ValueError) as error:
            counts["refused"] += 1
            assert str(error).startswith(name), f"no name in {error!r}: {describe(call)}"
        except Exception as error:
            error.add_note(describe(call))
            raise
        else:
            counts["accepted"] += 1
            try:
                check_result(name, call, result)
            except Exception as error:
                error.add_note(describe(call))
                raise
        assert call.memory_is_unchanged(), f"an input was written: {describe(call)}"
    with capsys.disabled():
        print(f" {counts['refused']} refused, {counts['accepted']} accepted ", end="")
