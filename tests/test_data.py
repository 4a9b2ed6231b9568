"""Digits, folders of classes and synthetic images, and the configuration that chooses among them."""

import numpy as np
import pytest
import torch
from images import fill
from PIL import Image

from pixelgen.data import ClassFolder, Digits, SyntheticImages, build_dataset, center_crop
from pixelgen.data.options import DataConfig
from pixelgen.errors import UserError

# --- digits


def test_digits_round_trip_is_exact():
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    digits = Digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == np.uint8
    assert digits.labels.dtype == np.int64
    back = np.round(digits.images.astype(np.float64) * 16 / 255).reshape(1797, 64)
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
    small = torch.from_numpy(Digits().images)
    expected = torch.nn.functional.interpolate(small, (size, size), mode="bicubic", antialias=True)
    error = (torch.from_numpy(Digits(image_size=size).images).int() - expected.int()).abs()
    assert error.max() <= 2  # grey levels: their fixed-point weights differ


def test_digits_of_another_size():
    with pytest.raises(UserError, match="image_size must be a multiple of 8, got 12"):
        Digits(image_size=12)


# --- class folders


def test_folder_labels_follow_sorted_names(tmp_path):
    data = ClassFolder(fill(tmp_path), image_size=8)
    assert data.class_names == ("ant", "cat")
    assert data.num_classes == 2
    assert len(data) == 10
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert [data.path(index).parts[len(tmp_path.parts)] for index in range(10)] == ["ant"] * 5 + ["cat"] * 5
    assert {data.path(index).name for index in range(5)} == {f"{index:03}.png" for index in range(5)}
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
    names = sorted(data.path(index).name for index in range(len(data)))
    assert names == ["1.jpg", "2.JPEG", "3.Png", "4.webp", "5.bmp", "6.ppm"]
    images, _ = data.batch(range(len(data)))
    expected = torch.tensor([10, 200, 30]).view(1, 3, 1, 1)
    assert (images.int() - expected).abs().max() <= 4  # lossy kinds


def test_files_of_other_kinds_are_counted_once(tmp_path, capfd, monkeypatch):
    fill(tmp_path)
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
    fill(tmp_path, classes=("ant",))
    for extension in "abcdefg":
        (tmp_path / "ant" / f"0.{extension}").touch()
    ClassFolder(tmp_path, image_size=8)
    assert capfd.readouterr().err.endswith("were left out: 7 (.a 1, .b 1, .c 1, .d 1, .e 1, ...)\n")


@pytest.mark.parametrize("target", [".", "..", "../../ant"])
@pytest.mark.parametrize("place", ["ant/self", "ant/nested/self"])
def test_links_to_a_folder_above_are_not_followed(tmp_path, place, target):
    data = ClassFolder(fill(tmp_path), image_size=8)
    (tmp_path / place).symlink_to(target)
    again = ClassFolder(tmp_path, image_size=8)
    assert [again.name(index) for index in range(len(again))] == [data.name(index) for index in range(10)]
    np.testing.assert_array_equal(again.labels, data.labels)


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    fill(tmp_path / "set")
    fill(tmp_path / "elsewhere", classes=("bee",))
    (tmp_path / "set" / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (tmp_path / "set" / "ant" / "more").symlink_to(tmp_path / "elsewhere" / "bee" / "nested")
    data = ClassFolder(tmp_path / "set", image_size=8)
    assert data.class_names == ("ant", "bee", "cat")
    assert np.bincount(data.labels).tolist() == [7, 5, 5]


def test_order_of_images_is_that_of_the_names_of_their_folders(tmp_path):
    # The shuffle is a function of it: another order would change every resumed run.
    names = ["a-b/0", "a/b/c/0", "a/b-c/0", "a/b/1", "a/.h/2", "a/1", "a/B/0", "a.b/0", "0", "B/0", "a b/0"]
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / f"{name}.png").touch()
    data = ClassFolder(tmp_path, image_size=8)
    got = [str(data.path(index).relative_to(tmp_path / "x").with_suffix("")) for index in range(len(data))]
    assert got == ["0", "B/0", "a/1", "a b/0", "a-b/0", "a.b/0", "a/B/0", "a/b/1", "a/b-c/0", "a/b/c/0"]


def test_folder_of_16_bit_maps(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "deep.ppm").write_bytes(b"P5\n2 1\n65535\n" + bytes([0x80, 0x80, 0xFF, 0xFF]))
    got, _ = ClassFolder(tmp_path, image_size=1, channels=1)[0]
    assert got.item() in (128, 255)


# --- building from config fields


def test_build_dataset(tmp_path):
    assert isinstance(build_dataset(DataConfig()), Digits)
    config = DataConfig(name="folder", path=str(fill(tmp_path)), image_size=16, num_classes=2, crop="fast")
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
        ({"path": "x"}, r"data\.path is an option of data\.name folder and hf and prepared, not of digits"),
        ({"name": "synthetic", "path": "x"}, r"data\.path is an option .* not of synthetic: leave it out"),
        ({"crop": "fast"}, r"data\.crop is an option of data\.name folder and hf, not of digits"),
        ({"name": "folder", "streaming": True}, r"data\.streaming .* data\.name hf, not of folder: leave it"),
        ({"name": "folder", "crop": "wide"}, r"data\.crop must be one of center, fast, random, got 'wide'"),
        ({"name": "hf", "shuffle_block": 0}, r"data\.shuffle_block must be at least 1, got 0"),
        ({"num_classes": 1000}, r"digits has 10 classes but num_classes is 1000; set --data\.num_classes 10"),
    ],
)
def test_build_dataset_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        build_dataset(DataConfig(**arguments))


def test_build_dataset_counts_folders(tmp_path):
    config = DataConfig(name="folder", path=str(fill(tmp_path)), num_classes=3)
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
    assert np.bincount(data.labels).tolist() == [len(data) // 10] * 10
    for row, index in enumerate(indices):
        assert torch.equal(data[index][0], images[row])
        assert data[index][1] == labels[row]
    assert torch.equal(images[2], images[3])  # 65 is image 1 of the pool again
    assert not torch.equal(images[0], images[3])
    assert 120 < images.float().mean() < 135
