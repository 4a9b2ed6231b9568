"""The suites of whole steps and of the machine they run on: the same computed, at the sizes of the models."""

import re

import pytest
import torch
from benchmarking import assert_are_plots, bench, named

from benchmarks.suites import machine, step
from pixelgen.models.jit import JiT
from pixelgen.models.sizes import SIZES

CPU = torch.device("cpu")
SMALLER = (*step.SMALL, "--data.image_size", "16", "--model.depth", "2", "--loss.alignment_layer", "1")


def test_training_steps_that_compute_the_same_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step.MODELS, "cpu", ("small", SMALLER))
    monkeypatch.setitem(step.KERNELS, "compile", "auto")
    loaded = step.load_config

    def other(argv):  # what is to be compiled computes something else
        more = ("--compile", "false", "--time.noise_scale", "1.1") if "true" in argv else ()
        return loaded([*argv, *more])

    monkeypatch.setattr(step, "load_config", other)
    options = ["--only", "flow_matching", "--batch", "1", "--providers", "compile,ours,eager"]
    code, rows = bench("step", tmp_path, *options)
    assert code == 1
    told = capsys.readouterr()
    said = "flow_matching: compile is wrong and not timed: .* of the first step is"
    assert re.search(said, told.out + told.err)
    assert [row["provider"] for row in rows] == ["eager", "ours"]
    model = JiT(step.step_config(CPU, "flow_matching", "eager", 1).model_config())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for row in rows:
        rate = float(row["tflops"])
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["median_ms"]), rel=1e-3)
        assert float(row["mfu_matmul"]) == pytest.approx(rate / float(row["matmul_tflops"]), rel=1e-2)
        assert row["mfu_vendor"] == row["vendor_tflops"] == ""  # the vendors of CPUs state none
        # weights, gradients, EMA and AdamW's two averages, all of them in fp32
        assert float(row["peak_mb"]) > 5 * 4 * parameters / 1e6
        assert float(row["loss"]) == pytest.approx(float(rows[0]["loss"]), rel=1e-5)
    assert "| flow_matching | small B=1 | fp32 | step | ours |" in (tmp_path / "step.md").read_text()
    assert_are_plots(tmp_path, "step.png")


def test_the_step_with_all_terms_has_them_all(monkeypatch):
    monkeypatch.setitem(step.MODELS, "cpu", ("small", (*SMALLER, "--model.patch_size", "16")))
    runner = step.Runner(CPU, "all_terms", "eager", 4)
    assert {"flow_matching", "alignment", "lpips", "p_dino"} <= runner.step().keys()
    times = [runner.trainer.draw_time(runner.trainer.step - 1) for _ in range(2) if runner.step()]
    assert times[0].equal(times[1])  # the same step again
    assert (times[0] >= runner.config.loss.gate_t).sum() == 2  # 52 % of four


@pytest.mark.parametrize("provider", step.KERNELS)
@pytest.mark.parametrize("terms", step.CASES)
def test_the_gpu_step_is_the_published_model(provider, terms):
    config = step.step_config(torch.device("cuda"), terms, provider, 64)
    model, loss = config.model_config(), config.loss
    depth = 26 if terms == "pixeldit" else 28
    assert (model.width, model.depth, model.image_height_width) == (1152, depth, (256, 256))
    assert config.dtype == "bfloat16" and config.train.batch_size == 64
    assert config.compile == loss.compile_networks == ("compile" in provider)
    assert config.kernels == ("auto" if "ours" in provider else "eager")
    weights = (loss.alignment_weight, loss.lpips_weight, loss.p_dino_weight)
    assert weights == ((0.5, 0.1, 0.01) if terms == "all_terms" else (0, 0, 0))
    assert loss.tokens == "dinov2_vitb14"
    assert loss.stages == "vgg16" or terms == "pixeldit"  # whose recipe has no LPIPS


@pytest.mark.parametrize("terms", ["flow_matching", "pixeldit"])
def test_the_first_loss_depends_on_every_block(terms):
    runner = step.Runner(CPU, terms, "eager", 1)
    zero = [name for name, p in runner.trainer.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not zero


# --- machine ---


def test_the_machine_is_measured_at_the_models_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MODELS", ("JiT-B/16",))
    small = {**SIZES, "JiT-B/16": SIZES["tiny/4"]}  # width 64, F = 170: rows that are not aligned
    monkeypatch.setattr(machine, "SIZES", small)
    code, rows = bench("machine", tmp_path, "--batch", "2", "--only", "attention,matmul")
    assert code == 0
    found = named(rows, "case", "shape", "mode", "provider")
    assert ("matmul", "JiT-B/16 mlp.w3 M=136 K=170 N=64", "grad_weight", "padded") in found
    assert ("matmul", "JiT-B/16 attn.qkv M=136 K=64 N=192", "fwd", "as_is") in found
    assert not any("adaLN" in shape for _, shape, *_ in found)
    for layout in ("BNTD", "BTND"):
        shape = f"JiT-B/16 {layout} B=2 N=4 T=68 D=16"
        assert {("attention", shape, mode, "math") for mode in ("fwd", "fwd_bwd")} <= found
    for row in rows:
        assert float(row["tflops"]) > 0


def test_attention_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "MODELS", ("tiny/4",))
    wrong = {"chosen": lambda q, k, v: machine.scaled_dot_product_attention(q, k, v) * 1.01}
    monkeypatch.setattr(machine, "ATTENTION", {"math": machine.ATTENTION["math"], **wrong})
    _, rows = bench("machine", tmp_path, "--only", "attention")
    assert named(rows, "provider") == {("math",)}
    told = capsys.readouterr()
    assert "chosen is wrong and not timed: it is off by 0.01 of the norm" in told.out + told.err
