"""The suite of one pixel block: every provider computes the same, and what does not is not timed."""

import re
from dataclasses import replace

import pytest
import torch
from benchmarking import bench

from benchmarks.suites import pixel_block

SMALL = replace(pixel_block.CONFIG, width=48, heads=2, patch_size=4, image_size=16)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pixel_block, "CONFIG", SMALL)


@pytest.mark.parametrize("mode", pixel_block.MODES)
def test_all_providers_have_the_same_gradients(mode):
    results = {}
    for provider in ("eager", "ours", "ours_recomputed"):
        runner = pixel_block.Runner(torch.device("cpu"), provider, 2)
        leaves = getattr(runner, f"prepare_{mode}")()
        results[provider] = getattr(runner, f"run_{mode}")(leaves)
    # in the place of the kinds that an op does not read stands what it was given
    mine = {"pixel_modulate": slice(0, 2), "pixel_mlp": slice(2, 6)}.get(mode, slice(0, 6))
    for name in ("ours", "ours_recomputed"):
        for got, want in zip(results[name], results["eager"], strict=True):
            if got.shape[-1] == 6 * SMALL.pixel_width:
                got, want = (g.unflatten(-1, (6, -1))[..., mine, :] for g in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_rows_are_written_and_what_is_wrong_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(pixel_block.PROVIDERS, "compile", ("eager", False, False))
    made = pixel_block.Runner.__init__

    def make(runner, device, provider, batch):
        made(runner, device, provider, batch)
        if provider == "compile":
            runner.x = runner.x * 1.01

    monkeypatch.setattr(pixel_block.Runner, "__init__", make)
    options = ["--providers", "compile,ours,eager", "--batch", "1", "--repeats", "3"]
    code, rows = bench("pixel_block", tmp_path, *options)
    assert code == 1
    told = capsys.readouterr()
    assert re.search("compile is wrong and not timed: output is off by", told.out + told.err)
    assert {(row["mode"], row["provider"]) for row in rows} == {
        (mode, provider) for mode in pixel_block.MODES for provider in ("eager", "ours")
    }
    assert all(float(row["median_ms"]) > 0 for row in rows)
