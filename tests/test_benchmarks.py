"""The benchmarks' own rules: right before timed, one schema, exact memory, names that are checked."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarking import Rows, assert_are_plots, bench, named
from pixelgen_kernels.cases import MODELS
from pixelgen_kernels.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)
from pixelgen_kernels.ops.noise_patchify import noise_patchify, noise_patchify_ref
from pixelgen_kernels.ops.swiglu import swiglu, swiglu_ref

from benchmarks import draw, report
from benchmarks.case import DTYPES, Case, normal
from benchmarks.measure import ColdTimer, Timing, in_turns, peak_bytes
from benchmarks.suite import Part, Suite, run
from benchmarks.suites import kernels

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TIMING = Timing(median_ms=2.0, p20_ms=1.0, p80_ms=3.0)
SETTING = dict.fromkeys(report.SETTING, "x")


def case(op: str, fused, eager, inputs, *differentiable: str, dtype: str = "fp32") -> Case:
    shape = "L/16 B=2 T=3"
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        fused=fused,
        eager=eager,
        inputs=inputs,
        differentiable=differentiable,
    )


def small_swiglu(fused=swiglu, dtype="fp32") -> Case:
    def inputs(device):
        return {"x": normal(2, 3, 16, dtype=dtype, device=device)}

    return case("swiglu", fused, swiglu_ref, inputs, "x", dtype=dtype)


def two_outputs() -> Case:
    names = ("x", "y", "gate", "shift", "scale")

    def inputs(device: torch.device) -> dict[str, torch.Tensor]:
        draw = partial(normal, dtype="bf16", device=device)
        rows = {"x": draw(2, 3, 16), "y": draw(2, 3, 16, seed=1)}
        return rows | {name: draw(2, 16, seed=i) for i, name in enumerate(names[2:])}

    fused, eager = gate_residual_norm_modulate, gate_residual_norm_modulate_ref
    return case("gate_residual_norm_modulate", fused, eager, inputs, *names, dtype="bf16")


def without_gradient() -> Case:
    def inputs(device: torch.device) -> dict[str, object]:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
        index, t = torch.arange(2, device=device), torch.tensor([0.2, 0.7], device=device)
        return {"image": image.to(device), "t": t, "sample_index": index, "dtype": DTYPES["bf16"]}

    fused, eager = (
        partial(op, patch_size=4, seed=1, return_clean=True) for op in (noise_patchify, noise_patchify_ref)
    )
    return case("noise_patchify", fused, eager, inputs, dtype="bf16")


def only_these(monkeypatch, *cases: Case) -> None:
    monkeypatch.setattr(kernels, "cases", lambda device, of_models: list(cases))


# --- every suite ---


@pytest.mark.parametrize(
    ("suite", "options", "said"),
    [
        ("kernels", "--only softmax", r"--only must be one of .*swiglu.*, got softmax"),
        ("kernels", "--shapes L/16,M/16", "--shapes must be one of B/16, L/16, XL/16, PixelDiT-XL, got M/16"),
        ("kernels", "--dtypes fp8", "--dtypes must be one of fp32, bf16, got fp8"),
        ("kernels", "--providers ours_compile", "--providers must be one of .*ours, got ours_compile"),
        ("kernels", "--providers liger", "--providers liger: it runs on CUDA devices only"),
        ("kernels", "--repeats 1", "--repeats must be at least 3, got 1"),
        ("kernels", "--max-seconds nan", "--max-seconds must be at least 0, got nan"),
        ("kernels", "--batch 4", "--batch has no meaning with --suite kernels"),
        ("step", "--providers theirs", "--providers must be one of .*, got theirs"),
        ("step", "--shapes L/16", "--shapes has no meaning with --suite step"),
        ("step", "--only loss", "--only must be one of all_terms, flow_matching, pixeldit, got loss"),
        ("step", "--draw-only", r"step\.csv: there is no such file to draw from"),
        ("data", "--device cuda", "--device must be cpu with --suite data"),
        ("train", "--providers fsdp", "--providers has no meaning with --suite train"),
        ("train", "--only processes --batch 3", "train.batch_size must be a multiple of 2"),
        (
            "perceptual",
            "--only swiglu",
            "--only must be one of branch, cosine_distance, lpips_distance, got swiglu",
        ),
        ("perceptual", "--providers theirs", "--providers must be one of masked, .*, got theirs"),
    ],
)
def test_what_is_refused(tmp_path, capsys, suite, options, said):
    code, rows = bench(suite, tmp_path / "results", *options.split())
    assert (code, rows) == (2, [])
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.glob("results/*"))


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_timed(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert bench("kernels", tmp_path / "file" / "results") == (2, [])
    assert "cannot be made a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert bench("kernels", tmp_path, device="cuda") == (2, [])
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err


def rows_of(*providers: str, case: str = "swiglu", **more: str) -> Rows:
    return [{**report.row(case, name, TIMING, shape="L/16 B=8"), **SETTING, **more} for name in providers]


def test_rows_are_on_the_disk_at_once_and_a_case_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "kernels.csv"
    for commit in ("a", "b"):
        older = report.Results(path, {**SETTING, "commit": commit})
        for row in rows_of("eager", "ours"):
            older.add(row)
    again = report.Results(path, {**SETTING, "commit": "a"})
    again.add(rows_of("ours", median_ms="1")[0])
    assert [(row["commit"], row["provider"], row["median_ms"]) for row in report.read(path)] == [
        ("b", "eager", "2"),
        ("b", "ours", "2"),
        ("a", "ours", "1"),
    ]
    assert [row["commit"] for row in report.newest(report.read(path))] == ["a"]
    with pytest.raises(KeyError, match="speed"):
        report.row("swiglu", "ours", TIMING, speed=1.0)


def suite_of(*parts: Part) -> Suite:
    return Suite(name="toy", parts=lambda run: list(parts), baselines=("eager",), plots={"": ("median_ms",)})


def arguments_of(tmp_path: Path, **more: object):
    names = ("only", "threads", "batch", "repeats", "max_seconds", "providers")
    values = dict.fromkeys(names) | {"device": "cpu", "out": tmp_path, "csv_only": False, "draw_only": False}
    return type("Arguments", (), values | more)()


def test_time_that_is_over_ends_a_run_and_what_is_missing_is_named(tmp_path, capsys):
    parts = [
        Part(case=name, label=f"part {name}", rows=lambda name=name: rows_of("eager", "ours", case=name))
        for name in "abc"
    ]
    assert run(suite_of(*parts), arguments_of(tmp_path / "all", only=["a", "c"])) == 0
    assert named(report.read(tmp_path / "all" / "toy.csv"), "case") == {("a",), ("c",)}
    assert run(suite_of(*parts), arguments_of(tmp_path / "none", max_seconds=0.0)) == 1
    told = capsys.readouterr()
    assert "not timed: part a, part b, part c" in told.out + told.err


def test_a_row_is_written_before_the_next_one_is_measured(tmp_path):
    def rows():
        yield rows_of("eager")[0]
        assert named(report.read(tmp_path / "toy.csv"), "provider") == {("eager",)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(suite_of(Part(case="swiglu", label="", rows=rows)), arguments_of(tmp_path))
    assert len(report.read(tmp_path / "toy.csv")) == 1


def test_tables():
    rows = rows_of("eager", median_ms="6", peak_mb="3") + rows_of("ours", share_of_copy="0.5")
    wide = draw.table(rows, ("eager",), is_wide=True).splitlines()
    assert wide[2] == "| swiglu | L/16 B=8 |  |  | 6 | 2 | 3.00x | 50.0% | 3 |  |"
    long = draw.table(rows, ("eager",), is_wide=False).splitlines()
    assert long[2:] == [
        "| swiglu | L/16 B=8 | eager | 6 (1 to 3) | 1.00x |  | 3 |",
        "| swiglu | L/16 B=8 | ours | 2 (1 to 3) | 3.00x | 50.0% |  |",
    ]
    assert draw.summary(rows, ("eager",), is_wide=True) == "swiglu  : ours L/16 3.00x eager"


# --- kernels ---


def test_a_run_writes_rows_table_and_plots(tmp_path, capsys):
    options = ["--only", "unpatchify", "--shapes", "L/16", "--providers", "eager,ours"]
    code, rows = bench("kernels", tmp_path, *options)
    assert code == 0
    assert named(rows, "case", "provider", "mode", "dtype") == {
        ("unpatchify", provider, mode, dtype)
        for provider in ("eager", "ours")
        for mode in ("fwd", "bwd", "fwd_bwd")
        for dtype in DTYPES
    }
    for row in rows:
        assert float(row["gbps"]) > 0 and float(row["share_of_copy"]) > 0
        moved = 8 * 3 * 256 * 256 * DTYPES[row["dtype"]].itemsize
        times = 2 if row["mode"] == "fwd_bwd" else 1
        if row["provider"] == "ours":  # the image, and the gradient of the tokens: nothing else
            assert float(row["peak_mb"]) == pytest.approx(times * moved / 1e6, rel=1e-4)
    table = (tmp_path / "kernels.md").read_text()
    assert sum(line.startswith("| unpatchify | L/16") for line in table.splitlines()) == 6
    assert_are_plots(tmp_path, "kernels_time.png", "kernels_bandwidth.png")
    said = r"unpatchify fwd_bwd fp32: ours L/16 \d+\.\d\dx eager"
    assert re.search(said, capsys.readouterr().out)
    (tmp_path / "kernels.md").unlink()
    assert bench("kernels", tmp_path, "--draw-only")[0] == 0
    assert (tmp_path / "kernels.md").read_text() == table


def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, capsys):
    only_these(monkeypatch, small_swiglu(fused=lambda x: swiglu(x) * 1.001), two_outputs())
    code, rows = bench("kernels", tmp_path, "--providers", "ours", "--dtypes", "fp32,bf16", "--csv-only")
    assert code == 1
    gate = "gate_residual_norm_modulate"
    assert named(rows, "case", "provider") == {("swiglu", "eager"), (gate, "eager"), (gate, "ours")}
    told = capsys.readouterr()
    assert "swiglu L/16 B=2 T=3 fp32: ours is wrong and not timed: output 0 is off by" in told.out + told.err
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.csv"]


@pytest.mark.parametrize(
    ("fused", "problem"),
    [
        (lambda x: swiglu(x) * 1.001, "output 0 is off by"),
        (lambda x: swiglu(x.detach() + 0 * x), "grad_x is off by"),
        (lambda x: swiglu(x) * float("nan"), "output 0 is off by nan"),
        (lambda x: swiglu(x).double(), "output 0 is torch.float64"),
    ],
)
def test_what_makes_a_provider_wrong(fused, problem):
    class Said:
        problems: tuple[str, ...] = ()

        def wrong(self, *told: str, is_ours: bool) -> None:
            self.problems = told

    small, said = small_swiglu(fused=fused), Said()
    assert kernels.right_providers(said, small, ["eager", "ours"], small.inputs(CPU)).keys() == {"eager"}
    assert said.problems[1] == "ours" and problem in said.problems[2]


def test_several_outputs_compiled_code_and_ops_without_a_gradient(tmp_path, monkeypatch):
    only_these(monkeypatch, two_outputs(), without_gradient())
    code, rows = bench("kernels", tmp_path, "--dtypes", "bf16")
    assert code == 0
    modes = {"gate_residual_norm_modulate": ("fwd", "bwd", "fwd_bwd"), "noise_patchify": ("fwd",)}
    assert named(rows, "case", "provider", "mode") == {
        (op, provider, mode)
        for op in modes
        for mode in modes[op]
        for provider in ("eager", "compile", "ours")
    }


def test_every_op_is_timed_at_the_shapes_of_every_model():
    cases = kernels.cases(CPU, of_models=True)
    for op in {case.op for case in cases}:
        models = ["PixelDiT-XL"] if op.startswith("pixel_") else MODELS
        assert {(case.model, case.dtype) for case in cases if case.op == op} == {
            (model, dtype) for model in models for dtype in DTYPES
        }, op


LIGER = """
import inspect, torch
from pixelgen_kernels.cases import Draw
from pixelgen_kernels.registry import ops
from benchmarks import liger

# The interpreter cannot run this one: called as its own signature and docstring say.
norm = liger.LigerModulatedRMSNormFunction
names = list(inspect.signature(norm.forward).parameters)[1:]

def documented(X, W, scale, shift, eps, offset, casting_mode, in_place):
    normed = X * torch.rsqrt(X.square().mean(-1, keepdim=True) + eps) * (offset + W)
    return (1 + scale.unsqueeze(1)) * normed + shift.unsqueeze(1)

norm.apply = lambda *values: documented(**dict(zip(names, values, strict=True)))
for name, fn in liger.OPS.items():
    op = ops()[name]
    draw = Draw(dtype=torch.float32, other=None, device=torch.device("cpu"), layout="dense")
    inputs = op.inputs(draw, op.shapes[1])
    torch.testing.assert_close(fn(**inputs), op.eager(**inputs))
    print(name)
"""


def test_liger_computes_what_our_references_do():
    pytest.importorskip("liger_kernel", reason='needs liger-kernel: pip install ".[bench]"')
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["rms_norm_modulate", "swiglu"], done.stderr


# --- measuring ---


def test_peak_memory_on_the_cpu():
    x = torch.zeros(250, 1000)  # 1 MB

    def call(_: object) -> torch.Tensor:
        a = x.neg()  # 1
        b = a.neg()  # 2
        del a  # 1
        c = torch.cat((b, b, b))  # 4
        del b
        return c[:1].clone()

    assert peak_bytes(CPU, call) == 4_000_000
    # what was there before and is released on the way makes room
    assert peak_bytes(CPU, lambda kept: (kept.clear(), x.neg()), lambda: [x.neg()]) == 0
    assert peak_bytes(CPU, lambda kept: (x.neg(), kept.clear()), lambda: [x.neg()]) == 1_000_000
    assert peak_bytes(CPU, lambda _: None) == 0


def test_a_timing_leaves_out_the_preparation():
    calls = []
    timer = ColdTimer(CPU)
    timing = timer.side_by_side(
        {name: (lambda: calls.append("prepare"), lambda _, name=name: calls.append(name)) for name in "ab"}, 5
    )
    assert calls[:4] == ["prepare", "a", "prepare", "b"]  # in turns
    assert calls.count("a") == calls.count("b") == 7  # two to warm up
    assert all(row.p20_ms <= row.median_ms <= row.p80_ms < 5 for row in timing.values())


def test_repeats_fill_the_time_but_are_never_few():
    calls = []
    in_turns({"a": lambda: calls.append(1) or 1.0}, None, warm_up=1, seconds=0.0, fewest=9)
    assert len(calls) == 10
    timing = in_turns({"a": iter([0.0, 1, 2, 3, 4, 5]).__next__}, 5, warm_up=1)["a"]
    assert (timing.p20_ms, timing.median_ms, timing.p80_ms) == (pytest.approx(1.8), 3, pytest.approx(4.2))
