"""Between Python and C++: compiled functions take tensors and plain values, and refuse everything else."""

import ctypes
import inspect
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_testing import OPS, Point, combinations, run
from pixelgen_kernels import _C, native
from pixelgen_kernels.fused import Kernel
from pixelgen_kernels.registry import Op
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = {
    kernel.name: (op, kernel)
    for op in OPS.values()
    for kernel in (op.call.fwd, op.call.bwd)
    if kernel is not None and kernel.native is not None
}
every_kernel = pytest.mark.parametrize(("op", "kernel"), KERNELS.values(), ids=KERNELS)


def native_calls(
    op: Op, kernel: Kernel, point: Point, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Any, ...]]:
    """The arguments with which the compiled function is called at a point."""
    calls: list[tuple[Any, ...]] = []
    native = kernel.native

    def note(*args: Any) -> None:
        calls.append(args)
        native(*args)

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "native", note)
        run(op.fused, *point.inputs())
    return calls


@every_kernel
def test_cpp_names_the_arguments_of_the_reference(op: Op, kernel: Kernel) -> None:
    """In its order: tensors, outputs, values. What is exchanged by mistake has another name there."""
    names = list(inspect.signature(kernel.native).parameters)
    takes = inspect.signature(kernel.reference).parameters
    tensors = [key for key, p in takes.items() if p.annotation in (Tensor, Tensor | None)]
    values = [key for key in takes if key not in tensors and key in names]
    assert names[: len(tensors)] == tensors
    assert names[len(names) - len(values) :] == values
    returned = inspect.signature(kernel.reference).return_annotation
    assert len(names) - len(tensors) - len(values) == (1 if returned is Tensor else len(returned.__args__))


class Subclass(torch.Tensor):
    """Has memory like any tensor."""


def bad_values(tensor: Tensor) -> dict[str, Any]:
    """What may come in place of a tensor: all of it an error, unless the argument is optional or any rank."""
    values = tensor.detach()
    with FakeTensorMode():
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    given_up = values.clone()
    given_up.untyped_storage().resize_(0)  # as FSDP leaves gathered weights
    changed = {
        "None": None,
        "int": 3,
        "float": 2.5,
        "str": "rms",
        "list": [1.0],
        "numpy": np.zeros(3, np.float32),
        "object": object(),
        "meta": values.to("meta"),
        "fake": fake,
        "given up": given_up,
        "wrapper subclass": TwoTensor(values.clone(), values.clone()),
        "int32": values.to(torch.int32),
        "float8": values.float().to(torch.float8_e4m3fn),
        "complex": values.to(torch.complex64),
        "bool": values.bool(),
        "rank more": values.unsqueeze(0),
        "rank less": values.new_zeros(()),
        "size more": torch.cat([values, values]),
        "size less": values[:0],
        "flat": values.flatten(),
        "five dimensions": values.reshape((1,) * (5 - values.ndim) + tuple(values.shape)),
        "double": values.double() if values.dtype != torch.float64 else values.float(),
    }
    if values.is_floating_point() and values.ndim:
        changed["sparse"] = values.to_sparse()
        changed["quantised"] = torch.quantize_per_tensor(values.float(), 0.1, 0, torch.qint8)
        changed["strided"] = torch.stack([values, values], -1)[..., 0]
    return changed


OF_NO_MEMORY = {"fake", "given up", "wrapper subclass"}
ALWAYS_WRONG = OF_NO_MEMORY | {
    *("int", "float", "str", "list", "numpy", "object", "meta"),
    *("int32", "float8", "complex", "bool", "sparse", "quantised"),
}


@every_kernel
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_wrong_arguments_are_exceptions(op: Op, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every tensor of every compiled function: a TypeError or RuntimeError that names the function."""
    refused = 0
    for options in (combinations(op)[0], combinations(op)[-1]):
        call, *_ = native_calls(op, kernel, Point(op=op, shape=op.shapes[1], options=options), monkeypatch)
        for i, value in enumerate(call):
            if isinstance(value, Tensor):
                for label, other in bad_values(value).items():
                    args = [a.clone() if isinstance(a, Tensor) else a for a in call]
                    args[i] = other
                    try:
                        kernel.native(*args)
                    except (TypeError, RuntimeError) as error:
                        refused += 1
                        assert str(error).startswith(kernel.name), error
                    else:  # no elements need no memory
                        is_fine = label not in ALWAYS_WRONG or (value.numel() == 0 and label in OF_NO_MEMORY)
                        assert is_fine, f"argument {i}: {label} was accepted"
                continue
            for wrong in (object(), [1], call[0], b"rms", 2**70, 1j):
                with pytest.raises((TypeError, RuntimeError, OverflowError), match=kernel.name):
                    kernel.native(*call[:i], wrong, *call[i + 1 :])
        for args in (call[:-1], (*call, call[0]), ()):
            with pytest.raises(TypeError, match=rf"{kernel.name}: takes {len(call)} arguments"):
                kernel.native(*args)
    assert refused > 10


@every_kernel
def test_sizes_that_do_not_agree_never_reach_memory(
    op: Op, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor in place of every other: an exception, or the call was right."""
    point = Point(op=op, shape=op.shapes[1], options=combinations(op)[-1])
    call, *_ = native_calls(op, kernel, point, monkeypatch)
    tensors = [i for i, value in enumerate(call) if isinstance(value, Tensor)]
    for i, j in itertools.permutations(tensors, 2):
        args = [a.clone() if isinstance(a, Tensor) else a for a in call]
        args[i] = args[j]
        try:
            kernel.native(*args)
        except (TypeError, RuntimeError) as error:
            assert str(error).startswith(kernel.name)
        else:
            same = call[i].shape == call[j].shape or call[i].numel() == call[j].numel()
            assert same, f"argument {i} was replaced by argument {j}"


def test_subclasses_with_memory_are_tensors() -> None:
    x = torch.randn(2, 3, 8)
    plain = OPS["swiglu"].fused(x)
    torch.testing.assert_close(OPS["swiglu"].fused(x.as_subclass(Subclass)).as_subclass(Tensor), plain)
    torch.testing.assert_close(OPS["swiglu"].fused(torch.nn.Parameter(x)), plain)


def test_a_negative_bit_is_resolved() -> None:
    """Memory holds the numbers with the other sign: PyTorch copies such a tensor before an op sees it."""
    x = torch.view_as_complex(torch.randn(2, 3, 8, 2)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(OPS["patchify"].fused(x[None], 1), OPS["patchify"].eager(x[None].clone(), 1))


def test_no_memory_is_torchs_own_error() -> None:
    """Partial sums come from Torch's allocator; what catches its error on a GPU catches this one."""
    with pytest.raises(torch.OutOfMemoryError, match="flow_matching_loss_fwd"):
        huge = torch.ones(1).as_strided((2**20, 2**20, 2**18), (0, 0, 0))
        _C.flow_matching_loss_fwd(huge, huge, torch.ones(2**20), torch.empty(2**20), 0.05)


# --- the table by which Torch shows its tensors


class Header(ctypes.Structure):
    _fields_ = [
        *[("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p)],
        *[(name, ctypes.c_void_p) for name in "abcde"],
    ]


def test_the_table_is_of_a_known_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer one leads to the older one behind it; without one, importing is an error."""
    attribute, kind = "__dlpack_c_exchange_api__", b"dlpack_exchange_api"
    new, get = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCapsule_GetPointer
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = get(getattr(Tensor, attribute), kind)
    newer, unknown = Header(2, 0, table), Header(2, 0, None)
    monkeypatch.setattr(Tensor, attribute, new(ctypes.addressof(newer), kind, None))
    native._connect()
    assert OPS["swiglu"].fused(torch.ones(2, 4)).shape == (2, 2)
    monkeypatch.setattr(Tensor, attribute, new(ctypes.addressof(unknown), kind, None))
    with pytest.raises(ImportError, match=r"torch .* major version 2, this module was built for version 1"):
        native._connect()
    monkeypatch.delattr(Tensor, attribute)
    with pytest.raises(ImportError, match=r"pixelgen_kernels: torch .* install torch 2.11 or newer"):
        native._connect()
    assert OPS["swiglu"].fused(torch.ones(2, 4)).shape == (2, 2)  # with the table that it had


def test_structs_are_those_of_torchs_header(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    header = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    if compiler is None or not header.exists():
        pytest.skip("needs a C++ compiler and Torch's headers")
    # our struct and theirs -> fields, those of another name as ours=theirs
    fields = {
        "Tensor DLTensor": "data ndim shape strides byte_offset code=dtype.code bits=dtype.bits "
        "lanes=dtype.lanes device_type=device.device_type device_id=device.device_id",
        "ManagedTensor DLManagedTensorVersioned": "major=version.major deleter flags tensor=dl_tensor",
        "ExchangeApi DLPackExchangeAPI": "major=header.version.major previous=header.prev_api "
        "allocate=managed_tensor_allocator view_object=dltensor_from_py_object_no_sync "
        "current_stream=current_work_stream",
    }
    constants = "kCpu=kDLCPU kCuda=kDLCUDA kCudaHost=kDLCUDAHost kInt=kDLInt kUInt=kDLUInt kFloat=kDLFloat "
    constants += "kBFloat=kDLBfloat kMajor=DLPACK_MAJOR_VERSION"
    lines = ["#include <cstddef>", f'#include "{header}"', f'#include "{CSRC / "common" / "dlpack.h"}"']
    lines.append("using namespace pixelgen::dlpack;")
    for structs, names in fields.items():
        ours, theirs = structs.split()
        lines.append(f"static_assert(sizeof({ours}) == sizeof({theirs}));")
        for a, _, b in (name.partition("=") for name in names.split()):
            lines.append(f"static_assert(offsetof({ours}, {a}) == offsetof({theirs}, {b or a}));")
    lines += [f"static_assert({constant.replace('=', ' == ')});" for constant in constants.split()]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
