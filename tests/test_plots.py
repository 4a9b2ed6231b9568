import json
import sys
import warnings

import numpy as np
import pytest
import torch
from forked import Forked
from PIL import Image

from pixelgen.errors import UserError
from pixelgen.sampling.images import BACKGROUND, PADDING, save_grid, to_uint8
from pixelgen.training.curves import _draw, read_metrics, save_loss_curves

# --- bytes


def test_to_uint8_is_the_formula():
    x = torch.linspace(-1.3, 1.3, 10001)
    expected = np.clip((x.numpy() + 1) * np.float32(127.5) + np.float32(0.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(x), expected)
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_the_loader(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.to(dtype) / 127.5 - 1), levels)


def test_to_uint8_of_half_precision_computes_in_single():
    x = torch.linspace(-1, 1, 999).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


def test_to_uint8_errors():
    with pytest.raises(TypeError, match=r"to_uint8: x must be floating, got torch\.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))


# --- grids


def _images(count, channels, height, width):
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.integers(0, 256, (count, channels, height, width), dtype=np.uint8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_places_every_image(tmp_path, channels, mode):
    images = _images(7, channels, 30, 26)  # enlarged twice
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    grid = Image.open(tmp_path / "new" / "grid.png")
    assert grid.mode == mode
    assert grid.size == (3 * 52 + 4 * PADDING, 3 * 60 + 4 * PADDING)
    pixels = np.asarray(grid).reshape(grid.height, grid.width, channels)
    for index in range(9):
        top = PADDING + index // 3 * (60 + PADDING)
        left = PADDING + index % 3 * (52 + PADDING)
        cell = pixels[top : top + 60, left : left + 52]
        if index < 7:
            for shift in (0, 1):
                np.testing.assert_array_equal(cell[shift::2, shift::2], images[index].permute(1, 2, 0))
        else:
            assert (cell == BACKGROUND).all()
    assert (pixels[:PADDING] == BACKGROUND).all()
    assert (pixels[:, -PADDING:] == BACKGROUND).all()


@pytest.mark.parametrize(("side", "cell"), [(8, 48), (32, 64), (48, 48), (256, 256), (1, 48), (20, 60)])
def test_small_images_are_enlarged(tmp_path, side, cell):
    save_grid(_images(1, 3, side, side), tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (cell + 2 * PADDING, cell + 2 * PADDING)


@pytest.mark.parametrize(
    ("count", "asked", "columns"), [(1, None, 1), (9, None, 3), (10, None, 4), (2, 10, 2)]
)
def test_grid_is_about_square_and_has_no_empty_columns(tmp_path, count, asked, columns):
    save_grid(_images(count, 1, 8, 8), tmp_path / "grid.png", columns=asked)
    rows, step = -(-count // columns), 48 + PADDING
    assert Image.open(tmp_path / "grid.png").size == (columns * step + PADDING, rows * step + PADDING)


def test_grid_errors(tmp_path):
    path = tmp_path / "grid.png"
    with pytest.raises(TypeError, match=r"save_grid: images must be uint8, got torch.float32; see to_uint8"):
        save_grid(torch.zeros(1, 1, 8, 8), path)
    for shape in [(0, 1, 8, 8), (1, 2, 8, 8), (1, 8, 8), (1, 8, 8, 3), (1, 1, 0, 8)]:
        with pytest.raises(ValueError, match="save_grid: images must have shape"):
            save_grid(torch.zeros(shape, dtype=torch.uint8), path)
    with pytest.raises(ValueError, match="save_grid: columns must be at least 1, got 0"):
        save_grid(_images(1, 1, 8, 8), path, columns=0)
    assert not path.exists()


# --- curves


def _write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_read_metrics(tmp_path):
    records = [
        {"step": 1, "loss": 3, "name": "run", "on": True, "lr": 0.1},
        {"step": 2, "loss": float("nan"), "lpips": None, "lr": 0.2},
        {"step": 3, "loss": 1.5, "lpips": 0.25},
    ]
    curves = read_metrics(_write(tmp_path / "metrics.jsonl", records))
    assert list(curves) == ["loss", "lr", "lpips"]
    assert curves["loss"][0].tolist() == [1, 3]
    assert curves["loss"][1].tolist() == [3.0, 1.5]
    assert curves["lr"][0].tolist() == [1, 2]
    assert curves["lpips"][1].tolist() == [0.25]


def test_a_resumed_run_overwrites_its_steps(tmp_path):
    steps = [(10, 5.0), (20, 4.0), (30, 9.0), (20, 4.5), (30, 3.0), (40, 2.0)]
    path = _write(tmp_path / "metrics.jsonl", [{"step": step, "loss": loss} for step, loss in steps])
    got_steps, got = read_metrics(path)["loss"]
    assert got_steps.tolist() == [10, 20, 30, 40]
    assert got.tolist() == [5.0, 4.5, 3.0, 2.0]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "{", '{"step": 2, "loss": 1.0, "n": "\udcff"}', " "])
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
    path = _write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    path.write_bytes(path.read_bytes() + tail.encode("utf-8", "surrogateescape"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metrics(path)["loss"][0].tolist() == [1]


def test_other_unreadable_lines_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "l{"step": 3}\n[1]\n\n{"loss": 1}\n{"step": 4, "loss": 1.0}\n'
    )
    with pytest.warns(UserWarning, match="has 3 unreadable lines"):
        assert read_metrics(path)["loss"][0].tolist() == [1, 4]


def _run(count):
    generator = np.random.default_rng(0)
    for step in range(1, count + 1):
        flow = 2 * np.exp(-step / 30) + 0.1 + generator.normal() * 0.01
        yield {"step": step, "loss": flow + 0.5, "flow_matching": flow, "lpips": 0.0, "lr": 1e-3}


def test_curves_of_a_run(tmp_path):
    path = _write(tmp_path / "metrics.jsonl", _run(200), tail='{"step": 201, "lo')
    pixels = np.asarray(Image.open(save_loss_curves(path, tmp_path / "new" / "curves.png")).convert("RGB"))
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900
    figure = _draw({name: values for name, values in read_metrics(path).items() if name != "loss"})
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_ylabel() for panel in panels][:3] == ["flow matching", "LPIPS", "learning rate"]
    assert [panel.get_yscale() for panel in panels][:3] == ["log", "linear", "linear"]
    raw, mean = (line.get_ydata() for line in panels[0].lines)
    assert np.std(mean[150:195]) < 0.6 * np.std(raw[150:195])  # flat but for noise, which the mean takes away
    assert np.abs(mean - raw).max() < 0.1  # and it keeps the steep start


@pytest.mark.parametrize("count", [1, 2, 3])
def test_curves_of_a_short_run(tmp_path, count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = save_loss_curves(_write(tmp_path / "metrics.jsonl", _run(count)), tmp_path / "curves.png")
    assert Image.open(png).width > 500


def test_curves_without_data(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    for text in ["", '{"step": 1, "seconds": 2}\n', '{"step": 1, "loss": NaN}\n', '{"st']:
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match="has no values of loss, flow_matching"):
            save_loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_drawing_leaves_pyplot_alone(tmp_path):
    path = _write(tmp_path / "metrics.jsonl", _run(5))
    code = (
        "import sys; from pixelgen.training.curves import save_loss_curves\n"
        f"save_loss_curves({str(path)!r}, {str(tmp_path / 'curves.png')!r})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert Forked(["-c", code], stderr=sys.__stderr__).wait(60) == 0
