"""The command that decodes a data set into shards, and the data set that reads them."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Forked
from images import assert_same, fill, pair
from PIL import Image
from training import refused

from pixelgen.data.loader import build_loader
from pixelgen.data.prepare.command import (
    PrepareOptions,
    describe,
    main,
    open_source,
    prepare,
)
from pixelgen.data.shards import ShardFolder
from pixelgen.data.sources.folder import ClassFolder
from pixelgen.data.sources.prepared import PreparedImages
from pixelgen.errors import UserError


def _fill(root, classes=("ant", "bee"), per_class=7, side=(24, 20)):
    return fill(root, classes, per_class, side, nested=".", kind="jpg")


def _options(src, dst, **changes):
    given = {"resolution": 16, "workers": 0, "shard_size": 4, "max_broken": 0.2, **changes}
    return PrepareOptions(src=str(src), dst=str(dst), **given)


def _files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def src(tmp_path):
    return _fill(tmp_path / "src")


@contextmanager
def _command(tmp_path, *arguments):
    """The command in a process of its own, once it has written two shards into DST."""
    with (tmp_path / "errors").open("w") as errors:
        process = Forked(["-m", "pixelgen.data.prepare", *map(str, arguments)], stderr=errors, own_group=True)
    try:
        while not (arguments[1] / "shard-00001.arrow").exists():
            assert process.poll() is None
            time.sleep(0.005)
        yield process
    finally:
        process.kill()


# --- what is written


@pytest.mark.parametrize("crop", ["center", "fast"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_those_of_the_folder_in_its_order(tmp_path, src, crop, channels):
    prepare(_options(src, tmp_path / "dst", crop=crop, channels=channels))
    folder = ClassFolder(src, 16, channels, crop)
    data = PreparedImages(tmp_path / "dst", 16, channels)
    assert len(data) == len(folder) == 14
    assert data.class_names == folder.class_names == ("ant", "bee")
    assert data.num_classes == 2
    np.testing.assert_array_equal(data.labels, folder.labels)
    assert data.labels.dtype == np.int64
    order = [13, 0, 4, 4, 7]
    assert_same([data.batch(order)], [folder.batch(order)])
    assert data.batch(order)[0].is_contiguous()
    assert torch.equal(data[9][0], folder[9][0])
    assert data[9][1] == 1
    assert [str(src / data.name(index)) for index in range(14)] == [folder.name(index) for index in range(14)]


def test_bytes_do_not_depend_on_the_place(tmp_path, src):
    (src / "ant" / "broken.jpg").write_bytes(b"")
    prepare(_options(src, tmp_path / "a"))
    src.rename(tmp_path / "moved")
    prepare(_options(tmp_path / "moved", tmp_path / "b"))
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_broken_images_are_left_out_and_reported(tmp_path, src):
    (src / "ant" / "000.jpg").write_bytes(b"")
    whole = (src / "bee" / "006.jpg").read_bytes()
    (src / "bee" / "006.jpg").write_bytes(whole[: len(whole) // 2])
    line = prepare(_options(src, tmp_path / "dst"))
    assert line.startswith(f"12 images in {tmp_path / 'dst'}; 2 cannot be read, see ")
    report = [json.loads(entry) for entry in (tmp_path / "dst" / "report.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in report] == ["ant/000.jpg", "bee/006.jpg"]
    assert report[0]["reason"] == "the file is empty"
    assert "runcated" in report[1]["reason"]
    data, folder = PreparedImages(tmp_path / "dst", 16), ClassFolder(src, 16)
    assert torch.equal(data.batch(range(12))[0], folder.batch(range(1, 13))[0])
    np.testing.assert_array_equal(data.labels, folder.labels[1:13])


def test_too_many_broken_images(tmp_path, src):
    for index in range(3):
        (src / "bee" / f"{index:03d}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3 of 14 images cannot be read, more than --max-broken 0\.2 allows"):
        prepare(_options(src, tmp_path / "dst"))
    report = (tmp_path / "dst" / "report.jsonl").read_text().splitlines()
    assert json.loads(report[0]) == {"path": "bee/000.jpg", "reason": "not an image of a known kind"}
    with pytest.raises(UserError, match="is incomplete: it has no manifest"):
        PreparedImages(tmp_path / "dst", 16)
    prepare(_options(src, tmp_path / "dst", max_broken=0.5))  # continues
    assert len(PreparedImages(tmp_path / "dst", 16)) == 11
    for index in range(4):  # all of a shard
        (src / "ant" / f"{index:03d}.jpg").write_bytes(b"")
    prepare(_options(src, tmp_path / "other", max_broken=0.5))
    data = PreparedImages(tmp_path / "other", 16)
    assert len(data) == 7 and data.name(0) == "ant/004.jpg"
    for path in src.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="14 of 14 images cannot be read"):
        prepare(_options(src, tmp_path / "none", max_broken=1.0))


def test_parquet_of_the_hub_library(tmp_path, src):
    datasets = pytest.importorskip("datasets")
    paths = sorted(src.rglob("*.jpg"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [index // 7 for index in range(14)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    prepare(_options(tmp_path / "rows.parquet", tmp_path / "dst", name="hf"))
    data = PreparedImages(tmp_path / "dst", 16)
    assert data.class_names == ("x", "y")
    assert torch.equal(data.batch(range(14))[0], ClassFolder(src, 16).batch(range(14))[0])


# --- stopped and continued


def test_workers_and_a_kill_change_no_byte(tmp_path):
    src = _fill(tmp_path / "src", per_class=600, side=(200, 150))
    (src / "ant" / "100.jpg").write_bytes(b"")
    options = {"resolution": 32, "shard_size": 100}  # a shard is decoded in two parts
    prepare(_options(src, tmp_path / "a", **options))
    dst = tmp_path / "b"
    sizes = ["--resolution", "32", "--shard-size", "100"]
    with _command(tmp_path, src, dst, *sizes, "--workers", "2") as process:
        process.kill()
        process.wait(60)
    assert not (dst / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in dst.glob("shard-*.arrow")}
    assert 2 <= len(kept) < 12
    prepare(_options(src, dst, **options))
    assert {name: (dst / name).stat().st_mtime_ns for name in kept} == kept
    assert _files(tmp_path / "a") == _files(dst)


def test_damaged_and_missing_shards_are_written_again(tmp_path, src):
    dst = tmp_path / "dst"
    prepare(_options(src, dst))
    before = _files(dst)
    (dst / "shard-00000.arrow").write_bytes(before["shard-00000.arrow"][:-100])
    (dst / "shard-00001.arrow").unlink()
    (dst / "shard-00002.arrow").write_bytes(before["shard-00003.arrow"])
    prepare(_options(src, dst))
    assert _files(dst) == before


def test_complete_folder_is_left_alone(tmp_path, src):
    prepare(_options(src, tmp_path / "dst"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").glob("shard*")}
    assert prepare(_options(src, tmp_path / "dst")) == f"14 images in {tmp_path / 'dst'}"
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_interrupt_ends_the_workers_and_keeps_shards(tmp_path):
    src = _fill(tmp_path / "src", per_class=200, side=(200, 150))
    dst = tmp_path / "dst"
    sizes = ["--resolution", "64", "--shard-size", "10", "--workers", "1"]
    with _command(tmp_path, src, dst, *sizes) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
    errors = (tmp_path / "errors").read_text()
    assert errors.splitlines()[-1] == "pixelgen.data.prepare: interrupted"
    assert "Traceback" not in errors
    for _ in range(200):  # no process is left; multiprocessing's own helper takes a moment to end
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")


def test_full_disk_is_one_line_and_leaves_finished_shards(tmp_path, monkeypatch):
    src, dst = _fill(tmp_path / "src", per_class=4), tmp_path / "dst"
    write, limits = ShardFolder.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, number, chunks):
        # The third shard is larger than a file may become: the system refuses as it does on a full disk.
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if number == 2 else limits[0], limits[1]))
            write(self, number, chunks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "write", limited)
        with pytest.raises(UserError) as raised:
            prepare(_options(src, dst, resolution=32, shard_size=2))
    message = str(raised.value)
    assert message.startswith(f"cannot write {dst / 'shard-00002.arrow'}: ")
    assert "File too large" in message
    assert "give the command again" in message
    assert "\n" not in message
    names = sorted(path.name for path in dst.iterdir())
    assert names == ["settings.json", "shard-00000.arrow", "shard-00001.arrow"]
    prepare(_options(src, dst, resolution=32, shard_size=2))
    assert len(PreparedImages(dst, 32)) == 8


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 8}, "was made with resolution 16, not 8; choose another folder"),
        ({"crop": "fast"}, "was made with crop center, not fast"),
        ({"channels": 1}, "was made with channels 3, not 1"),
        ({"shard_size": 5}, "was made with shard_size 4, not 5"),
    ],
)
def test_other_settings_are_refused(tmp_path, src, changes, message):
    prepare(_options(src, tmp_path / "dst"))
    before = _files(tmp_path / "dst")
    with pytest.raises(UserError, match=message):
        prepare(_options(src, tmp_path / "dst", **changes))
    assert _files(tmp_path / "dst") == before


def test_other_sources_and_foreign_folders_are_refused(tmp_path, src):
    prepare(_options(src, tmp_path / "dst"))
    (src / "ant" / "000.jpg").rename(src / "ant" / "0000.jpg")
    with pytest.raises(UserError, match="was made from another source; choose another folder"):
        prepare(_options(src, tmp_path / "dst"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(UserError, match="is not empty and was not made by this command"):
        prepare(_options(src, tmp_path / "foreign"))
    with pytest.raises(FileNotFoundError, match="does not exist; a data set of the hub needs --name hf"):
        prepare(_options(tmp_path / "none", tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "dst"), [("folder", "."), ("hf", "dst"), ("hf", "ant/deep/dst"), ("folder", "link/dst")]
)
def test_dst_in_src_is_refused(tmp_path, src, name, dst):
    (tmp_path / "link").symlink_to(src)
    dst = tmp_path / dst if dst.startswith("link") else src / dst
    before = sorted(tmp_path.rglob("*"))
    message = rf"^DST {dst} lies in SRC {src} and would be read as a part of it; [^\n]+$"
    with pytest.raises(UserError, match=message):
        prepare(_options(src, dst, name=name))
    assert sorted(tmp_path.rglob("*")) == before
    prepare(_options(src, f"{src}-256"))  # a name that only begins the same


def test_dst_that_is_a_file(tmp_path, src):
    (tmp_path / "file").touch()
    for dst in (tmp_path / "file", tmp_path / "file" / "dst"):
        message = rf"^{dst} is no folder, or lies in a file; choose another folder$"
        with pytest.raises(UserError, match=message):
            prepare(_options(src, dst))


@pytest.mark.parametrize("is_there", [False, True])
def test_read_only_dst(tmp_path, src, monkeypatch, is_there):
    dst = tmp_path / "dst"
    if is_there:
        dst.mkdir()

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    open_file = Path.open
    # A file system that takes no writes says so of the removal of a file that is not there, too.
    monkeypatch.setattr(Path, "unlink", refuse)

    def open_to_read(path, mode="r", *arguments, **options):
        return (refuse if "w" in mode else open_file)(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_to_read)
    if not is_there:
        monkeypatch.setattr(Path, "mkdir", refuse)
    message = rf"^cannot write to folder {dst}: Read-only file system; choose another folder$"
    with pytest.raises(UserError, match=message):
        prepare(_options(src, dst))


def test_images_of_very_unequal_sides_are_broken(tmp_path, src):
    Image.new("RGB", (1, 60_000)).save(src / "ant" / "000.jpg", "PNG")
    for crop in ("center", "fast"):
        line = prepare(_options(src, tmp_path / crop, resolution=128, crop=crop))
        assert "1 cannot be read" in line
        report = json.loads((tmp_path / crop / "report.jsonl").read_text())
        assert report == {"path": "ant/000.jpg", "reason": "its sides are too unequal, 1 x 60000"}


def test_two_commands_at_once(tmp_path, src):
    options = _options(src, tmp_path / "dst")
    with (
        closing(ShardFolder(tmp_path / "dst", describe(open_source(options), options))),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        prepare(options)
    prepare(options)


def test_command_line(tmp_path, src, capsys):
    argv = ["--resolution", "16", str(src), "--workers=0", str(tmp_path / "dst")]
    assert main(argv) == 0
    assert f"14 images in {tmp_path / 'dst'}" in capsys.readouterr().out
    assert "Missing from python -m pixelgen.data.prepare: DST" in refused(capsys, main, ["a"])
    assert "Unrecognized options: c" in refused(capsys, main, ["a", "b", "c"])
    error = refused(capsys, main, ["a", "b", "--resolutoin", "8"])
    assert "--resolutoin, 8 Perhaps you meant: --resolution integer" in error


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("resolution", 0, "--resolution must be at least 1, got 0"),
        ("channels", 2, r"--channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ("workers", -1, "--workers must be 0 or more, got -1"),
        ("shard_size", 0, "--shard-size must be at least 1, got 0"),
        ("max_broken", 1.5, r"--max-broken must lie in \[0, 1\], got 1\.5"),
    ],
)
def test_options_out_of_range(name, value, message):
    with pytest.raises(UserError, match=message):
        PrepareOptions(src="a", dst="b", **{name: value})


def test_default_shards_are_256_mib():
    assert PrepareOptions(src="a", dst="b", resolution=256).rows == 2**28 // (3 * 256 * 256)
    assert PrepareOptions(src="a", dst="b", resolution=8, channels=1).rows == 2**16
    assert PrepareOptions(src="a", dst="b", resolution=20_000).rows == 1


# --- the data set


@pytest.fixture
def prepared(tmp_path, src):
    prepare(_options(src, tmp_path / "dst"))
    return tmp_path / "dst"


def test_batches_are_copies_of_mapped_files(prepared):
    data = PreparedImages(prepared, 16)
    images, _ = data.batch([0])
    images.zero_()
    assert data.batch([0])[0].any()
    assert len(data.batch([])[0]) == 0
    for index in (14, -1):
        with pytest.raises(IndexError, match=r"indices must lie in \[0, 14\)"):
            data.batch([index])


def test_mapped_files_are_not_sent_to_a_worker(prepared):
    data = PreparedImages(prepared, 16)
    sent = pickle.dumps(data)
    assert len(sent) < 14 * 3 * 16 * 16
    assert torch.equal(pickle.loads(sent).batch([13, 2])[0], data.batch([13, 2])[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_reads_prepared_images(prepared, workers):
    data = PreparedImages(prepared, 16)
    loader = build_loader(data, 5, seed=1, num_workers=workers)
    folder = build_loader(ClassFolder(prepared.parent / "src", 16), 5, seed=1)
    try:
        for _ in range(4):
            assert_same([pair(next(loader))], [pair(next(folder))])
    finally:
        loader.close()
        folder.close()


def test_a_process_that_shares_nothing_reads_prepared_images(prepared):
    data = PreparedImages(prepared, 16)
    with torch.multiprocessing.get_context("forkserver").Pool(1) as pool:
        batch = pool.apply(data.batch, ([3, 9],))
    assert_same([batch], [data.batch([3, 9])])


def test_prepared_errors(prepared, tmp_path):
    with pytest.raises(UserError, match=r"resolution 16 but image_size is 32; set --data\.image_size 16"):
        PreparedImages(prepared, 32)
    with pytest.raises(UserError, match=r"channels 3 but channels is 1; set --data\.channels 3"):
        PreparedImages(prepared, 16, 1)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PreparedImages(tmp_path / "none", 16)
    with pytest.raises(UserError, match=r"was not written by pixelgen\.data\.prepare"):
        PreparedImages(tmp_path / "src", 16)


def _cut(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-00001.arrow", Path.unlink, r"shard-00001\.arrow is missing; give the command"),
        ("shard-00001.arrow", _cut, r"shard-00001\.arrow must have \d+ bytes, got \d+; give"),
        ("shard-00001.arrow", _flip, r"cannot read shard .*shard-00001\.arrow"),
        ("manifest.json", Path.unlink, r"is incomplete: it has no manifest\.json"),
        ("manifest.json", _cut, r"manifest\.json is damaged"),
        ("manifest.json", lambda path: path.write_text("{}"), "must have format 1, got None"),
    ],
)
def test_damaged_folder(prepared, name, damage, message):
    damage(prepared / name)
    with pytest.raises(UserError, match=message):
        PreparedImages(prepared, 16)


def test_preparing_holds_no_more_than_a_few_shards(tmp_path):
    # 64 images of 768 KiB in shards of two: all together would be 48 MiB.
    src = _fill(tmp_path / "src", classes=("a",), per_class=1, side=(64, 64))
    for index in range(1, 64):
        shutil.copy(src / "a" / "000.jpg", src / "a" / f"{index:03d}.jpg")
    prepare(_options(src, tmp_path / "warm", resolution=512, shard_size=2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare(_options(src, tmp_path / "dst", resolution=512, shard_size=2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB


def test_png_with_a_name_that_is_no_text(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(file, "PNG")
    (Path(os.fsdecode(os.fsencode(tmp_path / "src" / "a") + b"/\xff.png"))).write_bytes(file.getvalue())
    prepare(_options(tmp_path / "src", tmp_path / "dst", resolution=8))
    data = PreparedImages(tmp_path / "dst", 8)
    assert data.name(0) == "a/\\xff.png"
    assert data[0][0][:, 0, 0].tolist() == [1, 2, 3]
