"""The training command: what a run writes, that every option acts, user errors."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from images import fill
from processes import stored
from training import FLOW_ONLY, curve, fails_with, options, start_trainer, train_steps

from pixelgen.config import load_config
from pixelgen.data.order import Share, shuffled_indices
from pixelgen.encoders.embedded import FILE_NAME
from pixelgen.errors import UserError
from pixelgen.losses.objective import Objective
from pixelgen.models.jit import JiT
from pixelgen.planning.flops import train_step_flops
from pixelgen.sampling.pipeline import Pipeline
from pixelgen.train import main
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.optim import learning_rate

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.mark.curves
def test_a_run_folder_holds_everything(tmp_path, capsys, with_embedded):
    assert main(options(tmp_path, "run", 6, "--train.log_every", "2", "--train.sample_every", "3")) == 0
    folder = tmp_path / "run"
    names = {".lock", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "samples", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == names | {FILE_NAME}
    records = curve(folder)
    assert [record["step"] for record in records] == [2, 4, 6]
    terms = ["loss", "flow_matching", "alignment", "lpips", "p_dino", "grad_norm", "lr"]
    rates = {"img_per_s", "data_wait", "memory_gb", "eta_s", "ms_per_step", "tflop_per_s_per_process"}
    assert {*terms, *rates} <= records[0].keys()
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert "mfu" not in records[0]  # nobody states what a CPU can do
    samples = [path.name for path in sorted((folder / "samples").iterdir())]
    assert samples == ["step_00000003.png", "step_00000006.png"]
    size = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    assert size < 20e6
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2", "4", "6"]
    assert all(f" {name} " in lines[0] for name in terms)
    expected = r"ms/step  img/s \d+  GFLOP/s [\d.]+  mem [\d.]+ GB  data \d+%  ETA 0:\d\d:\d\d$"
    assert re.search(expected, lines[0])


def test_a_log_line_has_the_share_of_the_peak(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pixelgen.training.log._stated_peak", lambda device, dtype: 1e9)
    arguments = options(tmp_path, "peak", 2, "--train.log_every", "2", *FLOW_ONLY)
    assert main(arguments) == 0
    (record,) = curve(tmp_path / "peak")
    rate = record["tflop_per_s_per_process"] * 1e12
    assert record["mfu"] * 1e9 == pytest.approx(rate)
    flops = train_step_flops(load_config(arguments)[0]).total
    assert rate == pytest.approx(flops / (record["ms_per_step"] / 1000))
    assert f"MFU {record['mfu']:.1%}" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(options(tmp_path, "run", 2, *FLOW_ONLY, "--train.wandb", "true")) == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-run.wandb"))


def test_a_log_to_what_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.wandb needs a package"):
        main(options(tmp_path, "other", 2, *FLOW_ONLY, "--train.wandb", "true"))
    assert not (tmp_path / "other").exists()


def test_spikes_are_skipped_and_counted(tmp_path):
    """Above the threshold nothing moves, not AdamW's averages either; below all is as without one."""
    more = [*FLOW_ONLY, "--optimizer.warmup_steps", "0"]
    plain = train_steps(start_trainer(options(tmp_path, "plain", 6, *more)), 6)
    threshold = ["--optimizer.skip_grad_norm", "1e9"]
    assert train_steps(start_trainer(options(tmp_path, "all", 6, *more, *threshold)), 6) == plain
    limit = str(min(terms["grad_norm"] for terms in plain) / 2)
    assert main(options(tmp_path, "none", 4, *more, "--optimizer.skip_grad_norm", limit)) == 0
    assert curve(tmp_path / "none")[-1]["skipped_steps"] == 4
    state = stored(tmp_path / "none")
    torch.manual_seed(0)
    fresh = JiT(load_config(options(tmp_path, "none", 6))[0].model_config()).state_dict()
    for key, value in fresh.items():
        assert torch.equal(state[f"model.{key}"], value), key
    assert not any(value.any() for key, value in state.items() if key.endswith(("exp_avg", "exp_avg_sq")))


def test_the_first_losses_are_the_recorded_ones(tmp_path):
    # Any change of data order, random draws, flow matching or optimizer moves this curve.
    # Without the embedded features: their training would carry a machine's rounding into the curve.
    assert main(options(tmp_path, "run", 20, "--train.log_every", "1", *FLOW_ONLY)) == 0
    losses = [record["loss"] for record in curve(tmp_path / "run")]
    recorded = json.loads((Path(__file__).parent / "data" / "loss_curve.json").read_text())
    assert losses == pytest.approx(recorded, rel=2e-3)


def test_one_batch_can_be_learnt_by_heart(tmp_path):
    trainer = start_trainer(options(tmp_path, "run", 300, *FLOW_ONLY, "--time.mean", "0"))
    images, labels = trainer.dataset.batch(range(16))
    condition = {"label": labels}
    first = trainer.train_step(images, condition)["flow_matching"].item()
    for _ in range(149):
        last = trainer.train_step(images, condition)["flow_matching"].item()
    assert last < 0.2 * first


def test_bfloat16_and_eager_kernels_train_alike(tmp_path, with_embedded):
    losses = {}
    for name, more in {"plain": (), "eager": ("--kernels", "eager"), "half": ("--dtype", "bfloat16")}.items():
        steps = train_steps(start_trainer(options(tmp_path, name, 8, *more)), 8)
        losses[name] = np.mean([terms["loss"] for terms in steps])
    assert losses["eager"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["half"] == pytest.approx(losses["plain"], rel=3e-2)


def test_a_loss_that_is_not_finite_stops_the_run_and_writes_no_checkpoint(tmp_path, monkeypatch):
    forward = Objective.forward

    def poisoned(self, x_pred, x, *arguments, step, **named):
        if step == 5:  # the sixth
            x = x.clone()
            x[[3, 11]] = math.nan
        return forward(self, x_pred, x, *arguments, step=step, **named)

    monkeypatch.setattr(Objective, "forward", poisoned)
    more = ["--train.checkpoint_every", "4", "--train.log_every", "4", *FLOW_ONLY]
    expected = (
        r"training stopped at step 6: not finite: loss, flow_matching, grad_norm; "
        r"flow_matching of samples 3 \(digit (\d+), t (0\.\d+)\), 11 \(digit (\d+), t (0\.\d+)\)\. "
        r"The newest checkpoint is .*step_00000004\. Lower optimizer\.lr or lower optimizer\.max_grad_norm"
    )
    with pytest.raises(UserError, match=expected) as raised:
        main(options(tmp_path, "run", 8, *more))
    first, first_t, second, second_t = re.search(expected, str(raised.value)).groups()
    drawn = shuffled_indices(5, 1797, Share(16, seed=0))
    assert [int(first), int(second)] == drawn[[3, 11]].tolist()
    t = start_trainer(options(tmp_path, "other", 8, *FLOW_ONLY)).draw_time(5)
    assert [float(first_t), float(second_t)] == pytest.approx(t[[3, 11]].tolist(), rel=1e-3)
    assert checkpoints.find_checkpoint(tmp_path / "run").name == "step_00000004"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_names_every_term_and_the_sample(
    tmp_path, monkeypatch, with_embedded, value
):
    forward = Objective.forward

    def poisoned(self, x_pred, x, images, times, *arguments, step, **named):
        if step == 2:
            x_pred = x_pred + torch.where(torch.arange(16) == times.t.argmax(), value, 0)[:, None, None]
        return forward(self, x_pred, x, images, times, *arguments, step=step, **named)

    monkeypatch.setattr(Objective, "forward", poisoned)
    sample = r"\d+ \(digit \d+, t 0\.\d+\)"
    expected = rf"step 3: not finite: loss, .*lpips, p_dino, .*; lpips of samples {sample}; p_dino of"
    more = ["--train.log_every", "4", "--loss.adversarial_weight", "0.1"]
    with pytest.raises(UserError, match=expected):
        main(options(tmp_path, "run", 8, *more))


def test_a_discriminator_that_diverges_is_told_apart(tmp_path, with_embedded):
    more = ["--loss.adversarial_weight", "0.1", "--loss.adversarial_lr", "1e30", "--train.log_every", "4"]
    with pytest.raises(UserError, match=r"Lower loss\.adversarial_lr or loss\.adversarial_weight"):
        main(options(tmp_path, "run", 8, *more, "--optimizer.max_grad_norm", "null"))


def test_the_learned_gate_is_trained_without_decay(tmp_path, with_embedded):
    trainer = start_trainer(
        options(tmp_path, "run", 8, "--loss.gate", "learned", "--optimizer.weight_decay", "1")
    )
    log_scale = trainer.objective.gate.log_scale
    assert all("gate_penalty" in terms for terms in train_steps(trainer, 3))
    assert log_scale.any() and not log_scale[0]  # the first bin lies below the gate
    with torch.no_grad():
        log_scale[0] = 1.0
    train_steps(trainer, 1)
    assert log_scale[0] == 1.0


@pytest.mark.parametrize("gate", ["cosine", "sigmoid", "snr"])
def test_every_gate_trains(tmp_path, with_embedded, gate):
    (terms,) = train_steps(start_trainer(options(tmp_path, "run", 1, "--loss.gate", gate)), 1)
    assert all(map(math.isfinite, terms.values()))


def test_the_adversarial_term_trains(tmp_path, with_embedded):
    """The experimental term against the plain one, at a rate at which it shows, without diverging."""
    adversarial = ["--loss.adversarial_weight", "0.02", "--loss.adversarial_start_step", "5"]
    flow = {}
    for name, more in {"plain": [], "adversarial": adversarial}.items():
        steps = train_steps(start_trainer(options(tmp_path, name, 30, *more)), 30)
        assert ({"adversarial", "discriminator"} <= steps[-1].keys()) == (name == "adversarial")
        flow[name] = np.mean([terms["flow_matching"] for terms in steps])
    assert flow["adversarial"] < 1.2 * flow["plain"] and flow["adversarial"] != flow["plain"]


def final_weights(tmp_path: Path, *more: str) -> dict[str, torch.Tensor]:
    """Averaged weights after a few steps of flow matching, at a learning rate at which every option shows."""
    rate = ["--optimizer.lr", "0.01", "--optimizer.warmup_steps", "0", "--optimizer.schedule", "constant"]
    trainer = start_trainer(options(tmp_path, "run", 4, *FLOW_ONLY, *rate, *more))
    train_steps(trainer, 4)
    (average,) = trainer.averages.values.values()
    return average


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    return final_weights(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "option",
    [
        ("--data.flip", "true"),
        ("--time.distribution", "uniform"),
        ("--time.mean", "0.5"),
        ("--time.std", "0.2"),
        ("--time.timeshift", "3"),
        ("--time.t_eps", "0.5"),
        ("--time.noise_scale", "2"),
        ("--optimizer.betas", "[0.5,0.95]"),
        ("--optimizer.weight_decay", "10"),
        ("--optimizer.max_grad_norm", "0.01"),
        ("--optimizer.schedule", "cosine"),
        ("--optimizer.warmup_steps", "4"),
        ("--optimizer.label_drop", "0.9"),
        ("--ema.decay", "0.1"),
        ("--ema.warmup", "false"),
        ("--seed", "1"),
        ("--dtype", "bfloat16"),
    ],
    ids=lambda option: option[0][2:],
)
def test_every_option_of_a_step_changes_the_weights(tmp_path, plain_weights, option):
    changed = final_weights(tmp_path, *option)
    distance = sum(float((changed[key] - value).square().sum()) for key, value in plain_weights.items())
    assert math.isfinite(distance) and distance > 1e-8


@pytest.mark.slow
def test_compiled_blocks_train_like_plain_ones(tmp_path):
    losses = {}
    for name, more in {"plain": (), "compiled": ("--compile", "true")}.items():
        small = ("--model.depth", "2", "--train.log_every", "3")
        assert main(options(tmp_path, name, 3, *FLOW_ONLY, *small, *more)) == 0
        losses[name] = curve(tmp_path / name)[0]["loss"]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    Pipeline.from_run(tmp_path / "compiled").sample([0], steps=2)


@pytest.mark.gpu
def test_a_step_on_the_gpu_never_waits_for_it(tmp_path, with_embedded):
    trainer = start_trainer(["--out_dir", str(tmp_path), "--name", "run", "--device", "cuda"])
    images, labels = (tensor.cuda() for tensor in trainer.dataset.batch(range(16)))
    trainer.train_step(images, {"label": labels})  # the first one fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(images, {"label": labels})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_folder_of_images(tmp_path):
    fill(tmp_path / "images", per_class=6, side=(50, 40))
    more = ["--data.name", "folder", "--data.path", str(tmp_path / "images"), "--data.image_size", "32"]
    more += ["--data.channels", "3", "--data.num_classes", "2", "--data.workers", "1"]
    more += ["--model.size", "tiny/4"]
    assert main(options(tmp_path, "run", 3, *more, "--train.batch_size", "4")) == 0
    images = Pipeline.from_run(tmp_path / "run").sample([0, 1], steps=2)
    assert images.shape == (2, 3, 32, 32)


def test_learning_rate_schedules(tmp_path):
    cosine, _ = load_config(["--train.max_steps", "300", "--optimizer.lr", "1.0"])
    assert learning_rate(cosine, 0) == pytest.approx(0.01)
    assert learning_rate(cosine, 99) == pytest.approx(1.0)
    assert learning_rate(cosine, 200) == pytest.approx(0.5)
    assert learning_rate(cosine, 299) < 1e-3
    constant, _ = load_config(["--optimizer.schedule", "constant", "--optimizer.lr", "1.0"])
    assert learning_rate(constant, 3000) == 1.0


def test_user_errors_are_one_line_and_leave_nothing_behind(tmp_path, capsys):
    out = ["--out_dir", str(tmp_path / "runs")]
    assert "no run at" in fails_with(capsys, ["--resume", str(tmp_path / "nothing")])
    assert "multiple of patch_size" in fails_with(capsys, [*out, "--model.patch_size", "3"])
    missing = fails_with(capsys, [*out, "--data.name", "folder", "--data.path", str(tmp_path / "nowhere")])
    assert "nowhere" in missing
    (tmp_path / "empty").mkdir()
    assert "empty" in fails_with(
        capsys, [*out, "--data.name", "folder", "--data.path", str(tmp_path / "empty")]
    )
    assert "digits" in fails_with(capsys, [*out, "--data.num_classes", "7"])
    assert "mlp_ratio" in fails_with(capsys, [*out, "--model.mlp_ratio", "0"])
    assert "at most 256" in fails_with(capsys, [*out, "--model.width", "520", "--model.heads", "2"])
    assert "seed" in fails_with(capsys, [*out, "--seed", str(2**63)])
    assert not (tmp_path / "runs").exists()


def test_a_start_that_fails_leaves_its_name_free(tmp_path, capsys, monkeypatch, with_embedded):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no_weights_here"))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    name = ["--out_dir", str(tmp_path), "--name", "run"]
    error = fails_with(capsys, [*name, "--loss.stages", "vgg16"])
    assert "loss.stages_weights" in error and "vgg16" in error
    if not torch.cuda.is_available():
        assert "no CUDA device" in fails_with(capsys, [*name, "--device", "cuda"])
    assert not (tmp_path / "run").exists()


def _no_network(*args, **kwargs):
    raise OSError("no network")


def test_an_existing_run_is_never_reused(tmp_path, flow_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in flow_run.rglob("*")}
    assert f"--resume {flow_run}" in fails_with(capsys, options(tmp_path, "run", 1, *FLOW_ONLY))
    assert before == {path: path.stat().st_mtime_ns for path in flow_run.rglob("*")}
