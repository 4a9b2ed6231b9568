"""The CUDA kernels, run on the CPU: tests/cuda_emulation stands for the GPU.

Their results are held to the same accuracy as everywhere. Beside that the emulation reports accesses outside
of the tensors, misaligned packs, races, shared memory that was not written, and barriers and shuffles that
not all threads reach; and blocks, warps and lanes run in several orders, which must give the same bits.
"""

import ctypes
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_cosine_distance
import test_flow_matching_loss
import test_gate_residual_norm_modulate
import test_lpips_distance
import test_noise_patchify
import test_rms_norm_modulate
import torch
from cuda_emulation.emulator import CSRC, ORDERS, Emulator, Library, build, build_faults, missing
from op_testing import DTYPES, Inputs, as_chunk, check_accuracy, draw, run
from pixelgen_kernels import (
    build_info,
    cosine_distance,
    flow_matching_loss,
    gate_residual_norm_modulate,
    lpips_distance,
    noise_patchify,
    patchify,
    philox_normal,
    philox_uniform,
    rms_norm_modulate,
    unpatchify,
)
from pixelgen_kernels.cosine_distance import cosine_distance_ref
from pixelgen_kernels.flow_matching_loss import flow_matching_loss_ref
from pixelgen_kernels.gate_residual_norm_modulate import gate_residual_norm_modulate_ref
from pixelgen_kernels.lpips_distance import lpips_distance_ref
from pixelgen_kernels.noise_patchify import noise_patchify_ref
from pixelgen_kernels.patchify import patchify_ref, unpatchify_ref
from pixelgen_kernels.philox import philox_uniform_ref
from pixelgen_kernels.rms_norm_modulate import rms_norm_modulate_ref
from test_rms_norm_modulate import AFFINES, MODULATIONS, NORMS

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"cannot build the emulation: {missing()}")


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator(build())


# --- what is run: one entry per op. A case makes its inputs and the names of those that have gradients.

Cases = Iterator[tuple[str, Callable[[], tuple[Inputs, list[str]]]]]
CHANNEL_ORDERS = ("first", "last")
# smallest, odd in every dimension, one channel, JiT's patch size, no image
IMAGES = [((1, 1, 1, 1), 1), ((3, 5, 9, 21), 3), ((2, 1, 8, 12), 4), ((1, 3, 32, 64), 16), ((0, 3, 8, 8), 4)]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def at_odd_addresses(inputs: Inputs, names: list[str]) -> tuple[Inputs, list[str]]:
    """The same values one element behind a multiple of 16 bytes."""
    for key in names:
        tensor = inputs[key]
        inputs[key] = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    return inputs, names


def patchify_cases() -> Cases:
    for (shape, P), order, dtype in itertools.product(IMAGES, CHANNEL_ORDERS, (*DTYPES, torch.float64)):
        for layout in ("dense", "channels_last", "crop"):

            def make(shape=shape, P=P, order=order, dtype=dtype, layout=layout):
                x = draw(*shape, dtype=dtype)
                if layout == "channels_last":
                    x = x.contiguous(memory_format=torch.channels_last)
                elif layout == "crop":
                    x = as_chunk(x, dim=3)
                return {"x": x, "patch_size": P, "channel_order": order}, ["x"]

            yield f"{shape}-{P}-{order}-{name(dtype)}-{layout}", make


def unpatchify_cases() -> Cases:
    for (shape, P), order, dtype in itertools.product(IMAGES, CHANNEL_ORDERS, (*DTYPES, torch.float64)):
        for strided in (False, True):

            def make(shape=shape, P=P, order=order, dtype=dtype, strided=strided):
                tokens = patchify_ref(draw(*shape, dtype=dtype), P)
                inputs = {"tokens": as_chunk(tokens) if strided else tokens, "patch_size": P}
                return {**inputs, "image_size": shape[2:], "channel_order": order}, ["tokens"]

            yield f"{shape}-{P}-{order}-{name(dtype)}-{'chunk' if strided else 'dense'}", make


def rms_norm_modulate_cases() -> Cases:
    make = functools.partial(functools.partial, test_rms_norm_modulate.make)
    options = itertools.product(NORMS, MODULATIONS, AFFINES)
    for dtype, option in itertools.product(DTYPES, options):
        label = f"{name(dtype)}-{'-'.join(option)}"
        yield f"(3, 37, 13)-{label}", make((3, 37, 13), *option, dtype=dtype)
        yield f"(2, 17, 72)-{label}-chunk", make((2, 17, 72), *option, dtype=dtype, strided=True)
    for dtype, modulation in itertools.product(DTYPES, MODULATIONS):
        # smallest, many chunks of rows, XL, widest, empty
        for shape in ((1, 1, 8), (3, 190, 16), (1, 3, 1152), (1, 2, 8192), (0, 5, 16), (2, 0, 16)):
            label = f"{shape}-{name(dtype)}-layer-{modulation}-weight_and_bias"
            yield label, make(shape, "layer", modulation, "weight_and_bias", dtype=dtype)
        odd = make((2, 3, 24), "layer", modulation, "weight_and_bias", dtype=dtype)
        yield f"{name(dtype)}-{modulation}-odd addresses", lambda odd=odd: at_odd_addresses(*odd())
    for dtypes in itertools.product(DTYPES, repeat=3):
        for modulation in ("per_sample", "per_token"):
            dtype, modulation_dtype, weight_dtype = dtypes
            mixed = {"dtype": dtype, "modulation_dtype": modulation_dtype, "weight_dtype": weight_dtype}
            yield (
                f"mixed-{modulation}-{'-'.join(map(name, dtypes))}",
                make((2, 5, 40), "layer", modulation, "weight_and_bias", **mixed),
            )


def noise_patchify_cases() -> Cases:
    def make(shape, P, image_dtype, dtype, layout, order, philox):
        inputs = test_noise_patchify.make_inputs(shape, P, image_dtype)
        inputs |= {"dtype": dtype, "return_clean": True, "channel_order": order}
        inputs |= {key: test_noise_patchify.in_layout(inputs[key], layout) for key in ("image", "noise")}
        return (test_noise_patchify.with_philox(inputs) if philox else inputs), []

    # smallest, odd in every dimension, JiT's patch size, rows of several pieces, no image
    shapes = [
        ((1, 1, 1, 1), 1),
        ((3, 3, 10, 15), 5),
        ((2, 3, 32, 64), 16),
        ((1, 3, 2, 1030), 2),
        ((0, 3, 4, 4), 2),
    ]
    dtypes = itertools.product((torch.uint8, *DTYPES), DTYPES)
    sources = itertools.product(test_noise_patchify.LAYOUTS, (False, True))
    for (shape, P), (image_dtype, dtype), (layout, philox) in itertools.product(shapes, dtypes, sources):
        order = CHANNEL_ORDERS[len(layout) % 2]
        label = f"{shape}-{P}-{name(image_dtype)}-{name(dtype)}-{layout}-{'philox' if philox else 'given'}"
        yield label, functools.partial(make, shape, P, image_dtype, dtype, layout, order, philox)


def philox_cases() -> Cases:
    for count in (0, 1, 2, 3, 4, 7, 130, 1030):
        for step in (1, 2):
            index = torch.tensor([0, -1, 5, -1, 2**40])[:: 2 if step == 2 else 1]
            inputs = {"seed": (1 << 62) + 5, "step": 7, "sample_index": index, "count": count, "stream": 3}
            yield f"{count}-{step}", lambda inputs=inputs: (inputs, [])


def flow_matching_loss_cases() -> Cases:
    shapes = [(1, 1, 1), (3, 7, 13), (2, 24, 72), (1, 3, 1152), (2, 3, 6000), (0, 4, 12)]
    layouts = test_flow_matching_loss.LAYOUTS.items()
    for shape, dtypes, (layout, change) in itertools.product(
        shapes, itertools.product(DTYPES, repeat=2), layouts
    ):

        def make(shape=shape, dtypes=dtypes, change=change):
            inputs = test_flow_matching_loss.make_inputs(shape, dtypes[0])
            x = inputs["x"].to(dtypes[1])
            return {**inputs, "x_pred": change(inputs["x_pred"]), "x": change(x)}, ["x_pred"]

        yield f"{shape}-{'-'.join(map(name, dtypes))}-{layout}", make


def gate_residual_norm_modulate_cases() -> Cases:
    def make(*arguments, change=None):
        inputs = test_gate_residual_norm_modulate.make_inputs(*arguments)
        names = [key for key in inputs if key != "norm"]
        inputs |= {key: change(inputs[key]) for key in names if change is not None and inputs[key].ndim > 1}
        return inputs, names

    variants, norms = test_gate_residual_norm_modulate.VARIANTS, ("rms", "layer")
    for variant, norm, dtype in itertools.product(variants, norms, DTYPES):
        # smallest, odd in every dimension, several chunks of rows, XL, empty
        for shape in ((1, 1, 1), (3, 37, 13), (2, 160, 40), (1, 3, 1152), (0, 4, 8), (2, 0, 8)):
            yield (
                f"{shape}-{variant}-{norm}-{name(dtype)}",
                functools.partial(make, shape, variant, norm, dtype),
            )
        chunk = functools.partial(make, (2, 17, 72), variant, norm, dtype, change=as_chunk)
        yield f"(2, 17, 72)-{variant}-{norm}-{name(dtype)}-chunk", chunk
        odd = functools.partial(make, (2, 3, 24), variant, norm, dtype)
        yield f"{variant}-{norm}-{name(dtype)}-odd addresses", lambda odd=odd: at_odd_addresses(*odd())
    for variant, dtype in itertools.product(("per_token", "all"), (torch.float32, torch.bfloat16)):
        widest = functools.partial(make, (1, 2, 8192), variant, "layer", dtype)
        yield f"(1, 2, 8192)-{variant}-layer-{name(dtype)}", widest


def lpips_distance_cases() -> Cases:
    def make(shape, dtype, target_dtype, change, change_target):
        inputs = test_lpips_distance.make_inputs(shape, dtype)
        target = change_target(inputs["target"].to(target_dtype))
        return {**inputs, "pred": change(inputs["pred"]), "target": target}, ["pred"]

    layouts = test_lpips_distance.LAYOUTS
    # smallest, odd in every dimension, a part of a tile, one position, several chunks, no image
    shapes = [(1, 1, 1, 1), (3, 13, 5, 7), (2, 16, 8, 8), (9, 40, 1, 1), (1, 128, 9, 24), (0, 4, 3, 3)]
    # every way to share the channels of a position, or the positions of a tile, among the threads
    stages = [
        (1, 64, 16, 16),
        (1, 192, 8, 8),
        (1, 512, 4, 8),
        (1, 1024, 2, 4),
        (1, 2048, 1, 8),
        (1, 4096, 1, 8),
    ]
    for shape, dtype, (layout, change) in itertools.product(shapes + stages, DTYPES, layouts.items()):
        if shape in stages and layout not in ("dense", "channels last"):
            continue
        label = f"{shape}-{name(dtype)}-{layout}"
        yield label, functools.partial(make, shape, dtype, dtype, change, change)
    for dtypes in itertools.permutations(DTYPES, 2):
        for layout, change in layouts.items():
            label = f"mixed-{'-'.join(map(name, dtypes))}-{layout}"
            yield label, functools.partial(make, (2, 16, 3, 8), *dtypes, change, change)
    for (layout, change), (other, change_target) in itertools.permutations(layouts.items(), 2):
        label = f"{layout}-{other}"
        yield (
            label,
            functools.partial(make, (2, 16, 3, 8), torch.bfloat16, torch.bfloat16, change, change_target),
        )


def cosine_distance_cases() -> Cases:
    layouts = test_cosine_distance.LAYOUTS.items()
    # of several samples: one number alone may be right by chance
    shapes = [(9, 1, 1), (3, 7, 13), (2, 24, 72), (1, 3, 1152), (0, 4, 12)]
    for shape, dtypes, (layout, change) in itertools.product(
        shapes, itertools.product(DTYPES, repeat=2), layouts
    ):

        def make(shape=shape, dtypes=dtypes, change=change):
            inputs = test_cosine_distance.make_inputs(shape, dtypes[0])
            target = inputs["target"].to(dtypes[1])
            return {"pred": change(inputs["pred"]), "target": change(target)}, ["pred", "target"]

        yield f"{shape}-{'-'.join(map(name, dtypes))}-{layout}", make


@dataclass(frozen=True)
class Entry:
    op: Callable
    reference: Callable
    cases: Callable[[], Cases]
    is_exact: bool = False  # moves numbers and does not compute


has_fma = build_info()["cpu_isa"] != "baseline"
ENTRIES = {
    "patchify": Entry(patchify, patchify_ref, patchify_cases, is_exact=True),
    "unpatchify": Entry(unpatchify, unpatchify_ref, unpatchify_cases, is_exact=True),
    "noise_patchify": Entry(noise_patchify, noise_patchify_ref, noise_patchify_cases),
    "philox_uniform": Entry(philox_uniform, philox_uniform_ref, philox_cases, is_exact=True),
    # the same bits as on a CPU with fused multiply-adds
    "philox_normal": Entry(philox_normal, philox_normal, philox_cases, is_exact=has_fma),
    "flow_matching_loss": Entry(flow_matching_loss, flow_matching_loss_ref, flow_matching_loss_cases),
    "gate_residual_norm_modulate": Entry(
        gate_residual_norm_modulate, gate_residual_norm_modulate_ref, gate_residual_norm_modulate_cases
    ),
    "lpips_distance": Entry(lpips_distance, lpips_distance_ref, lpips_distance_cases),
    "cosine_distance": Entry(cosine_distance, cosine_distance_ref, cosine_distance_cases),
    "rms_norm_modulate": Entry(rms_norm_modulate, rms_norm_modulate_ref, rms_norm_modulate_cases),
}
ALL_CASES = [
    pytest.param(entry, make, id=f"{op}-{label}")
    for op, entry in ENTRIES.items()
    for label, make in entry.cases()
]


@pytest.mark.parametrize(("entry", "make"), ALL_CASES)
def test_kernels(entry: Entry, make: Callable[[], tuple[Inputs, list[str]]], emulator: Emulator) -> None:
    inputs, names = make()
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    launches = emulator.counts()["launches"]
    with emulator.active():
        emulator.set_order("ascending")
        check_accuracy(entry.op, entry.reference, inputs, names)
        outputs, grads = run(entry.op, inputs, names)
        for order in ("descending", "shuffled"):
            emulator.set_order(order, seed=1)
            again, grads_again = run(entry.op, inputs, names)
            assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True)), order
            assert all(torch.equal(grads_again[key], grads[key]) for key in names), order
    if entry.is_exact:
        expected, expected_grads = run(entry.reference, inputs, names)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert all(torch.equal(grads[key], expected_grads[key]) for key in names)
    for key, value in before.items():
        assert torch.equal(inputs[key], value), f"{key} was written"
    if any(output.numel() for output in outputs):
        assert emulator.counts()["launches"] > launches


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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, order: str) -> None:
    library = Library(build_faults())
    library.functions.run_fault.restype = ctypes.c_char_p
    library.functions.run_fault.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.set_order(order, 3)
    data = torch.arange(100.0)
    sums = torch.cat([data[:96].sum().expand(96), data[96:].sum().expand(4)])
    library.allow(data)
    try:
        status = library.functions.run_fault(data.data_ptr(), 100, list(FAULTS).index(fault))
    finally:
        library.forget()
    if fault == "none":
        assert status is None
        assert torch.equal(data, 96 * sums + torch.arange(100) % 96 % 32)
    else:
        assert status is not None and re.search(FAULTS[fault], status.decode()), status


def test_a_wrong_row_guard_is_seen(tmp_path: Path) -> None:
    """A fault in a kernel of the package, of the kind that no result shows."""
    sources = {path.relative_to(CSRC): path.read_text() for path in CSRC.rglob("*.*")}
    text = sources[Path("cuda/patchify.cu")]
    guard = "if (row_index >= num_rows) return;"
    assert text.count(guard) == 1
    sources[Path("cuda/patchify.cu")] = text.replace(guard, "if (row_index > num_rows) return;")
    for path, source in sources.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    broken = Emulator(build(tmp_path))
    with broken.active(), pytest.raises(RuntimeError, match=r"0 bytes from the end.*patchify\.cu:\d+"):
        patchify(draw(1, 1, 4, 4), 2)
