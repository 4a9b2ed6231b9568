"""Folders and files that cannot be used, and training that goes on in spite of some of them."""

import io
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from images import assert_same, pair, united
from PIL import Image

from pixelgen.data import ClassFolder, Share, build_loader, shuffled_indices
from pixelgen.data.encoded import MAX_BROKEN_RUN
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


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; data\.path must be a folder"):
        ClassFolder(tmp_path / "nowhere", image_size=8)
    (tmp_path / "train.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.zip is a file; data\.path must be a folder"):
        ClassFolder(tmp_path / "train.zip", image_size=8)
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="no class folders in"):
        ClassFolder(tmp_path, image_size=8)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.gif").write_bytes(b"")
    message = r"1 of 1 class folders of .* hold no images \(a\); looked for jpg jpeg png webp"
    with pytest.raises(UserError, match=message):
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
        images, labels = pair(next(loader))
        return _numbers(images), labels.tolist(), loader.broken, loader.num_broken, loader.num_drawn

    numbers, labels, broken, num_broken, num_drawn = _as_other_user(tmp_path, read)
    assert sorted(numbers) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
    assert labels == [int(number >= 5) for number in numbers]
    assert broken == [("a/003.jpg", "Permission denied")]
    assert (num_broken, num_drawn) == (1, 10)


# --- images


_WHOLE = _jpeg(100)
_DAMAGE = {"text": b"hello", "empty": b"", "cut": _WHOLE[: len(_WHOLE) // 2], "header": _WHOLE[:20]}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_unreadable_image_is_named(tmp_path, damage):
    data = _fill(tmp_path)
    data.path(3).write_bytes(_DAMAGE[damage])
    with pytest.raises(UserError, match=r"^data: cannot read image [^\n]*a/003\.jpg: [^\n]+; repair or rem"):
        data[3]


# --- training goes on


def test_the_next_readable_image_takes_the_place(tmp_path, capfd):
    data = _fill(tmp_path)
    for index, damage in ((3, "empty"), (4, "cut"), (9, "text")):
        data.path(index).write_bytes(_DAMAGE[damage])
    loader = build_loader(data, 10, seed=0, max_broken=0.5)
    asked = [shuffled_indices(step, 10, Share(10, seed=0)) for step in range(2)]
    for indices in asked:
        images, labels = pair(next(loader))
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
        batches = [pair(next(loader)) for _ in range(count)]
        loader.close()
        return batches, loader

    whole, loader = take(5)
    with_workers, parallel = take(5, num_workers=2)
    assert_same(with_workers, whole)
    assert set(parallel.broken) == set(loader.broken)
    assert (parallel.num_broken, parallel.num_drawn) == (loader.num_broken, loader.num_drawn)
    assert_same(take(2, start_step=3)[0], whole[3:])
    ranks = [take(5, rank=rank, world_size=3) for rank in range(3)]
    assert_same(united(batches for batches, _ in ranks), whole)
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
    message = rf"^data: DataLoader worker .*{worker}.* exited unexpectedly; if memory"
    with pytest.raises(UserError, match=message):
        for _ in range(20):
            next(loader)
    loader.close()
