"""The benchmarks' own rules: right before timed, every column, exact memory, names that are checked."""

import csv
import re
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from pixelgen_kernels.cases import MODELS
from pixelgen_kernels.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)
from pixelgen_kernels.ops.noise_patchify import noise_patchify, noise_patchify_ref
from pixelgen_kernels.ops.swiglu import swiglu, swiglu_ref

sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are not installed
from benchmarks import kernels, report, step
from benchmarks.__main__ import main
from benchmarks.case import DTYPES, Case, normal
from benchmarks.measure import ColdTimer, in_turns, peak_bytes
from pixelgen.models.jit import JiT

CPU = torch.device("cpu")
SETTING = "device commit torch cuda threads triton"
ASKED_FOR = f"op provider mode dtype shape median_ms p20_ms p80_ms gbps share_of_copy peak_mb {SETTING}"


def small_swiglu(fused=swiglu, dtype="fp32") -> Case:
    return Case(
        op="swiglu",
        shape="L/16 B=2 T=3 F=8",
        dtype=dtype,
        fused=fused,
        eager=swiglu_ref,
        inputs=lambda device: {"x": normal(2, 3, 16, dtype=dtype, device=device)},
        differentiable=("x",),
    )


def two_outputs() -> Case:
    def inputs(device: torch.device) -> dict[str, torch.Tensor]:
        draw = partial(normal, dtype="bf16", device=device)
        rows = {"x": draw(2, 3, 16), "y": draw(2, 3, 16, seed=1)}
        return rows | {name: draw(2, 16, seed=i) for i, name in enumerate(("gate", "shift", "scale"))}

    return Case(
        op="gate_residual_norm_modulate",
        shape="B/16 B=2 T=3 C=16",
        dtype="bf16",
        fused=gate_residual_norm_modulate,
        eager=gate_residual_norm_modulate_ref,
        inputs=inputs,
        differentiable=("x", "y", "gate", "shift", "scale"),
    )


def without_gradient() -> Case:
    def inputs(device: torch.device) -> dict[str, object]:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
        index, t = torch.arange(2, device=device), torch.tensor([0.2, 0.7], device=device)
        return {"image": image.to(device), "t": t, "sample_index": index, "dtype": DTYPES["bf16"]}

    return Case(
        op="noise_patchify",
        shape="XL/16 B=2 H=W=8 P=4",
        dtype="bf16",
        fused=partial(noise_patchify, patch_size=4, seed=1, return_clean=True),
        eager=partial(noise_patchify_ref, patch_size=4, seed=1, return_clean=True),
        inputs=inputs,
    )


def only_these(monkeypatch, *cases: Case) -> None:
    monkeypatch.setattr(kernels, "cases", lambda device, of_models: list(cases))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_is_a_plot(path: Path) -> None:
    pixels = plt.imread(path)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 200 and pixels.std() > 0.01, path


# --- kernels ---


def test_a_run_writes_rows_table_and_plots(tmp_path, capsys):
    options = ["--device", "cpu", "--only", "unpatchify", "--shapes", "L/16", "--providers", "eager,ours"]
    assert main([*options, "--repeats", "3", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "kernels.csv")
    assert set(ASKED_FOR.split()) <= set(rows[0])
    assert {(row["op"], row["shape"].split()[0], row["dtype"]) for row in rows} == {
        ("unpatchify", "L/16", "fp32"),
        ("unpatchify", "L/16", "bf16"),
    }
    assert {(row["provider"], row["mode"]) for row in rows} == {
        (provider, mode) for provider in ("eager", "ours") for mode in ("fwd", "bwd", "fwd_bwd")
    }
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]), row
        assert float(row["gbps"]) > 0 and float(row["share_of_copy"]) > 0
        assert row["device"] and row["commit"] and row["torch"] == torch.__version__
        moved = 8 * 3 * 256 * 256 * DTYPES[row["dtype"]].itemsize
        times = 2 if row["mode"] == "fwd_bwd" else 1
        if row["provider"] == "ours":  # the image, and the gradient of the tokens: nothing else
            assert float(row["peak_mb"]) == pytest.approx(times * moved / 1e6, abs=1e-3)
    table = (tmp_path / "kernels.md").read_text()
    assert sum(line.startswith("| unpatchify | L/16") for line in table.splitlines()) == 6
    for name in ("kernels_time.png", "kernels_bandwidth.png"):
        assert_is_a_plot(tmp_path / name)
    told = capsys.readouterr().out
    assert re.search(r"unpatchify fwd_bwd fp32: ours L/16 \d+\.\d\dx eager", told), told


def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, capsys):
    only_these(monkeypatch, small_swiglu(fused=lambda x: swiglu(x) * 1.001), two_outputs())
    options = ["--device", "cpu", "--providers", "ours", "--repeats", "3", "--out", str(tmp_path)]
    assert main([*options, "--dtypes", "fp32,bf16"]) == 1
    assert {(row["op"], row["provider"]) for row in read(tmp_path / "kernels.csv")} == {
        ("swiglu", "eager"),
        ("gate_residual_norm_modulate", "eager"),
        ("gate_residual_norm_modulate", "ours"),
    }
    told = capsys.readouterr()
    wrong = told.out + told.err
    assert "swiglu L/16 B=2 T=3 F=8 fp32: ours is wrong and not timed: output 0 is off by" in wrong, wrong


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
    case, said = small_swiglu(fused=fused), []
    inputs = case.inputs(CPU)
    assert kernels.right_providers(case, ["eager", "ours"], inputs, said.append).keys() == {"eager"}
    assert problem in said[0]


def test_several_outputs_compiled_code_and_ops_without_a_gradient(tmp_path, monkeypatch):
    only_these(monkeypatch, two_outputs(), without_gradient())
    options = ["--device", "cpu", "--dtypes", "bf16", "--repeats", "3", "--out", str(tmp_path)]
    assert main(options) == 0
    found = {(row["op"], row["provider"], row["mode"]) for row in read(tmp_path / "kernels.csv")}
    modes = {"gate_residual_norm_modulate": ("fwd", "bwd", "fwd_bwd"), "noise_patchify": ("fwd",)}
    assert found == {
        (op, provider, mode)
        for op in modes
        for mode in modes[op]
        for provider in ("eager", "compile", "ours")
    }
    assert_is_a_plot(tmp_path / "kernels_bandwidth.png")


def test_every_op_is_timed_at_the_shapes_of_every_model():
    cases = kernels.cases(CPU, of_models=True)
    for op in {case.op for case in cases}:
        assert {(case.model, case.dtype) for case in cases if case.op == op} == {
            (model, dtype) for model in MODELS for dtype in DTYPES
        }, op


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "softmax"], "--only must be one of .*swiglu.*, got softmax"),
        (["--shapes", "L/16,M/16"], "--shapes must be one of B/16, L/16, XL/16, PixelDiT-XL, got M/16"),
        (["--dtypes", "fp8"], "--dtypes must be one of fp32, bf16, got fp8"),
        (
            ["--providers", "ours_compile"],
            "--providers must be one of .*ours, got ours_compile",
        ),
        (
            ["--suite", "step", "--providers", "theirs"],
            "--providers must be one of .*, got theirs",
        ),
        (["--repeats", "1"], "--repeats must be at least 3, got 1"),
        (["--batch", "4"], "--batch has no meaning with --suite kernels"),
        (["--suite", "step", "--shapes", "L/16"], "--shapes has no meaning with --suite step"),
    ],
)
def test_unknown_names_are_refused(tmp_path, capsys, options, said):
    try:
        code = main(["--device", "cpu", *options, "--out", str(tmp_path)])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_timed(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["--device", "cpu", "--out", str(tmp_path / "file" / "results")]) == 2
    assert "cannot be made a folder" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err


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


def test_rows_of_one_run_replace_each_other_together(tmp_path):
    def row(**values: str) -> report.Row:
        return {**dict.fromkeys(report.KERNELS.columns, ""), "op": "swiglu", **values}

    path = tmp_path / "kernels.csv"
    first = [row(provider="eager", commit="a"), row(provider="ours", commit="a")]
    report.write_csv(path, report.KERNELS, first)
    report.write_csv(path, report.KERNELS, [row(provider="ours", commit="b")])
    report.write_csv(path, report.KERNELS, [row(provider="ours", commit="a", median_ms="1")])
    kept = [(item["commit"], item["provider"], item["median_ms"]) for item in read(path)]
    assert kept == [("b", "ours", ""), ("a", "ours", "1")]
    assert len(report.read_csv(path, row(commit="a"))) == 1


# --- step ---


def test_training_steps_that_compute_the_same_are_timed(tmp_path, monkeypatch, capsys):
    smaller = (*step.SMALL, "--data.image_size", "16", "--model.depth", "2")
    monkeypatch.setitem(step.MODELS, "cpu", ("small", smaller))
    wrong = (*step.PROVIDERS["ours"], "--time.noise_scale", "1.1")
    monkeypatch.setitem(step.PROVIDERS, "compile", wrong)
    options = ["--suite", "step", "--device", "cpu", "--batch", "1", "--providers", "compile,ours"]
    assert main([*options, "--repeats", "3", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    said = "compile is wrong and not timed: .* of the first step is"
    assert re.search(said, told.out + told.err)
    rows = read(tmp_path / "step.csv")
    assert [row["provider"] for row in rows] == ["eager", "ours"]
    asked_for = "model batch dtype median_ms p20_ms p80_ms images_per_s tflops mfu peak_mb loss"
    assert {*asked_for.split(), *SETTING.split()} <= set(rows[0])
    model = JiT(step.step_config(CPU, "eager", 1).model_config())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["median_ms"]), rel=1e-3)
        assert float(row["mfu"]) == pytest.approx(
            float(row["tflops"]) / float(row["peak_tflops"]), rel=1e-2, abs=1e-4
        )
        # weights, gradients, EMA and AdamW's two averages, all of them in fp32
        assert float(row["peak_mb"]) > 5 * 4 * parameters / 1e6
        assert float(row["loss"]) == pytest.approx(float(rows[0]["loss"]), rel=1e-5)
    assert "| small | 1 | fp32 | ours |" in (tmp_path / "step.md").read_text()
    assert_is_a_plot(tmp_path / "step.png")


@pytest.mark.parametrize("provider", step.PROVIDERS)
def test_the_gpu_step_is_the_published_model(provider):
    config = step.step_config(torch.device("cuda"), provider, 64)
    model = config.model_config()
    assert (model.width, model.depth, model.image_height_width) == (1152, 28, (256, 256))
    assert config.dtype == "bfloat16" and config.train.batch_size == 64
    assert config.compile == ("compile" in provider)
    assert config.kernels == ("auto" if "ours" in provider else "eager")
    loss = config.loss
    assert loss.alignment_weight == loss.lpips_weight == loss.p_dino_weight == 0


def test_the_first_loss_depends_on_every_block():
    runner = step.Runner(CPU, "eager", 1)
    zero = [name for name, p in runner.trainer.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not zero
