"""Folders and files that cannot be used, and training that goes on in spite of some of them."""

import io
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen.config_sections import DataConfig
from pixelgen.data import ClassFolder, build_dataset, build_loader, stream_indices
from pixelgen.data.folder import MAX_BROKEN_RUN
from pixelgen.errors import UserError


def _jpeg(value: int, side: int = 64) -> bytes:
    """A grey square, so that a pixel tells which image it is."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(file, "JPEG", quality=95)
    return file.getvalue()


def _fill(root: Path, count: int = 10) -> ClassFolder:
    """Two classes of images; image i has the grey level 20 i."""
    for name, first in (("a", 0), ("b", count // 2)):
        (root / name).mkdir()
        for index in range(first, first + count // 2):
            (root / name / f"{index:03}.jpg").write_bytes(_jpeg(20 * index))
    return ClassFolder(root, image_size=8)


def _numbers(images: torch.Tensor) -> list[int]:
    """Which images of `_fill` these are."""
    return torch.round(images.double().mean((1, 2, 3)) / 20).int().tolist()


# --- folders


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
    for name in "cdef":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"4 of 6 class folders of .* hold no images \(c, d, e, \.\.\.\)"):
        ClassFolder(tmp_path, image_size=8)


def _without_rights(root, connection, action):
    os.chdir(root)  # the folders above may be closed to other users
    if os.geteuid() == 0:
        os.setuid(65534)  # permissions do not bind the superuser
    try:
        connection.send(action())
    except Exception as error:
        connection.send(error)


def _as_other_user(root, action):
    """What ``action`` returns or raises in a process to which permissions of files apply."""
    root.chmod(0o755)
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_without_rights, args=(root, there, action))
    child.start()
    result = here.recv()
    child.join()
    return result


def test_folder_that_may_not_be_listed(tmp_path):
    _fill(tmp_path)
    (tmp_path / "a" / "more").mkdir()
    (tmp_path / "a" / "more").chmod(0)
    error = _as_other_user(tmp_path, lambda: ClassFolder(".", image_size=8))
    assert isinstance(error, UserError)
    assert str(error) == "data: cannot list folder a/more: Permission denied"


def test_hidden_folder_that_may_not_be_listed_is_skipped(tmp_path):
    _fill(tmp_path)
    for place in (tmp_path / ".snapshot", tmp_path / "a" / ".snapshot"):
        place.mkdir()
        place.chmod(0)
    assert _as_other_user(tmp_path, lambda: len(ClassFolder(".", image_size=8))) == 10


def test_file_that_may_not_be_read_is_replaced(tmp_path):
    data = _fill(tmp_path)
    next(build_loader(data, 10, seed=0))  # imports everything: the other user may not read Python's files
    data.path(3).chmod(0)

    def read():
        loader = build_loader(ClassFolder(".", image_size=8), 10, seed=0)
        images, labels = next(loader)
        return _numbers(images), labels.tolist(), loader.broken, loader.num_broken, loader.num_drawn

    numbers, labels, broken, num_broken, num_drawn = _as_other_user(tmp_path, read)
    assert sorted(numbers) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
    assert labels == [int(number >= 5) for number in numbers]
    assert broken == [("a/003.jpg", "Permission denied")]
    assert (num_broken, num_drawn) == (1, 10)


# --- images


_WHOLE = _jpeg(100)
_DAMAGE = {
    "text": b"hello",
    "empty": b"",
    "cut": _WHOLE[: len(_WHOLE) // 2],
    "header": _WHOLE[:20],
}


@pytest.mark.parametrize("crop", ["center", "fast", "random"])
@pytest.mark.parametrize("damage", _DAMAGE)
def test_unreadable_image_is_named(tmp_path, damage, crop):
    _fill(tmp_path)
    data = ClassFolder(tmp_path, image_size=8, crop=crop)
    data.path(3).write_bytes(_DAMAGE[damage])
    with pytest.raises(UserError, match=r"^data: cannot read image [^\n]*a/003\.jpg: [^\n]+; repair or rem"):
        data[3]


@pytest.mark.parametrize("damage", ["cut", "chunk"])
def test_damaged_png_is_named(tmp_path, damage):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "chunk": whole[:40] + b"\0" * 200 + whole[240:]}
    path.write_bytes(broken[damage])
    with pytest.raises(UserError, match=r"^data: cannot read image [^\n]*a/0\.png: [^\n]+; repair or remove"):
        ClassFolder(tmp_path, image_size=8)[0]


def test_huge_image_is_refused(tmp_path, monkeypatch):
    data = _fill(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"cannot read image .* exceeds limit"):
        data[0]


def test_image_of_very_unequal_sides_is_named(tmp_path):
    data = _fill(tmp_path)
    Image.new("RGB", (1, 60_000)).save(data.path(3), "PNG")
    data.image_size = 256
    with pytest.raises(UserError, match=r"a/003\.jpg: its sides are too unequal, 1 x 60000; repair or rem"):
        data[3]


# --- training goes on


def test_the_next_readable_image_takes_the_place(tmp_path, capfd):
    data = _fill(tmp_path)
    for index, damage in ((3, "empty"), (4, "cut"), (9, "text")):
        data.path(index).write_bytes(_DAMAGE[damage])
    loader = build_loader(data, 10, seed=0, max_broken=0.5)
    asked = [stream_indices(step, dataset_size=10, batch_size=10, seed=0) for step in range(2)]
    for indices in asked:
        images, labels = next(loader)
        expected = [{3: 5, 4: 5, 9: 0}.get(int(index), int(index)) for index in indices]
        assert _numbers(images) == expected
        assert labels.tolist() == [int(index >= 5) for index in expected]  # of the image that is there
    assert (loader.num_broken, loader.num_drawn) == (6, 20)
    names = {str(data.path(index)) for index in (3, 4, 9)}
    assert {path for path, _ in loader.broken} == names
    assert len(loader.broken) == 3
    assert dict(loader.broken)[str(data.path(3))] == "the file is empty"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3  # each once, though two epochs met them
    assert f"data: cannot read image {data.path(3)}: the file is empty; another one takes its place" in lines


def test_replacements_depend_on_neither_workers_nor_ranks_nor_resume(tmp_path):
    data = _fill(tmp_path, count=12)
    for index in (0, 5, 11):
        data.path(index).write_bytes(b"broken")
    arguments = {"batch_size": 6, "seed": 3, "max_broken": 1.0}

    def take(count, **more):
        loader = build_loader(data, **arguments, **more)
        batches = [next(loader) for _ in range(count)]
        loader.close()
        return [
            list(zip(_numbers(images), labels.tolist(), strict=True)) for images, labels in batches
        ], loader

    whole, loader = take(5)
    with_workers, parallel = take(5, num_workers=2)
    assert with_workers == whole
    assert set(parallel.broken) == set(loader.broken)
    assert (parallel.num_broken, parallel.num_drawn) == (loader.num_broken, loader.num_drawn)
    assert take(2, start_step=3)[0] == whole[3:]
    ranks = [take(5, rank=rank, world_size=3) for rank in range(3)]
    united = [
        [pair for part in parts for pair in part]
        for parts in zip(*(batches for batches, _ in ranks), strict=True)
    ]
    assert united == whole
    assert sum(rank.num_broken for _, rank in ranks) == loader.num_broken


def test_features_are_trained_in_spite_of_a_broken_image(tmp_path, capfd):
    data = _fill(tmp_path)
    data.path(1).write_bytes(b"")
    images, labels = data.batch([0, 1, 6])
    assert _numbers(images) == [0, 2, 6]
    assert labels.tolist() == [0, 0, 1]
    assert "001.jpg: the file is empty" in capfd.readouterr().err
    data.path(7).write_bytes(b"")
    data.batch([0, 1, 7])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1  # each image once, though it is met again
    assert "007.jpg: the file is empty" in lines[0]


# --- and ends where too many are broken


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_broken_images_end_the_run(tmp_path, num_workers):
    data = _fill(tmp_path)
    for index in (2, 7):
        data.path(index).write_bytes(b"")
    loader = build_loader(data, 10, seed=0, max_broken=0.01, num_workers=num_workers)
    with pytest.raises(UserError) as raised:
        for _ in range(100):
            next(loader)
    # 1 % of the first 1,000 images are 10; every epoch of 10 images holds 2.
    assert (loader.num_broken, loader.num_drawn) == (12, 60)
    message = str(raised.value)
    assert message.startswith(
        "data: 12 of 60 images drawn (20.0%) could not be read, more than data.max_brok"
    )
    assert "data.max_broken 0.01 allows" in message
    for index in (2, 7):
        assert f"{data.path(index)} (the file is empty)" in message
    loader.close()


def test_the_limit_is_a_share_of_what_was_drawn(tmp_path):
    data = _fill(tmp_path)
    data.path(2).write_bytes(b"")
    loader = build_loader(data, 100, seed=0, max_broken=0.1)  # exactly 10 % are broken: never above
    for _ in range(15):
        next(loader)
    assert (loader.num_broken, loader.num_drawn) == (150, 1500)


def test_no_broken_image_is_allowed_with_a_limit_of_zero(tmp_path):
    data = _fill(tmp_path)
    data.path(2).write_bytes(b"")
    with pytest.raises(UserError, match=r"^data: 1 of 10 images drawn .* data\.max_broken 0 allows"):
        next(build_loader(data, 10, seed=0, max_broken=0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_images_broken(tmp_path, num_workers):
    data = _fill(tmp_path)
    for index in range(10):
        data.path(index).write_bytes(b"")
    loader = build_loader(data, 4, seed=0, max_broken=1.0, num_workers=num_workers)
    with pytest.raises(UserError, match=r"^data: 10 images in a row cannot be read, beginning with .*empty$"):
        next(loader)
    loader.close()


def test_a_long_run_of_broken_images_is_given_up(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(MAX_BROKEN_RUN + 1):
        (tmp_path / "a" / f"{index:04}.jpg").touch()
    data = ClassFolder(tmp_path, image_size=8)
    with pytest.raises(UserError, match=r"1,000 images in a row cannot be read, beginning with .*0001\.jpg"):
        data.batch([1])


def test_a_worker_that_dies_is_reported(tmp_path):
    data = _fill(tmp_path)
    before = {child.pid for child in multiprocessing.active_children()}
    loader = build_loader(data, 2, seed=0, num_workers=2)
    next(loader)
    worker = ({child.pid for child in multiprocessing.active_children()} - before).pop()
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)  # nothing is raised here, in what would be a training step
    with pytest.raises(
        UserError, match=rf"^data: DataLoader worker .*{worker}.* exited unexpectedly; if memory"
    ):
        for _ in range(20):
            next(loader)
    loader.close()


# --- kinds of images


_KINDS = {
    "cmyk.jpg": (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), (255, 0, 0)),
    "grey.jpg": (Image.new("L", (9, 9), 77), (77, 77, 77)),
    "grey.png": (Image.new("L", (9, 9), 77), (77, 77, 77)),
    "palette.png": (Image.new("RGB", (9, 9), (0, 0, 255)).convert("P"), (0, 0, 255)),
    "grey16.png": (Image.fromarray(np.full((9, 9), 32896, dtype=np.uint16)), (128, 128, 128)),
}


@pytest.mark.parametrize("crop", ["center", "fast", "random"])
@pytest.mark.parametrize("name", _KINDS)
def test_kinds_of_images_have_the_right_pixels(tmp_path, name, crop):
    image, rgb = _KINDS[name]
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / name)
    config = DataConfig(name="folder", path=str(tmp_path), image_size=8, channels=3, num_classes=1, crop=crop)
    loader = build_loader(build_dataset(config), 2, seed=0, num_workers=1)
    images, _ = next(loader)
    loader.close()
    assert loader.broken == []
    assert (images.int() - torch.tensor(rgb).view(1, 3, 1, 1)).abs().max() <= 2  # JPEG, and CMYK by it
