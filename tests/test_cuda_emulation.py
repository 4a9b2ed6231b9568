"""The CUDA kernels, run on the CPU: tests/cuda_emulation stands for the GPU.

Their results are held to the same accuracy as everywhere. Beside that the emulation reports accesses outside
of the tensors, misaligned packs, races, shared memory that was not written, and barriers and shuffles that
not all threads reach; and blocks, warps and lanes run in several orders, which must give the same bits.
"""

import ctypes
import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation.emulator import CSRC, ORDERS, Emulator, Library, build, build_faults, missing
from op_testing import (
    OPS,
    Point,
    assert_same_bits,
    cases,
    check_accuracy,
    check_point,
    combinations,
    pairwise,
    run,
)
from pixelgen_kernels import build_info, patchify
from pixelgen_kernels.cases import at_odd_address
from pixelgen_kernels.registry import Op

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"cannot build the emulation: {missing()}")
HAS_FMA = build_info()["cpu_isa"] != "baseline"
IN_CUDA = [op for op in OPS.values() if (CSRC / "ops" / f"{op.fused.__module__.split('.')[-1]}.cu").exists()]


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator(build())


@pytest.mark.parametrize("point", cases(IN_CUDA))
def test_kernels(point: Point, emulator: Emulator) -> None:
    op = point.op
    inputs, names = point.inputs()
    launches = emulator.counts()["launches"]
    with emulator.active():
        emulator.set_order("ascending")
        # normal numbers: the same bits as on a CPU with fused multiply-adds
        results = check_point(point) if op.name != "philox_normal" else run(op.fused, inputs, names)
        for order in ("descending", "shuffled"):
            emulator.set_order(order, seed=1)
            assert_same_bits(run(op.fused, inputs, names), results)
    if op.is_exact or (op.name == "philox_normal" and HAS_FMA):
        assert_same_bits(results, run(op.eager if op.is_exact else op.fused, inputs, names))
    if any(output.numel() for output in results[0]):
        assert emulator.counts()["launches"] > launches


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """Rows at a distance that is a multiple of 8 values, or one more where they are that long themselves."""
    width = tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, -width % 8 or 1))[..., :width]


@pytest.mark.parametrize("op", [op for op in IN_CUDA if op.name != "philox_normal"], ids=lambda op: op.name)
def test_alignment_of_one_tensor(op: Op, emulator: Emulator) -> None:
    """One that does not allow 128-bit accesses where all others do; and rows that do, of an odd size."""
    shape = {2: (2, 64), 3: (2, 4, 64), 4: (2, 16, 4, 8), 5: (2, 3, 8, 16, 8)}[len(op.shapes[1])]
    emulator.set_order("ascending")
    for options in pairwise(op.options) or combinations(op):
        inputs, names = Point(op=op, shape=shape, options=options).inputs()
        odd, names_of_odd = Point(op=op, shape=op.shapes[1], options=options).inputs()
        tensors = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
        with emulator.active():
            for name, relaid in itertools.product(tensors, (at_odd_address, padded)):
                check_accuracy(op.fused, op.eager, {**inputs, name: relaid(inputs[name])}, names)
            odd |= {name: padded(odd[name]) for name in tensors}
            check_accuracy(op.fused, op.eager, odd, names_of_odd)


# --- the emulation itself: it sees what it is there for

FAULTS = {
    "none": None,
    "missing barrier": "shared memory: read of thread|shared memory that this block has not written",
    "missing second barrier": r"race in shared memory: write of thread \d+ and read",
    "out of bounds": "read of 4 bytes outside of every buffer, 0 bytes from the end",
    "before the buffer": "read of 4 bytes outside of every buffer, -4 bytes from the",
    "misaligned": "address .* is not a multiple of 16|address that is not a multiple",
    "uninitialised": "read of shared memory that this block has not written",
    "exit before barrier": "32 of 96 threads have ended",
    "barrier in branch": "wait at another __syncthreads",
    "exit before shuffle": "lane 0 waits for lane 31 of the mask ffffffff, which has ended",
    "shuffle in branch": "lane 0 waits for lane 16 of the mask ffffffff",
    "lane outside of mask": "lane 15 reads lane 16, which is not in the mask 0000ffff",
    "blocks race": "race in global memory",
    "race in a warp": "race in shared|shared memory that this block has not written",
}


def test_faults_are_seen() -> None:
    library = Library(build_faults())
    library.functions.run_fault.restype = ctypes.c_char_p
    library.functions.run_fault.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    for order, (fault, expected) in itertools.product(ORDERS, FAULTS.items()):
        library.set_order(order, 3)
        data = torch.arange(100.0)
        sums = torch.cat([data[:96].sum().expand(96), data[96:].sum().expand(4)])
        library.allow(data)
        status = library.functions.run_fault(data.data_ptr(), 100, list(FAULTS).index(fault))
        library.forget()
        if expected is None:
            assert status is None
            assert torch.equal(data, 96 * sums + torch.arange(100) % 96 % 32)
        else:
            assert status is not None and re.search(expected, status.decode()), (fault, order, status)


def test_a_wrong_row_guard_is_seen(tmp_path: Path) -> None:
    """A fault in a kernel of the package, of the kind that no result shows."""
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    text = (csrc / "ops" / "patchify.cu").read_text()
    guard = "if (row_index >= num_rows) return;"
    assert text.count(guard) == 1
    (csrc / "ops" / "patchify.cu").write_text(text.replace(guard, "if (row_index > num_rows) return;"))
    broken = Emulator(build(csrc))
    with broken.active(), pytest.raises(RuntimeError, match=r"0 bytes from the end.*patchify\.cu:\d+"):
        patchify(torch.ones(1, 1, 4, 4), 2)
