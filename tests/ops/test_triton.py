"""The Triton kernels without a GPU: under the interpreter, and compiled to PTX for sm_90."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from op_testing import OPS

IN_TRITON = [name for name, op in OPS.items() if op.call.fwd._triton is not None]
pytestmark = pytest.mark.skipif(not IN_TRITON, reason="no op has a Triton kernel")


def test_interpreted_kernels() -> None:
    pytest.importorskip("triton", reason="needs triton")
    # the interpreter takes seconds for the shapes with 4096 channels and with 68 tokens
    chosen = f"({' or '.join(IN_TRITON)}) and not 4096 and not 68"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "interpret_triton.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def ptx_of(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any]) -> str:
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
    ptx = triton.compile(source, target=target, options=options).asm["ptx"]
    assert ".target sm_90" in ptx
    assert ".local" not in ptx, "a stack in local memory"
    assert spilled_bytes(ptx) == 0
    return ptx


def spilled_bytes(ptx: str) -> int:
    """What the assembler that comes with Triton has no registers for, stores and loads."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not ptxas.exists():
        pytest.skip("this Triton has no ptxas of its own")
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", f"-arch={arch[1]}", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", told)
    assert found, told
    return sum(map(int, found))


KINDS = {"bf16": "v4.b32", "fp32": "v4.b32", "fp64": "v2.b64"}  # accesses of 128 bits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ptx_of_swiglu(kind: str) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from pixelgen_kernels.ops import swiglu_triton as kernels

    constexprs = {"BLOCK_ROWS": 2, "BLOCK_F": 1024}
    constexprs["DTYPE"] = kernels.tl.float64 if kind == "fp64" else kernels.tl.float32
    sizes = dict.fromkeys(("num_rows", "inner", "F", "x_outer_stride", "x_inner_stride"), "i32")
    fwd = dict.fromkeys(("x_ptr", "y_ptr"), f"*{kind}") | sizes
    bwd = dict.fromkeys(("grad_y_ptr", "x_ptr", "grad_x_ptr"), f"*{kind}") | sizes
    bwd |= dict.fromkeys(("grad_y_outer_stride", "grad_y_inner_stride"), "i64")
    # at a launch, Triton makes constants of strides of 1
    column = {"grad_y_col_stride": 1}
    for ptx in (
        ptx_of(kernels._swiglu_fwd_kernel, fwd, constexprs),
        ptx_of(kernels._swiglu_bwd_kernel, bwd, constexprs | column),
    ):
        assert f"ld.global.{KINDS[kind]}" in ptx
        assert f"st.global.{KINDS[kind]}" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 72])
@pytest.mark.parametrize("kind", KINDS)
def test_ptx_of_qk_norm_rope(kind: str, D: int) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from pixelgen_kernels.ops import qk_norm_rope_triton as kernels

    qkv = torch.empty(1, 9, 3 * 16 * D, dtype={"bf16": torch.bfloat16, "fp64": torch.float64}.get(kind))
    _, constants = kernels._grid_and_constants(qkv, 16, 8, qkv, 1e-6, (D, 16 * D, *qkv.stride()[:2]))
    del constants["enable_fp_fusion"]  # an option of the launch
    # ptx_of takes signed numbers to be multiples of 16; strides in units are not
    shared = {"q_weight_ptr": "*fp32", "k_weight_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    shared |= dict.fromkeys(("num_tokens", "T", "num_prefix_tokens"), "i32")
    shared |= dict.fromkeys(("qkv_batch_stride", "qkv_token_stride"), "u32")
    fwd = shared | dict.fromkeys(("qkv_ptr", "q_ptr", "k_ptr", "v_ptr"), f"*{kind}")
    tensors = ("grad_q_ptr", "grad_k_ptr", "grad_v_ptr", "qkv_ptr", "grad_qkv_ptr")
    bwd = shared | dict.fromkeys(tensors, f"*{kind}")
    bwd |= {f"grad_{name}_{dim}_stride": "u32" for name in "qkv" for dim in ("batch", "head", "token")}
    partials = bwd["partials_ptr"] = "*fp64" if kind == "fp64" else "*fp32"
    channels = {f"grad_{name}_channel_stride": 1 for name in "qkv"}  # what Triton makes of a stride of 1
    for ptx, loads in (
        (ptx_of(kernels._qk_norm_rope_fwd_kernel, fwd, constants), 3),
        (ptx_of(kernels._qk_norm_rope_bwd_kernel, bwd, constants | channels), 5),
    ):
        assert ptx.count(f"ld.global.{KINDS[kind]}") >= loads
        assert f"st.global.{KINDS[kind]}" in ptx
    results = {"grad_q_weight_ptr": "*fp32", "grad_k_weight_ptr": "*bf16"}
    tiles = {"D": D, "ROWS": kernels._SUM_ROWS, "COLUMNS": kernels._SUM_COLUMNS}
    sums = {"partials_ptr": partials, "num_partials": "i32"} | results
    ptx_of(kernels._qk_norm_rope_bwd_sum_kernel, sums, tiles)


PIXEL_MIXTURES = {
    # of autocast: the stream and the weights, y, modulation; then all of one
    "autocast": ("*fp32", "*bf16", "*bf16", "*fp32"),
    "fp32": ("*fp32", "*fp32", "*fp32", "*fp32"),
    "bf16": ("*bf16", "*bf16", "*bf16", "*bf16"),
}


def ptx_of_pixels(kernel: Any, tensors: dict[str, str], constants: dict[str, Any], **more: Any) -> str:
    """Of a kernel whose strided tensors have a row and a pixel stride each."""
    names = [name.removesuffix("_row_stride") for name in kernel.arg_names if name.endswith("_row_stride")]
    # ptx_of takes signed numbers to be multiples of 16; strides in units are not
    strides = {f"{name}_{dim}_stride": "u32" for name in names for dim in ("row", "pixel")}
    of_launch = {key: value for key, value in constants.items() if key != "enable_fp_fusion"}
    return ptx_of(kernel, {**tensors, "num_pixels": "i32", **strides}, of_launch | more)


@pytest.mark.slow
@pytest.mark.parametrize("mixture", PIXEL_MIXTURES)
def test_ptx_of_pixel_modulate(mixture: str) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from pixelgen_kernels.ops import pixel_modulate_triton as kernels

    stream, _, packed, weight = PIXEL_MIXTURES[mixture]
    x, modulation = torch.empty(8, 256, 16), torch.empty(8, 256, 96)
    constants = kernels.grid_and_strides(kernels._BLOCK_P, x, modulation)[2] | {"EPS": 1e-6}
    inputs = {"x_ptr": stream, "modulation_ptr": packed, "weight_ptr": weight}
    grads = {"grad_x_ptr": stream, "grad_modulation_ptr": packed, "partials_ptr": "*fp32"}
    fwd = ptx_of_pixels(kernels._pixel_modulate_fwd_kernel, inputs | {"normed_ptr": stream}, constants)
    assert fwd.count("ld.global.v4.b32") >= 3 and "st.global.v4.b32" in fwd
    tensors = {"grad_normed_ptr": stream, **inputs, **grads}
    for fill in (False, True):
        bwd = ptx_of_pixels(kernels._pixel_modulate_bwd_kernel, tensors, constants, FILL=fill, TILES=4)
        assert bwd.count("ld.global.v4.b32") >= 3 and bwd.count("st.global.v4.b32") >= 3
    sums = {"partials_ptr": "*fp32", "sums_ptr": weight} | dict.fromkeys(("num_partials", "stride"), "i32")
    tiles = {"ROWS": kernels._SUM_ROWS, "COLUMNS": kernels._SUM_COLUMNS}
    ptx_of(kernels._sum_kernel, sums | {"size": "i32"}, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [6, 4])
@pytest.mark.parametrize("mixture", PIXEL_MIXTURES)
def test_ptx_of_pixel_mlp(mixture: str, kinds: int) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from pixelgen_kernels.ops import pixel_mlp_triton as kernels

    stream, branch, packed, weight = PIXEL_MIXTURES[mixture]
    x, modulation = torch.empty(8, 256, 16), torch.empty(8, 256, kinds * 16)
    fc1_weight = torch.empty(64, 16)
    inputs = {"x_ptr": stream, "y_ptr": branch, "modulation_ptr": packed}
    inputs |= {
        f"{name}_ptr": weight for name in ("norm_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    }
    grads = {
        "grad_x_ptr": stream,
        "grad_y_ptr": branch,
        "grad_modulation_ptr": packed,
        "partials_ptr": "*fp32",
    }
    for pixels, kernel, tensors, more in (
        (kernels._FWD_PIXELS, kernels._pixel_mlp_fwd_kernel, inputs | {"out_ptr": stream}, {}),
        *(
            (
                kernels._BWD_PIXELS,
                kernels._pixel_mlp_bwd_kernel,
                {"grad_out_ptr": stream, **inputs, **grads},
                {"FILL": fill},
            )
            for fill in (False, True)
        ),
    ):
        constants = kernels._grid_and_constants(pixels, 1e-6, modulation, fc1_weight, x, x)[2]
        ptx = ptx_of_pixels(kernel, tensors, constants | {"TILES": 4}, **more)
        assert "ld.global.v4.b32" in ptx or "cp.async.cg" in ptx
        assert "st.global.v4.b32" in ptx
        assert ".tf32" in ptx  # tensor cores
