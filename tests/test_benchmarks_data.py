"""The suite of the data: what it writes, and that a provider that is wrong is not timed."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are not installed
from benchmarks import data, report, tables
from benchmarks.__main__ import main

SMALL = data.Size(image_size=32, sides=((60, 45), (120, 90)), pictures=2, copies=4, batches=1)
OPTIONS = ["--suite", "data", "--repeats", "3", "--batch", "4"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(data, "Size", lambda: SMALL)
    monkeypatch.setattr(data, "worker_counts", lambda: [0])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_rows_table_and_plot(tmp_path, capsys):
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "data.csv")
    assert tuple(rows[0]) == report.DATA.columns
    found = {(row["op"], row["shape"].split()[0], row["provider"]) for row in rows}
    assert found == {
        *(("decode", shape, name) for shape in ("60x45", "120x90") for name in data.DECODERS),
        *(("decode", "60x45", name) for name in data.READERS),
        *(("loader", "workers=0", name) for name in data.LOADERS),
    }
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]), row
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["median_ms"]), rel=1e-2)
        bound = {"torchvision": 2, "fast": 2, "folder_fast": 2, "dct": 255}.get(row["provider"], 0)
        assert int(row["levels"]) <= bound, row
    table = (tmp_path / "data.md").read_text()
    assert "| 60x45 to 32 | prepared_random |" in table
    assert "| workers=0 B=4 32 | folder_fast |" in table
    assert (tmp_path / "data.png").stat().st_size > 10_000
    assert "decode 60x45 to 32: pil " in capsys.readouterr().out


def test_only_providers_that_are_asked_for_and_what_they_are_held_against(tmp_path):
    assert main([*OPTIONS, "--providers", "fast,prepared", "--out", str(tmp_path)]) == 0
    names = {(row["op"], row["provider"]) for row in read(tmp_path / "data.csv")}
    assert names == {
        *(("decode", name) for name in ("pil", "fast", "prepared")),
        *(("loader", name) for name in ("folder", "prepared")),
    }


def test_a_crop_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    decode = data.decode

    def wrong(provider, picture, size):
        pixels = decode(provider, picture, size)
        return pixels ^ 1 if provider == "center" else pixels ^ 4 if provider == "fast" else pixels

    monkeypatch.setattr(data, "decode", wrong)
    assert main([*OPTIONS, "--providers", "center,fast,torchvision", "--out", str(tmp_path)]) == 1
    assert {row["provider"] for row in read(tmp_path / "data.csv") if row["op"] == "decode"} == {
        "pil",
        "torchvision",
    }
    told = capsys.readouterr()
    assert "60x45 to 32: center is 1 grey levels off and not timed" in told.out + told.err


def test_shards_that_are_wrong_are_not_timed(tmp_path, monkeypatch):
    batch = data.PreparedImages.batch

    def wrong(self, indices):
        images, labels = batch(self, indices)
        return images.flip(-1), labels

    monkeypatch.setattr(data.PreparedImages, "batch", wrong)
    assert main([*OPTIONS, "--providers", "prepared", "--out", str(tmp_path)]) == 1
    assert {row["provider"] for row in read(tmp_path / "data.csv")} == {"pil", "folder"}


def test_pictures_are_reproducible_and_natural():
    picture = data.natural(60, 45, 3)
    assert picture == data.natural(60, 45, 3) != data.natural(60, 45, 4)
    pixels = data.decode("center", picture, 32).astype(int)
    # Neighbours resemble each other, and the levels are used.
    assert np.abs(np.diff(pixels)).mean() < pixels.std() / 2
    assert pixels.std() > 30


def test_ratios_are_against_the_baseline():
    common = dict.fromkeys(report.SETTING, "x")
    rows = [
        {"op": "decode", "provider": name, "shape": "s", "median_ms": ms, "images_per_s": "1", **common}
        for name, ms in (("pil", "6"), ("fast", "2"))
    ]
    assert tables.data_ratios(rows) == "decode s: pil 1 img/s 1.00x, fast 1 img/s 3.00x"


def test_only_the_cpu(tmp_path, capsys):
    assert main(["--suite", "data", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device must be cpu with --suite data" in capsys.readouterr().err
