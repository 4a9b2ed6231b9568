"""Checkpoints of the public PixelDiT code: Lightning files written here from the golden states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import Vectors, assert_matches, find
from parity_pixeldit import FORWARD, pixeldit_config
from torch import Tensor
from training import FLOW_ONLY, fails_with, options, start_trainer

from pixelgen import sample
from pixelgen.errors import UserError
from pixelgen.models import pixeldit_sizes
from pixelgen.models.jit import JiT
from pixelgen.models.pixeldit import PixelDiT
from pixelgen.models.pixeldit_sizes import PIXELDIT_SIZES, PixelDiTConfig
from pixelgen.models.released import load_released_checkpoint, read_released_checkpoint
from pixelgen.models.sizes import model_config
from pixelgen.sampling.pipeline import Pipeline
from pixelgen.training.begin import read_weights

pytestmark = pytest.mark.usefixtures("no_curves")

EMA_FACTOR = 0.5  # of the weights, so that raw and averaged ones differ

VECTORS = find("pixeldit")
IDS = [vectors.name for vectors in VECTORS]


def lightning(path: Path, raw: dict[str, Tensor], width: int = 8) -> Path:
    """A file as the public trainer writes it: denoiser, its average, projector, and what Lightning adds."""
    projector = {f"0.{i}.{part}": torch.zeros(width) for i in (0, 2, 4) for part in ("weight", "bias")}
    state = {f"denoiser.{name}": value for name, value in raw.items()}
    state |= {f"ema_denoiser.{name}": value * EMA_FACTOR for name, value in raw.items()}
    state |= {f"diffusion_trainer.proj.{name}": value for name, value in projector.items()}
    torch.save({"epoch": 3, "global_step": 7, "state_dict": state, "hparams_name": "kwargs"}, path)
    return path


def published(vectors: Vectors, folder: Path) -> tuple[Path, PixelDiTConfig]:
    """Such a file of the golden weights, and their architecture."""
    sidecar = vectors.sidecar
    path = lightning(folder / "pixeldit.ckpt", vectors.state(sidecar["state_file"]))
    return path, pixeldit_config(sidecar["config"], sidecar["height"], sidecar["width"])


def variant(post_modulation: bool) -> Vectors:
    """Golden vectors of the default pixel blocks, or of those with post-modulation."""
    return next(v for v in VECTORS if v.sidecar["config"]["pit_adaln_post_modulation"] == post_modulation)


@pytest.fixture
def as_size(monkeypatch: pytest.MonkeyPatch):
    """`as_size(config)`: a published size of that name, without the variant, which a name does not tell."""

    def add(config: PixelDiTConfig) -> str:

        sizes = pixeldit_sizes.PIXELDIT_SIZES
        monkeypatch.setitem(sizes, "PixelDiT-golden", replace(config, post_modulation=False))
        return "PixelDiT-golden"

    return add


@pytest.mark.parametrize("vectors", VECTORS, ids=IDS)
def test_published_files_are_loaded_strictly(vectors: Vectors, tmp_path: Path, as_size):
    """Raw weights give the golden output, the averaged ones are the file's; by architecture or by size."""
    path, config = published(vectors, tmp_path)
    raw = load_released_checkpoint(path, config, "raw", "eager")
    with torch.inference_mode():
        output = raw(*(vectors.tensors[name] for name in ("x", "t", "y")))
    assert_matches(output, vectors.tensors["output"], FORWARD, vectors.name)
    by_size = load_released_checkpoint(path, as_size(config), "ema", "eager")
    assert by_size.config == config  # post-modulation is recognised
    for name, value in by_size.state_dict().items():
        assert torch.equal(value, raw.state_dict()[name] * EMA_FACTOR), name
    states = read_released_checkpoint(path)
    assert states["raw"].keys() == states["ema"].keys() == raw.state_dict().keys()


def test_they_are_sampled_with_the_published_settings(tmp_path: Path, as_size):
    for post_modulation in (False, True):
        path, config = published(variant(post_modulation), tmp_path)
        pipeline = Pipeline.from_released(path, as_size(config), kernels="eager")
        assert pipeline.model.config.post_modulation is post_modulation
        settings = pipeline.settings
        assert (settings.sampler, settings.steps, settings.guidance_rule) == ("flow_dpm", 100, "pixeldit")
        assert (settings.guidance, settings.guidance_low, settings.guidance_high) == (2.75, 0.1, 0.9)
        images = pipeline.sample([0, 1], steps=10)
        assert images.shape == (2, config.channels, *config.image_height_width)
        assert pipeline.nfe == 10 + 7  # at 0.2 to 0.8 both halves; the rounded 0.1 and 0.9 are outside


def test_the_sampling_command_takes_them(tmp_path: Path, as_size, capsys):
    path, config = published(variant(True), tmp_path)
    argv = ["--model", str(path), "--size", as_size(config), "--kernels", "eager", "--device", "cpu"]
    argv += ["--labels", "0,1", "--samples-per-label", "1", "--steps", "2", "--out", str(tmp_path / "images")]
    assert sample.main(argv) == 0
    assert len(list((tmp_path / "images").glob("*_label*.png"))) == 2
    assert "NFE 3" in capsys.readouterr().out  # t = 0 is not guided, t = 0.5 is


def test_images_of_another_size_than_that_of_the_name(tmp_path: Path, monkeypatch):
    """The published weights of 512 pixels have the names and shapes of those of 256."""
    small = replace(PIXELDIT_SIZES["PixelDiT-tiny/8"], patch_size=16, depth=8)
    monkeypatch.setitem(PIXELDIT_SIZES, "PixelDiT-XL/16", replace(small, image_size=256))
    path = lightning(tmp_path / "512.ckpt", PixelDiT(small).state_dict())
    pipelines = [Pipeline.from_released(path, "PixelDiT-XL/16", image_size=side) for side in (None, 512)]
    assert [pipeline.model.config.image_height_width for pipeline in pipelines] == [(256, 256), (512, 512)]
    assert [pipeline.settings.guidance for pipeline in pipelines] == [2.75, 3.5]
    assert [pipeline.settings.timeshift for pipeline in pipelines] == [1.0, 2.0]
    argv = ["--model", str(path), "--size", "PixelDiT-XL/16", "--image-size", "64", "--device", "cpu"]
    argv += ["--labels", "1", "--samples-per-label", "1", "--steps", "1", "--out", str(tmp_path / "images")]
    assert sample.main(argv) == 0
    assert np.load(tmp_path / "images" / "samples.npz")["arr_0"].shape == (1, 64, 64, 3)
    with pytest.raises(UserError, match="image_size must be a multiple of patch_size 16, got 100"):
        load_released_checkpoint(path, "PixelDiT-XL/16", "raw", image_size=100)


# --- what is refused, in one line that names both sides ---


def refusal(path: Path, config: Any) -> str:
    with pytest.raises(UserError) as error:
        load_released_checkpoint(path, config, "raw")
    text = str(error.value)
    assert "\n" not in text and len(text) < len(str(path)) + 120
    return text.removeprefix(f"{path} ")


def jit_file(folder: Path) -> Path:
    return lightning(folder / "jit.ckpt", JiT(model_config("tiny/4")).state_dict())


def test_files_of_the_other_family(tmp_path: Path):
    text = refusal(jit_file(tmp_path), PIXELDIT_SIZES["PixelDiT-tiny/4"])
    assert text == "holds a JiT denoiser, model.family is pixeldit"
    asked = "holds a JiT denoiser, PixelDiT-XL/16 is of family pixeldit"
    assert refusal(jit_file(tmp_path), "PixelDiT-XL/16") == asked
    path, _ = published(variant(True), tmp_path)
    text = refusal(path, model_config("tiny/4"))
    held = "holds a PixelDiT denoiser with post-modulation and with pixel-modulation pixel"
    assert text == f"{held}, model.family is jit"
    assert refusal(path, "PixelGen-XL/16") == f"{held}, PixelGen-XL/16 is of family jit"
    path, _ = published(variant(False), tmp_path)
    text = refusal(path, "JiT-B/16")
    held = "holds a PixelDiT denoiser without post-modulation and with pixel-modulation pixel"
    assert text == f"{held}, JiT-B/16 is of family jit"


@pytest.mark.parametrize(
    ("post_modulation", "words"),
    [
        (True, "with post-modulation and with pixel-modulation pixel, model.post_modulation is false"),
        (False, "without post-modulation and with pixel-modulation pixel, model.post_modulation is true"),
    ],
)
def test_files_of_the_other_variant(post_modulation: bool, words: str, tmp_path: Path):

    path, config = published(variant(post_modulation), tmp_path)
    other = replace(config, post_modulation=not post_modulation)
    assert refusal(path, other) == f"holds a PixelDiT denoiser {words}"


def test_files_with_one_modulation_for_a_patch(tmp_path: Path, as_size):
    config = replace(PIXELDIT_SIZES["PixelDiT-tiny/4"], pixel_modulation="patch")
    path = lightning(tmp_path / "patch.ckpt", PixelDiT(config).state_dict())
    held = "holds a PixelDiT denoiser without post-modulation and with pixel-modulation patch"
    text = refusal(path, PIXELDIT_SIZES["PixelDiT-tiny/4"])
    assert text == f"{held}, model.pixel_modulation is pixel"
    assert load_released_checkpoint(path, "PixelDiT-tiny/4", "raw").config == config


def test_files_without_averaged_weights(tmp_path: Path):
    state = PixelDiT(PIXELDIT_SIZES["PixelDiT-tiny/4"]).state_dict()
    path = tmp_path / "raw.ckpt"
    torch.save({"state_dict": {f"denoiser.{name}": value for name, value in state.items()}}, path)
    with pytest.raises(UserError, match=r"has no ema weights \(ema_denoiser\.\*\), only raw$"):
        load_released_checkpoint(path, "PixelDiT-tiny/4")
    load_released_checkpoint(path, "PixelDiT-tiny/4", "raw")


def test_unknown_sizes_and_missing_keys(tmp_path: Path):
    path, config = published(variant(False), tmp_path)
    with pytest.raises(UserError, match=r"^size must be one of .*, got 'PixelDiT-XXL/16'") as error:
        load_released_checkpoint(path, "PixelDiT-XXL/16")
    assert all(f"{size}, " in str(error.value) for size in ("PixelGen-XL/16", "JiT-B/32", "PixelDiT-XL/16"))
    state = variant(False).state(variant(False).sidecar["state_file"])
    del state["pixel_embedder.proj.weight"]
    lightning(path, state)
    with pytest.raises(UserError, match=r"does not fit .*: missing pixel_embedder.proj.weight$"):
        load_released_checkpoint(path, config)


# --- --init ---


def test_init_takes_them(tmp_path: Path):
    """By the names of the weights; the average begins with the file's."""
    vectors = variant(False)
    path, config = published(vectors, tmp_path)
    model = load_released_checkpoint(path, config, "raw", "eager")
    source, raw, averages, classes = read_weights(str(path), model)
    assert (source, classes) == (str(path), ())
    for name, value in model.state_dict().items():
        assert torch.equal(raw[name], value) and torch.equal(averages["ema"][name], value * EMA_FACTOR)


def test_a_run_begins_with_them(tmp_path: Path):
    model = PIXELDIT_SIZES["PixelDiT-tiny/4"]
    argv = ["--model.family", "pixeldit", "--model.size", "PixelDiT-tiny/4", "--kernels", "eager"]
    fresh = start_trainer(options(tmp_path, "fresh", 1, *FLOW_ONLY, *argv)).model
    assert fresh.config == model
    state = {name: torch.randn_like(value) for name, value in fresh.state_dict().items()}
    path = lightning(tmp_path / "tiny.ckpt", state)
    trainer = start_trainer(options(tmp_path, "new", 1, *FLOW_ONLY, *argv, "--init", str(path)))
    average = next(iter(trainer.averages.values.values()))
    for name, value in state.items():
        assert torch.equal(trainer.model.state_dict()[name], value)
        assert torch.equal(average[name], value * EMA_FACTOR)


def test_init_refuses_other_kinds_in_one_line(tmp_path: Path, flow_run: Path, capsys):
    def error(source: Path, *more: str) -> str:
        argv = options(tmp_path, "new", 1, *FLOW_ONLY, "--init", str(source), "--kernels", "eager", *more)
        return fails_with(capsys, argv)

    pixeldit = ["--model.family", "pixeldit", "--model.size", "PixelDiT-tiny/4"]
    path, _ = published(variant(True), tmp_path)
    held = "--init: {} holds a PixelDiT denoiser with post-modulation and with pixel-modulation pixel"
    assert f"{held.format(path)}, model.family is jit\n" in error(path)
    assert f"{held.format(path)}, model.post_modulation is false\n" in error(path, *pixeldit)
    plain, _ = published(variant(False), tmp_path)
    told = error(plain, *pixeldit, "--model.prediction", "x")
    assert f"--init: {plain} predicts velocity, and model.prediction is x\n" in told
    jit = jit_file(tmp_path)
    assert f"--init: {jit} holds a JiT denoiser, model.family is pixeldit\n" in error(jit, *pixeldit)
    assert "is of model.family jit, and the run is of pixeldit\n" in error(flow_run, *pixeldit)
