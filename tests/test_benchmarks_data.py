"""The suite of the data: what it writes, and that a provider that is wrong is not timed."""

from pathlib import Path

import numpy as np
import pytest
from benchmarking import Rows, assert_are_plots, bench, named

from benchmarks.suites import data

SMALL = data.Size(image_size=32, sides=((60, 45), (120, 90)), pictures=2, copies=4, batches=1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(data, "Size", lambda: SMALL)
    monkeypatch.setattr(data, "worker_counts", lambda: [0])


def run(out: Path, providers: str = "") -> tuple[int, Rows]:
    return bench("data", out, "--batch", "4", *(["--providers", providers] if providers else []))


def test_a_run_writes_rows_table_and_plot(tmp_path, capsys):
    code, rows = run(tmp_path)
    assert code == 0
    assert {(row["case"], row["shape"].split()[0], row["provider"]) for row in rows} == {
        *(("decode", shape, name) for shape in ("60x45", "120x90") for name in data.DECODERS),
        *(("decode", "60x45", name) for name in data.READERS),
        *(("loader", "workers=0", name) for name in data.LOADERS),
    }
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["median_ms"]), rel=1e-2)
        bound = {"torchvision": 2, "fast": 2, "folder_fast": 2, "dct": 255}.get(row["provider"], 0)
        assert int(row["levels"]) <= bound, row
    table = (tmp_path / "data.md").read_text()
    assert "| decode | 60x45 to 32 | prepared_random |" in table
    assert "| loader | workers=0 B=4 32 | folder_fast |" in table
    assert_are_plots(tmp_path, "data.png")
    assert "| decode | 60x45 to 32 | pil |" in capsys.readouterr().out


def test_only_providers_that_are_asked_for_and_what_they_are_held_against(tmp_path):
    code, rows = run(tmp_path, "fast,prepared")
    assert code == 0
    assert named(rows, "case", "provider") == {
        *(("decode", name) for name in ("pil", "fast", "prepared")),
        *(("loader", name) for name in ("folder", "prepared")),
    }


def test_a_crop_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    decode = data.decode

    def wrong(provider, picture, size):
        pixels = decode(provider, picture, size)
        return pixels ^ 1 if provider == "center" else pixels ^ 4 if provider == "fast" else pixels

    monkeypatch.setattr(data, "decode", wrong)
    code, rows = run(tmp_path, "center,fast,torchvision")
    assert code == 1
    decoders = named([row for row in rows if row["case"] == "decode"], "provider")
    assert decoders == {("pil",), ("torchvision",)}
    told = capsys.readouterr()
    assert "60x45 to 32: center is wrong and not timed: it is 1 grey levels off" in told.out + told.err


def test_shards_that_are_wrong_are_not_timed(tmp_path, monkeypatch):
    read = data.PreparedImages.read

    def wrong(self, order, draws):
        found = read(self, order, draws)
        return found._replace(images=found.images[..., ::-1].copy())

    monkeypatch.setattr(data.PreparedImages, "read", wrong)
    code, rows = run(tmp_path, "prepared")
    assert code == 1
    assert named(rows, "provider") == {("pil",), ("folder",)}


def test_pictures_are_reproducible_and_natural():
    picture = data.natural(60, 45, 3)
    assert picture == data.natural(60, 45, 3) != data.natural(60, 45, 4)
    pixels = data.decode("center", picture, 32).astype(int)
    # Neighbours resemble each other, and the levels are used.
    assert np.abs(np.diff(pixels)).mean() < pixels.std() / 2
    assert pixels.std() > 30
