"""Data sets of the Hugging Face library, from files of every kind it is used with here."""

import gzip
import io
import json
import multiprocessing
import os
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from forked import Forked
from images import write_tar
from PIL import Image

from pixelgen.data import ClassFolder, HubImages, build_dataset, build_loader
from pixelgen.data.decode import read_image
from pixelgen.data.hub import check_tar
from pixelgen.data.options import DataConfig
from pixelgen.errors import UserError

_NAMES = ["ant", "bee", "cat"]


pytestmark = pytest.mark.usefixtures("hub_cache")


def _jpegs(count: int = 12) -> list[bytes]:
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


_IMAGES = _jpegs()
_LABELS = [index % 3 for index in range(12)]
_CELLS = [{"bytes": image, "path": f"{index}.jpg"} for index, image in enumerate(_IMAGES)]


def _table(label=None, labels=_LABELS, cells=_CELLS, image_name="image", label_name="label") -> Dataset:
    features = Features({image_name: datasets.Image(), label_name: label or ClassLabel(names=_NAMES)})
    return Dataset.from_dict({image_name: list(cells), label_name: list(labels)}, features=features)


def _parquet(root: Path, table: Dataset, shards: int = 3) -> Path:
    root.mkdir(exist_ok=True)
    for index in range(shards):
        table.shard(shards, index).to_parquet(root / f"train-{index:05}-of-{shards:05}.parquet")
    return root


def _tars(root: Path, fields=("jpg", "cls"), shards: int = 3) -> Path:
    root.mkdir(exist_ok=True)
    per_shard = len(_IMAGES) // shards
    for shard in range(shards):
        members = []
        for index in range(shard * per_shard, (shard + 1) * per_shard):
            contents = {
                "jpg": _IMAGES[index],
                "cls": str(_LABELS[index]).encode(),
                "json": json.dumps({"label": _LABELS[index], "name": "x"}).encode(),
            }
            members += [(f"{index:04}.{field}", contents[field]) for field in fields]
        write_tar(root / f"{shard:03}.tar", members)
    return root


def _folder(root: Path) -> Path:
    for index, image in enumerate(_IMAGES):
        (root / _NAMES[_LABELS[index]]).mkdir(parents=True, exist_ok=True)
        (root / _NAMES[_LABELS[index]] / f"{index:02}.jpg").write_bytes(image)
    return root


def _config(path, **more) -> DataConfig:
    return DataConfig(
        **{"name": "hf", "path": str(path), "image_size": 16, "channels": 3, "num_classes": 3, **more}
    )


def _assert_holds(data: HubImages, order=range(12)):
    """All images of `_IMAGES`, decoded by our own reader, and their labels."""
    images, labels = data.batch(range(len(data)))
    assert labels.tolist() == [_LABELS[index] for index in order]
    np.testing.assert_array_equal(labels, data.labels)
    for image, index in zip(images, order, strict=True):
        np.testing.assert_array_equal(image, read_image(_IMAGES[index], 16, 3))


# --- sources


def test_parquet_files(tmp_path):
    root = _parquet(tmp_path / "set", _table())
    for path in (root, root / "**"):
        data = build_dataset(_config(path))
        assert isinstance(data, HubImages)
        assert data.class_names == tuple(_NAMES)
        assert data.labels.dtype == np.int64
        _assert_holds(data)
    one = build_dataset(_config(root / "train-00001-of-00003.parquet"))
    _assert_holds(one, range(4, 8))
    assert one.name(2) == f"row 2 of {root / 'train-00001-of-00003.parquet'} (6.jpg)"


def test_splits_follow_the_names_of_files(tmp_path):
    root = _parquet(tmp_path / "set", _table())
    _table(labels=_LABELS[:2], cells=_CELLS[:2]).to_parquet(root / "test-00000-of-00001.parquet")
    _assert_holds(build_dataset(_config(root)))
    _assert_holds(build_dataset(_config(root, split="test")), range(2))
    with pytest.raises(
        UserError, match=r"cannot open .*Unknown split .nope.*; look at --data\.split"
    ) as raised:
        build_dataset(_config(root, split="nope"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fields", [("jpg", "cls"), ("jpg", "json"), ("json", "jpg", "cls")])
def test_webdataset_tars(tmp_path, fields):
    root = _tars(tmp_path / "set", fields)
    data = build_dataset(_config(root))
    assert data.class_names == ("0", "1", "2")
    _assert_holds(data)
    _assert_holds(build_dataset(_config(root / "00[12].tar")), range(4, 12))


def test_image_folder_is_the_class_folder(tmp_path):
    root = _folder(tmp_path / "set")
    data, folder = build_dataset(_config(root)), ClassFolder(root, 16)
    assert data.class_names == folder.class_names
    assert data.name(0) == str(root / "ant" / "00.jpg")
    pixels = {data.name(index): (data[index][0], data[index][1]) for index in range(12)}
    for index in range(12):
        image, label = folder[index]
        assert torch.equal(pixels[folder.name(index)][0], image)
        assert pixels[folder.name(index)][1] == label


def test_what_save_to_disk_wrote(tmp_path):
    _table().save_to_disk(tmp_path / "one")
    _assert_holds(build_dataset(_config(tmp_path / "one")))
    # A selection is stored as row numbers beside the rows.
    DatasetDict({"train": _table(), "test": _table().select([5, 2])}).save_to_disk(tmp_path / "two")
    _assert_holds(build_dataset(_config(tmp_path / "two", split="test")), [5, 2])
    with pytest.raises(UserError, match=r"has the splits train, test, got data\.split nope"):
        build_dataset(_config(tmp_path / "two", split="nope"))
    with pytest.raises(UserError, match=r"was written by save_to_disk .* set --data\.streaming false"):
        build_dataset(_config(tmp_path / "one", streaming=True))


def test_columns_can_be_named(tmp_path):
    table = _table(image_name="picture", label_name="kind")
    table = table.add_column("fine", [0] * 12).add_column("bytes", _IMAGES[::-1])
    root = _parquet(tmp_path / "set", table)
    _assert_holds(build_dataset(_config(root)))
    data = build_dataset(_config(root, image_column="bytes", label_column="fine"))
    assert data.labels.tolist() == [0] * 12
    np.testing.assert_array_equal(data[0][0], read_image(_IMAGES[11], 16, 3))


_OFFLINE = """
import sys
from pixelgen.config import DataConfig
from pixelgen.data import build_dataset
from pixelgen.errors import UserError

config = dict(name="hf", image_size=8, channels=3, num_classes=3)
print(len(build_dataset(DataConfig(path=sys.argv[1], **config))))
try:
    build_dataset(DataConfig(path="some/set", **config))
except UserError as error:
    print(error)
"""


def test_offline_with_local_files(tmp_path):
    root = _parquet(tmp_path / "set", _table())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    process = Forked(["-c", _OFFLINE, str(root)], environment=environment, stderr=sys.__stderr__)
    count, *message = process.lines(120)
    assert process.wait(60) == 0 and count == "12\n"
    assert len(message) == 1
    assert message[0].startswith("data: cannot open some/set: Couldn't reach 'some/set' on the Hub")
    assert "it is no file or folder here" in message[0]


# --- reading


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_loader_reads_in_workers(tmp_path, kind):
    root = _parquet(tmp_path / "set", _table()) if kind == "parquet" else _folder(tmp_path / "set")
    data = build_dataset(_config(root, crop="random"))

    def take(**more):
        loader = build_loader(data, 6, seed=1, **more)
        batches = [next(loader) for _ in range(5)]
        loader.close()
        return batches

    whole = take()
    for num_workers in (1, 2):
        for batch, expected in zip(take(num_workers=num_workers), whole, strict=True):
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.condition["label"], expected.condition["label"])
    assert not multiprocessing.active_children()


def test_broken_rows_are_replaced(tmp_path):
    cells = list(_CELLS)
    cells[2] = None
    cells[7] = {"bytes": b"", "path": "7.jpg"}
    cells[8] = {"bytes": _IMAGES[8][:200], "path": "8.jpg"}
    root = _parquet(tmp_path / "set", _table(cells=cells), shards=1)
    data = build_dataset(_config(root))
    loader = build_loader(data, 12, seed=0, num_workers=1, max_broken=0.5)
    next(loader)
    loader.close()
    assert (loader.num_broken, loader.num_drawn) == (3, 12)
    reasons = dict(loader.broken)
    assert reasons[f"row 2 of {root}"] == "the row holds no image"
    assert reasons[f"row 7 of {root} (7.jpg)"] == "the file is empty"
    assert f"row 8 of {root} (8.jpg)" in reasons
    np.testing.assert_array_equal(data.batch([7])[0][0], read_image(_IMAGES[9], 16, 3))


# --- tars that were cut short


def _cut(path: Path, end) -> Path:
    """Cuts a tar where ``end`` says, given its second to last member and its last one."""
    with tarfile.open(path) as tar:
        *_, member, last = tar.getmembers()
    os.truncate(path, end(member, last))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_pattern", [False, True])
@pytest.mark.parametrize(
    "end",
    [
        lambda member, last: last.offset + 100,  # of all, `datasets` is silent about this one only
        lambda member, last: member.offset_data + 10,
        lambda member, last: member.offset_data + member.size - 1,
        lambda member, last: last.offset_data,
    ],
)
def test_tar_that_was_cut_short(tmp_path, end, as_pattern, streaming):
    root = _tars(tmp_path / "set")
    path = _cut(root / "001.tar", end)
    with pytest.raises(UserError, match=rf"^data: {path} is cut short or damaged: .*; fetch it again$"):
        build_dataset(_config(root / "*.tar" if as_pattern else root, streaming=streaming))


def test_tar_with_a_damaged_header(tmp_path):
    path = _tars(tmp_path / "set") / "001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[2]
    _cut(path, lambda _, last: last.offset_data + 512)  # otherwise the headers are not looked at
    with path.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"damage")
    with pytest.raises(UserError, match=r"001\.tar is cut short or damaged"):
        build_dataset(_config(tmp_path / "set"))


@pytest.mark.parametrize(
    "end",
    [
        lambda member, last: last.offset_data + 512,
        lambda member, last: last.offset_data + 1024,
        lambda member, last: last.offset_data + 1500,
    ],
)
def test_tar_without_its_padding_is_whole(tmp_path, end):
    root = _tars(tmp_path / "set")
    _cut(root / "001.tar", end)
    _assert_holds(build_dataset(_config(root)))


def test_check_tar_knows_all_kinds_of_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("folder")
            info.type, info.size, info.linkname = kind, 10**6, "x"
            tar.addfile(info)
        info = tarfile.TarInfo("é" * 200)  # its name is a member of its own
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    for size in (last.offset_data + 512, last.offset_data + 3):  # without padding at all
        os.truncate(path, size)
        check_tar(str(path))
    os.truncate(path, last.offset_data + 2)
    with pytest.raises(UserError, match="is cut short"):
        check_tar(str(path))
    path.write_bytes(gzip.compress(os.urandom(5000)))
    check_tar(str(path))  # for the reader to judge


# --- labels


def test_plain_integers_are_labels(tmp_path):
    data = build_dataset(_config(_parquet(tmp_path / "set", _table(Value("int32"))), num_classes=5))
    assert data.class_names == tuple("01234")
    assert data.labels.tolist() == _LABELS


def test_class_names_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"holds 3 classes but num_classes is 4; set --data\.num_classes 3"):
        build_dataset(_config(_parquet(tmp_path / "set", _table()), num_classes=4))


@pytest.mark.parametrize(
    ("label", "labels", "message"),
    [
        (Value("int64"), [0, 1, 3] * 4, r"must hold .* in \[0, 3\), got 3 in row 2 of .*set;"),
        (Value("int64"), [0, -1, 2] * 4, r"must hold .* in \[0, 3\), got -1 in row 1 of .*set;"),
        (ClassLabel(names=_NAMES), [0, None, 2] * 4, r"must hold .*, got None in row 1 of"),
        (Value("float32"), [0.0, 1.0, 2.0] * 4, "of .* must hold class numbers, got float32"),
        (Value("bool"), [True, False] * 6, "of .* must hold class numbers, got bool"),
        (
            Value("string"),
            ["a", "b", "c"] * 4,
            "of .* got string; turn it into class numbers, .*class_encode_column",
        ),
        (datasets.List(Value("int64")), [[0], [1], [2]] * 4, "of .* class numbers, got List"),
    ],
)
def test_wrong_labels(tmp_path, label, labels, message):
    root = _parquet(tmp_path / "set", _table(label, labels))
    with pytest.raises(UserError, match=f"label column label {message}") as raised:
        build_dataset(_config(root))
    assert "\n" not in str(raised.value)


# --- wrong files and columns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "nope"}, r"data\.image_column must be one of image, label, got nope"),
        ({"label_column": "nope"}, r"data\.label_column must be one of image, label, got nope"),
        ({"image_column": "label"}, r"data\.image_column label cannot be read as images: "),
        ({"label_column": "image"}, "label column image of .* must hold class numbers, got Image"),
    ],
)
def test_wrong_columns(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build_dataset(_config(_parquet(tmp_path / "set", _table()), **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_classes_that_the_library_does_not_see(tmp_path, streaming):
    root = _folder(tmp_path / "set")
    (root / "ant" / "deep").mkdir()
    (root / "ant" / "00.jpg").rename(root / "ant" / "deep" / "00.jpg")
    message = (
        "set --data.streaming false" if streaming else "a folder of class folders is read with --data.name"
    )
    with pytest.raises(UserError, match=message):
        build_dataset(_config(root, streaming=streaming))


@pytest.mark.parametrize(
    ("missing", "left", "of"), [("label", "image", "labels"), ("image", "label", "images")]
)
def test_missing_columns(tmp_path, missing, left, of):
    root = _parquet(tmp_path / "set", _table().remove_columns(missing))
    message = rf"has no column of {of} among {left}; name one with --data\.{missing}_column$"
    with pytest.raises(UserError, match=message):
        build_dataset(_config(root))


def test_missing_and_foreign_files(tmp_path):
    message = r"nowhere does not exist; data\.path must be a file, a folder"
    with pytest.raises(FileNotFoundError, match=message):
        build_dataset(_config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no file matches data\.path .*\*\.parquet"):
        build_dataset(_config(tmp_path / "*.parquet"))
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"files of one kind, \.parquet or \.tar, got \.zip"):
        build_dataset(_config(tmp_path / "a.zip"))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    (tmp_path / "c.tar").write_bytes(b"no tar")
    for name in ("b.parquet", "c.tar"):
        with pytest.raises(UserError, match=rf"^data: cannot open .*{name}: [^\n]+; look at") as raised:
            build_dataset(_config(tmp_path / name))
        assert "Please pass" not in str(raised.value)


def test_empty_split(tmp_path):
    root = _parquet(tmp_path / "set", _table(), shards=1)
    with pytest.raises(UserError, match=r"^data: cannot open .*set: .*train\[:0\].* no data"):
        build_dataset(_config(root, split="train[:0]"))
