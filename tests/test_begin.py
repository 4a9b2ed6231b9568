"""Beginning from the weights of another run: what is kept, resized, new and refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import train
from safetensors.torch import load_file
from training import FLOW_ONLY, QUICK, curve, fails_with, options, start_trainer

from pixelgen.models.jit import JiT
from pixelgen.models.sizes import model_config
from pixelgen.train import main
from pixelgen.training.checkpoint import read as checkpoints

pytestmark = pytest.mark.usefixtures("no_curves")


def stored(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and the average of a run's newest checkpoint."""
    checkpoint = checkpoints.find_checkpoint(run)
    return checkpoints.load_part(checkpoint, "model."), checkpoints.load_ema_weights(checkpoint)


def begun(tmp_path: Path, source: Path, *more: str):
    return start_trainer(options(tmp_path, "new", 3, *FLOW_ONLY, "--init", str(source), *more))


def assert_equal(found, expected, but: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == list(but)


@pytest.mark.parametrize("which", ["run", "checkpoint"])
def test_a_run_begins_with_weights_and_averages_of_another(tmp_path, flow_run, capsys, which):
    raw, average = stored(flow_run)
    assert not torch.equal(raw["x_embedder.proj1.weight"], average["x_embedder.proj1.weight"])
    source = flow_run if which == "run" else flow_run / "checkpoints" / "step_00000005"
    trainer = begun(tmp_path, source, "--optimizer.lr", "0.5", "--ema.decay", "[0.999,0.9]")
    assert_equal(trainer.model.state_dict(), raw)
    parameters = dict(trainer.model.named_parameters())
    for values in trainer.averages.values.values():  # 0.9 is new and begins like the first
        assert_equal(values, {name: average[name] for name in parameters})
    assert trainer.step == 0 and trainer.optimizers.main[0].param_groups[0]["lr"] == 0.5
    printed = capsys.readouterr().out
    assert f"step_00000005: {len(raw)} of {len(raw)} tensors as they are\n" in printed


def test_a_resume_does_not_begin_again(tmp_path, flow_run):
    common = [*FLOW_ONLY, "--init", str(flow_run), "--train.log_every", "1"]
    assert main(options(tmp_path, "new", 2, *common)) == 0
    first = curve(tmp_path / "new")[0]["loss"]
    assert first != curve(flow_run)[0]["loss"]  # of the same images and noise
    shutil.rmtree(flow_run)
    assert main(["--resume", str(tmp_path / "new"), "--train.max_steps", "3"]) == 0
    assert [line["step"] for line in curve(tmp_path / "new")] == [1, 2, 3]


def test_another_size_of_images_and_number_of_channels(tmp_path, flow_run, capsys):
    raw, _ = stored(flow_run)
    data = ("--data.name", "synthetic", "--data.image_size", "12", "--data.channels", "3")
    trainer = begun(tmp_path, flow_run, *data)
    found = trainer.model.state_dict()
    printed = capsys.readouterr().out
    assert "pos_embed: that of the new size" in printed
    assert "x_embedder.proj1.weight: 1 channels to 3" in printed
    assert "final_layer.linear.bias: 1 channels to 3" in printed
    assert "embedding_table" not in printed  # the same names
    assert torch.equal(found["pos_embed"], JiT(trainer.model.config).pos_embed)
    # a grey picture gives what it gave, in each channel
    grey = torch.rand(2, 1, 12, 12)
    t, y = torch.tensor([0.3, 0.6]), torch.tensor([1, 9])
    old = JiT(model_config("tiny/2", image_size=12))
    old.load_state_dict({**raw, "pos_embed": found["pos_embed"]})
    with torch.no_grad():
        colour, expected = trainer.model.eval()(grey.expand(-1, 3, -1, -1), t, y), old.eval()(grey, t, y)
    torch.testing.assert_close(colour, expected.expand_as(colour), rtol=1e-4, atol=1e-5)


def test_classes_are_found_by_name(tmp_path, flow_run, capsys):
    meta = flow_run / "checkpoints" / "step_00000005" / "meta.json"
    text = meta.read_text().replace('"0",\n      "1"', '"ship",\n      "1"')
    meta.write_text(re.sub(r'"1",(\s+)"2"', r'"2",\1"1"', text))  # and two change places
    raw, _ = stored(flow_run)
    name = "y_embedder.embedding_table.weight"
    trainer = begun(tmp_path, flow_run)
    table = trainer.model.state_dict()[name]
    assert torch.equal(table[[1, 2, 3, 10]], raw[name][[2, 1, 3, 10]])
    assert not torch.equal(table[0], raw[name][0])
    assert f"{name}: 9 classes kept, 1 new" in capsys.readouterr().out


def test_a_published_file(tmp_path, capsys):
    torch.manual_seed(3)
    models = {prefix: JiT(model_config("tiny/2")) for prefix in ("denoiser.", "ema_denoiser.")}
    for model in models.values():
        model.final_layer.linear.weight.data.normal_()
    state = {f"{p}{name}": value for p, model in models.items() for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "published.ckpt")
    trainer = begun(tmp_path, tmp_path / "published.ckpt")
    assert_equal(trainer.model.state_dict(), models["denoiser."].state_dict())
    average = dict(models["ema_denoiser."].named_parameters())
    assert_equal(next(iter(trainer.averages.values.values())), average)


def test_two_processes_begin_alike(tmp_path, flow_run):
    common = [*QUICK, *FLOW_ONLY, "--out_dir", str(tmp_path), "--init", str(flow_run), "--threads", "1"]
    common += ["--train.max_steps", "2", "--train.log_every", "1"]
    for name, processes, more in (("one", 1, []), ("two", 2, ["--parallel.mode", "fsdp"])):
        text = train([*common, "--name", name, *more], processes, log=tmp_path / f"log_{name}")
        assert text.count("begins from ") == 1
    ours, theirs = (curve(tmp_path / name) for name in ("two", "one"))
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-6)
    paths = [
        checkpoints.find_checkpoint(tmp_path / name) / "ema_0.999.safetensors" for name in ("one", "two")
    ]
    one, two = map(load_file, paths)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_what_is_refused(tmp_path, flow_run, capsys):
    def error(source: object, *more: str) -> str:
        argv = options(tmp_path, "new", 1, *FLOW_ONLY, "--init", str(source), *more)
        text = fails_with(capsys, argv)
        assert not (tmp_path / "new").exists()
        return text

    assert "no run or checkpoint at" in error(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "is not a run: it has no 'checkpoints' folder" in error(tmp_path / "empty")
    (tmp_path / "text.ckpt").write_text("hello")
    assert "text.ckpt is not a readable torch checkpoint" in error(tmp_path / "text.ckpt")
    torch.save({"state_dict": {"model.x": torch.zeros(1)}}, tmp_path / "foreign.ckpt")
    assert "foreign.ckpt is not a PixelGen checkpoint" in error(tmp_path / "foreign.ckpt")
    deeper = error(flow_run, "--model.depth", "4")
    assert "does not fit ModelConfig(" in deeper and "missing blocks.3.attn.qkv.weight" in deeper
    assert "x_embedder.proj1.weight has shape" in error(flow_run, "--model.patch_size", "4")
    damaged = flow_run / "checkpoints" / "step_00000005" / "ema_0.999.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert "ema_0.999.safetensors is damaged" in error(flow_run)
    argv = ["--resume", str(flow_run), "--init", str(flow_run)]
    assert "--resume continues with the run's own weights; leave out --init" in fails_with(capsys, argv)
