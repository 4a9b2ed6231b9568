import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from pixelgen.config_sections import DataConfig
from pixelgen.data import (
    ClassFolder,
    Digits,
    SyntheticImages,
    build_dataset,
    center_crop,
)
from pixelgen.errors import UserError

PARITY = Path(os.environ.get("PIXELGEN_PARITY_DIR", Path(__file__).parent / "data" / "parity"))


# --- centre crop


def _crop_cases():
    images = json.loads((PARITY / "center_crop.json").read_text())["images"]
    return [(name, size) for name, image in images.items() for size in image["resolutions"]]


@pytest.mark.parametrize(("name", "size"), _crop_cases())
def test_crop_equals_the_reference(name, size):
    tensors = load_file(PARITY / "center_crop.safetensors")
    if f"{name}.png" in tensors:
        image = Image.open(io.BytesIO(tensors[f"{name}.png"].tobytes())).convert("RGB")
    else:
        image = Image.fromarray(tensors[f"{name}.rgb"])
    np.testing.assert_array_equal(center_crop(image, size), tensors[f"{name}.out{size}"])


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (17, 9), (8, 8)])
def test_crop_of_any_shape_is_square(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    cropped = center_crop(Image.fromarray(pixels), 8)
    assert cropped.shape == (8, 8, 3)
    assert cropped.dtype == np.uint8
    if shape == (8, 8):
        np.testing.assert_array_equal(cropped, pixels)


@pytest.mark.parametrize(
    ("side", "short", "size", "scaled"),
    [(11, 9, 8, 10), (20, 8, 5, 12), (12, 8, 5, 8)],  # 9.8 is rounded up; 12.5 and 7.5 to the even side
)
def test_crop_rounds_the_long_side(side, short, size, scaled):
    pixels = np.random.default_rng(0).integers(0, 256, (short, side, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    left = (scaled - size) // 2
    wide = np.asarray(image.resize((scaled, size), Image.Resampling.BICUBIC))[:, left : left + size]
    np.testing.assert_array_equal(center_crop(image, size), wide)
    upright = image.transpose(Image.Transpose.TRANSPOSE)
    tall = np.asarray(upright.resize((size, scaled), Image.Resampling.BICUBIC))[left : left + size]
    np.testing.assert_array_equal(center_crop(upright, size), tall)


def test_crop_of_grey_is_a_channel_of_grey_rgb():
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8))
    np.testing.assert_array_equal(center_crop(grey, 8)[..., 0], center_crop(grey.convert("RGB"), 8)[..., 1])


def test_crop_errors():
    with pytest.raises(ValueError, match="center_crop: image must have mode RGB or L, got RGBA"):
        center_crop(Image.new("RGBA", (9, 9)), 8)
    with pytest.raises(ValueError, match="center_crop: size must be at least 1, got 0"):
        center_crop(Image.new("RGB", (9, 9)), 0)


# --- digits


def test_digits_round_trip_is_exact():
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    digits = Digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    assert digits.labels.dtype == torch.int64
    back = torch.round(digits.images.double() * 16 / 255).reshape(1797, 64)
    np.testing.assert_array_equal(back, levels)
    np.testing.assert_array_equal(digits.labels, labels)
    assert digits.num_classes == 10
    assert digits.class_names == tuple("0123456789")


def test_digits_items_and_batches_agree():
    digits = Digits(image_size=16, channels=3)
    assert len(digits) == 1797
    images, labels = digits.batch([5, 0, 1796])
    assert images.shape == (3, 3, 16, 16)
    for row, index in enumerate([5, 0, 1796]):
        image, label = digits[index]
        assert torch.equal(image, images[row])
        assert label == labels[row]
        assert isinstance(label, int)
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("size", [16, 40])
def test_larger_digits_are_bicubic(size):
    # In uint8, as Pillow works too: both clip overshoot to 0..255 between the two passes.
    small = Digits().images
    expected = torch.nn.functional.interpolate(small, (size, size), mode="bicubic", antialias=True)
    error = (Digits(image_size=size).images.int() - expected.int()).abs()
    assert error.max() <= 2  # grey levels: their fixed-point weights differ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 12}, "image_size must be a positive multiple of 8, got 12"),
        ({"image_size": 0}, "image_size must be a positive multiple of 8, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
    ],
)
def test_digits_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        Digits(**arguments)


# --- class folders


def _fill(root: Path, classes=("cat", "ant"), per_class=5, side=(20, 14)) -> Path:
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name / "nested").mkdir(parents=True)
        for index in range(per_class):
            folder = root / name / ("nested" if index % 2 else "")
            pixels = generator.integers(0, 256, (*side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_folder_labels_follow_sorted_names(tmp_path):
    data = ClassFolder(_fill(tmp_path), image_size=8)
    assert data.class_names == ("ant", "cat")
    assert data.num_classes == 2
    assert len(data) == 10
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert [data.path(index).parts[len(tmp_path.parts)] for index in range(10)] == ["ant"] * 5 + ["cat"] * 5
    assert {data.path(index).name for index in range(5)} == {f"{index}.png" for index in range(5)}
    for index in (0, 4, 9):
        image, label = data[index]
        expected = center_crop(Image.open(data.path(index)).convert("RGB"), 8)
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
        assert label == data.labels[index]
    images, labels = data.batch([9, 0])
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [1, 0]
    assert torch.equal(images[0], data[9][0])


def test_folder_takes_known_kinds_of_files_only(tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (9, 9), (10, 200, 30))
    for name in ["1.jpg", "2.JPEG", "3.Png", "4.webp", "5.bmp", "6.ppm"]:
        image.save(tmp_path / "a" / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._1.jpg").write_text("resource fork")
    (tmp_path / "a" / ".thumbs").mkdir()
    image.save(tmp_path / "a" / ".thumbs" / "1.png")
    (tmp_path / ".git").mkdir()
    image.save(tmp_path / "beside.png")
    data = ClassFolder(tmp_path, image_size=8)
    assert data.class_names == ("a",)
    assert sorted(data.path(index).name for index in range(len(data))) == [
        "1.jpg",
        "2.JPEG",
        "3.Png",
        "4.webp",
        "5.bmp",
        "6.ppm",
    ]
    images, _ = data.batch(range(len(data)))
    expected = torch.tensor([10, 200, 30]).view(1, 3, 1, 1)
    assert (images.int() - expected).abs().max() <= 4  # lossy kinds


def test_files_of_other_kinds_are_counted_once(tmp_path, capfd, monkeypatch):
    _fill(tmp_path)
    for name in ("1.gif", "2.TXT", "nested/3.tiff", "4.txt", ".hidden.txt", "notes"):
        (tmp_path / "ant" / name).touch()
    (tmp_path / "cat" / ".thumbs").mkdir()
    (tmp_path / "cat" / ".thumbs" / "5.gif").touch()
    monkeypatch.setenv("RANK", "1")
    ClassFolder(tmp_path, image_size=8)
    assert capfd.readouterr().err == ""  # the first process of a run tells it
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        assert len(ClassFolder(tmp_path, image_size=8)) == 10
    assert capfd.readouterr().err == (
        f"data: files of other kinds in {tmp_path} were left out: 5 "
        "(.txt 2, no extension 1, .gif 1, .tiff 1)\n"
    )


def test_kinds_of_files_left_out_are_not_all_listed(tmp_path, capfd):
    _fill(tmp_path, classes=("ant",))
    for extension in "abcdefg":
        (tmp_path / "ant" / f"0.{extension}").touch()
    ClassFolder(tmp_path, image_size=8)
    assert capfd.readouterr().err.endswith("were left out: 7 (.a 1, .b 1, .c 1, .d 1, .e 1, ...)\n")


@pytest.mark.parametrize("target", [".", "..", "../../ant"])
@pytest.mark.parametrize("place", ["ant/self", "ant/nested/self"])
def test_links_to_a_folder_above_are_not_followed(tmp_path, place, target):
    data = ClassFolder(_fill(tmp_path), image_size=8)
    (tmp_path / place).symlink_to(target)
    again = ClassFolder(tmp_path, image_size=8)
    assert [again.name(index) for index in range(len(again))] == [data.name(index) for index in range(10)]
    assert torch.equal(again.labels, data.labels)


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    _fill(tmp_path / "set")
    _fill(tmp_path / "elsewhere", classes=("bee",))
    (tmp_path / "set" / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (tmp_path / "set" / "ant" / "more").symlink_to(tmp_path / "elsewhere" / "bee" / "nested")
    data = ClassFolder(tmp_path / "set", image_size=8)
    assert data.class_names == ("ant", "bee", "cat")
    assert torch.bincount(data.labels).tolist() == [7, 5, 5]


def test_order_of_images_is_that_of_the_names_of_their_folders(tmp_path):
    # The shuffle is a function of it: another order would change every resumed run.
    names = ["a-b/0", "a/b/c/0", "a/b-c/0", "a/b/1", "a/.h/2", "a/1", "a/B/0", "a.b/0", "0", "B/0", "a b/0"]
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / f"{name}.png").touch()
    data = ClassFolder(tmp_path, image_size=8)
    got = [str(data.path(index).relative_to(tmp_path / "x").with_suffix("")) for index in range(len(data))]
    assert got == ["0", "B/0", "a/1", "a b/0", "a-b/0", "a.b/0", "a/B/0", "a/b/1", "a/b-c/0", "a/b/c/0"]


def _mode_images():
    palette = Image.new("RGB", (9, 9), (0, 0, 255)).convert("P")
    clear = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    half = Image.new("LA", (9, 9), (0, 128))
    grey16 = Image.fromarray(np.full((9, 9), 32896, dtype=np.uint16))  # 128 * 257
    return {
        "palette.png": (palette, (0, 0, 255)),
        "clear.png": (clear, (255, 255, 255)),
        "half.png": (half, (127, 127, 127)),
        "grey.png": (Image.new("L", (9, 9), 77), (77, 77, 77)),
        "grey16.png": (grey16, (128, 128, 128)),
        "bit.png": (Image.new("1", (9, 9), 1), (255, 255, 255)),
        "cmyk.jpg": (Image.new("CMYK", (9, 9), (0, 0, 0, 255)), (0, 0, 0)),
    }


@pytest.mark.parametrize("name", _mode_images())
@pytest.mark.parametrize("channels", [1, 3])
def test_folder_converts_every_mode(tmp_path, name, channels):
    image, rgb = _mode_images()[name]
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / name)
    got, _ = ClassFolder(tmp_path, image_size=8, channels=channels)[0]
    assert got.shape == (channels, 8, 8)
    expected = rgb if channels == 3 else (Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0)),)
    assert (got.int() - torch.tensor(expected).view(-1, 1, 1)).abs().max() <= 1


def test_folder_of_16_bit_maps(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "deep.ppm").write_bytes(b"P5\n2 1\n65535\n" + bytes([0x80, 0x80, 0xFF, 0xFF]))
    got, _ = ClassFolder(tmp_path, image_size=1, channels=1)[0]
    assert got.item() in (128, 255)


# --- building from config fields


def test_build_dataset(tmp_path):
    assert isinstance(build_dataset(DataConfig()), Digits)
    config = DataConfig(name="folder", path=str(_fill(tmp_path)), image_size=16, num_classes=2, crop="fast")
    folder = build_dataset(config)
    assert isinstance(folder, ClassFolder)
    assert folder[0][0].shape == (1, 16, 16)
    assert folder.crop == "fast"
    synthetic = build_dataset(DataConfig(name="synthetic", image_size=16, channels=3, num_classes=7))
    assert isinstance(synthetic, SyntheticImages)
    assert synthetic[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "folder"}, r"folder needs --data\.path, a folder that holds one sub-folder"),
        ({"name": "prepared"}, r"prepared needs --data\.path, a folder that pixelgen\.data\.prepare wrote"),
        ({"name": "hf"}, r"hf needs --data\.path, a hub id"),
        ({"path": "x"}, r"digits takes no path, got x; did you mean --data\.name folder"),
        ({"name": "synthetic", "path": "x"}, "synthetic takes no path, got x"),
        ({"num_classes": 1000}, r"have 10 classes but num_classes is 1000; set --data\.num_classes 10"),
    ],
)
def test_build_dataset_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        build_dataset(DataConfig(**arguments))


def test_build_dataset_counts_folders(tmp_path):
    config = DataConfig(name="folder", path=str(_fill(tmp_path)), num_classes=3)
    with pytest.raises(UserError, match=r"holds 2 classes but num_classes is 3; set --data\.num_classes 2"):
        build_dataset(config)


# --- synthetic images


def test_synthetic_images():
    data = SyntheticImages(image_size=8, channels=3, num_classes=10)
    indices = [0, 99_999, 65, 1]
    images, labels = data.batch(indices)
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 9, 5, 1]
    assert torch.bincount(data.labels).tolist() == [len(data) // 10] * 10
    for row, index in enumerate(indices):
        assert torch.equal(data[index][0], images[row])
        assert data[index][1] == labels[row]
    assert torch.equal(images[2], images[3])  # 65 is image 1 of the pool again
    assert not torch.equal(images[0], images[3])
    assert 120 < images.float().mean() < 135


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_synthetic_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        SyntheticImages(**{"image_size": 8, **arguments})


def test_importing_the_package_imports_no_torch():
    code = "import sys, pixelgen.data; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
