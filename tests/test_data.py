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

from pixelgen.data import ClassFolder, Digits, build_dataset, build_loader, center_crop, stream_indices
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


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; data\.path must hold"):
        ClassFolder(tmp_path / "nowhere", image_size=8)


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.zip is a file; data\.path must be a folder"):
        ClassFolder(tmp_path / "train.zip", image_size=8)


def test_folder_without_classes(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="no class folders in"):
        ClassFolder(tmp_path, image_size=8)


def test_folder_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.gif").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no images in the 1 class folders of .* looked for jpg jpeg png webp"
    ):
        ClassFolder(tmp_path, image_size=8)


def test_folder_with_empty_classes(tmp_path):
    _fill(tmp_path)
    for name in "bdef":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"4 of 6 class folders of .* hold no images \(b, d, e, \.\.\.\)"):
        ClassFolder(tmp_path, image_size=8)


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "chunk"])
def test_unreadable_image_is_named(tmp_path, damage):
    _fill(tmp_path, classes=("a",), per_class=1, side=(64, 64))
    path = tmp_path / "a" / "0.png"
    whole = path.read_bytes()
    broken = {
        "text": b"hello",
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "chunk": whole[:40] + b"\0" * 200 + whole[240:],
    }
    path.write_bytes(broken[damage])
    data = ClassFolder(tmp_path, image_size=8)
    with pytest.raises(
        UserError, match=r"data: cannot read image .*a/0\.png: .*; repair or remove"
    ) as raised:
        data[0]
    assert "\n" not in str(raised.value)


def test_huge_image_is_refused(tmp_path, monkeypatch):
    _fill(tmp_path, classes=("a",), per_class=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"cannot read image .* exceeds limit"):
        ClassFolder(tmp_path, image_size=8)[0]


# --- building from config fields


def test_build_dataset(tmp_path):
    digits = build_dataset("digits", image_size=8, channels=1, num_classes=10)
    assert isinstance(digits, Digits)
    folder = build_dataset("folder", path=str(_fill(tmp_path)), image_size=16, channels=1)
    assert isinstance(folder, ClassFolder)
    assert folder[0][0].shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "name must be digits or folder, got imagenet"),
        ({"name": "folder"}, r"folder needs --data\.path"),
        ({"name": "digits", "path": "x"}, r"take no path, got x; did you mean --data\.name folder"),
        (
            {"name": "digits", "num_classes": 1000},
            r"have 10 classes but num_classes is 1000; set --data\.num_c",
        ),
    ],
)
def test_build_dataset_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        build_dataset(**{"image_size": 8, "channels": 1, **arguments})


def test_build_dataset_counts_folders(tmp_path):
    with pytest.raises(UserError, match=r"holds 2 classes but num_classes is 3; set --data\.num_classes 2"):
        build_dataset("folder", path=str(_fill(tmp_path)), image_size=8, channels=3, num_classes=3)


# --- the stream


def _stream(steps, **arguments):
    return np.concatenate([stream_indices(step, **arguments) for step in range(steps)])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 26])
def test_every_epoch_is_a_permutation(batch_size):
    size = 10
    stream = _stream(130 // batch_size + 1, dataset_size=size, batch_size=batch_size, seed=3)
    epochs = stream[:130].reshape(-1, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 10
    assert stream.dtype == np.int64


def test_stream_does_not_depend_on_batch_size_or_order_of_calls():
    arguments = {"dataset_size": 11, "seed": 5}
    whole = _stream(1, batch_size=60, **arguments)
    np.testing.assert_array_equal(_stream(15, batch_size=4, **arguments), whole)
    backwards = [stream_indices(step, batch_size=4, **arguments) for step in reversed(range(15))]
    np.testing.assert_array_equal(np.concatenate(backwards[::-1]), whole)


def test_stream_is_the_same_everywhere():
    # Stored values: a change of the shuffle would change every resumed run.
    assert stream_indices(0, dataset_size=8, batch_size=8, seed=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert stream_indices(2, dataset_size=8, batch_size=6, seed=123).tolist() == [2, 7, 0, 3, 6, 4]


def test_seeds_differ():
    streams = {tuple(_stream(1, dataset_size=20, batch_size=20, seed=seed)) for seed in (-1, 0, 1, 2**63 + 5)}
    assert len(streams) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_global_batch(world_size):
    arguments = {"dataset_size": 10, "batch_size": 12, "seed": 1}
    for step in range(4):
        parts = [stream_indices(step, rank=r, world_size=world_size, **arguments) for r in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), stream_indices(step, **arguments))
        assert {len(part) for part in parts} == {12 // world_size}


# --- the loader


def _take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def _assert_same(first, second):
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("batch_size", [64, 2000])
def test_loader_yields_the_stream(batch_size):
    digits = Digits()
    for step, (images, labels) in enumerate(_take(build_loader(digits, batch_size, seed=7), 3)):
        index = stream_indices(step, dataset_size=1797, batch_size=batch_size, seed=7)
        assert images.shape == (batch_size, 1, 8, 8)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images, digits.images[index])
        assert torch.equal(labels, digits.labels[index])


def test_loader_resumes_at_any_step():
    straight = _take(build_loader(Digits(), 100, seed=1), 40)
    for start in (1, 17, 18, 37):  # 17 and 18: either side of the first epoch's end
        _assert_same(
            _take(build_loader(Digits(), 100, seed=1, start_step=start), 3), straight[start : start + 3]
        )


def test_workers_yield_the_same_batches(tmp_path):
    data = ClassFolder(_fill(tmp_path), image_size=8)
    arguments = {"batch_size": 4, "seed": 2, "start_step": 1}
    _assert_same(
        _take(build_loader(data, num_workers=2, **arguments), 7), _take(build_loader(data, **arguments), 7)
    )


def test_loader_of_a_rank():
    whole = _take(build_loader(Digits(), 10, seed=4), 3)
    part = _take(build_loader(Digits(), 10, seed=4, rank=1, world_size=2), 3)
    _assert_same(part, [(images[5:], labels[5:]) for images, labels in whole])


def test_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    np_before = np.random.get_state()[1].copy()  # noqa: NPY002
    _take(build_loader(Digits(), 10, seed=4), 3)
    _take(build_loader(Digits(), 10, seed=4, num_workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], np_before)  # noqa: NPY002


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_names_an_unreadable_image(tmp_path, num_workers):
    data = ClassFolder(_fill(tmp_path), image_size=8)
    data.path(3).write_bytes(b"broken")
    loader = build_loader(data, 10, seed=0, num_workers=num_workers)
    with pytest.raises(UserError, match=r"^data: cannot read image [^\n]*; repair or remove the file$"):
        next(loader)
    loader.close()


def test_close_ends_the_workers(tmp_path):
    import multiprocessing

    data = ClassFolder(_fill(tmp_path), image_size=8)
    before = {child.pid for child in multiprocessing.active_children()}
    loader = build_loader(data, 2, seed=0, num_workers=2)
    next(loader)
    assert len({child.pid for child in multiprocessing.active_children()} - before) == 2
    loader.close()
    assert not {child.pid for child in multiprocessing.active_children()} - before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a multiple of world_size 1 and at least 1, got 0"),
        ({"batch_size": 5, "world_size": 2}, "batch_size must be a multiple of world_size 2"),
        ({"rank": 2, "world_size": 2}, "rank must satisfy 0 <= rank < world_size 2, got 2"),
        ({"world_size": 0}, "rank must satisfy 0 <= rank < world_size 0, got 0"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_loader_errors_come_before_the_first_batch(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_loader(Digits(), **{"batch_size": 4, "seed": 0, **arguments})


def test_importing_the_package_imports_no_torch():
    code = "import sys, pixelgen.data; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
