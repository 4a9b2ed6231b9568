"""The suite of the run: what it writes, and that what is wrong is not told as a time."""

from pathlib import Path

import pytest
from benchmarking import assert_are_plots, bench, named

from benchmarks import processes
from benchmarks.suites import train
from pixelgen.data.sources.prepared import PreparedImages
from pixelgen.training.step import Trainer

TINY = (
    *(*train.SMALL, "--data.image_size", "32", "--data.num_classes", "2"),
    *("--model.width", "32", "--model.heads", "2"),
)
SIZE = train.Size(
    model="tiny",
    options=(*TINY, "--model.patch_size", "8"),
    batch=4,
    saved=TINY,
    saved_batch=2,
    workers=(0,),
    lines=5,
    rounds=1,
    pictures=2,
    copies=2,
    checked=3,
    saves=2,
    repeats=3,
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(train.SIZES, "cpu", SIZE)


def run(out: Path, only: str) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """The exit code, and (case, provider) -> row."""
    code, rows = bench("train", out, "--only", only)
    return code, {(row["case"], row["provider"]): row for row in rows}


def test_steps_and_saves_give_rows_table_and_plot(tmp_path):
    code, rows = run(tmp_path, "step,save")
    assert code == 0
    assert set(rows) == {
        *(("step", name) for name in ("synthetic", "folder", "prepared")),
        *(("save", name) for name in ("sync", "async", "async_first")),
        *(("beside", name) for name in ("alone", "saving")),
    }
    for (case, provider), row in rows.items():
        assert row["threads"] == "1"
        if case == "step":
            assert 0 <= float(row["data_wait"]) <= 1
        if case == "save":
            share = float(row["stall_share"])
            assert share == 1 if provider == "sync" else 0 < share < 1, row
    assert rows["step", "folder"]["loss"] == rows["step", "prepared"]["loss"]
    assert rows["step", "folder"]["loss"] != rows["step", "synthetic"]["loss"]
    assert float(rows["step", "folder"]["data_wait"]) > float(rows["step", "synthetic"]["data_wait"])
    assert "| step | tiny B=4 workers=0 | prepared |" in (tmp_path / "train.md").read_text()
    assert_are_plots(tmp_path, "train.png")


def test_processes_are_held_against_one_and_against_the_formula(tmp_path, monkeypatch, capsys):
    # Beside the modes one that computes something else, and one of which the formula says something else.
    monkeypatch.setitem(train.MODES, "noisy", (*train.MODES["ddp"], "--time.noise_scale", "1.5"))
    monkeypatch.setitem(train.MODES, "silent", (*train.MODES["ddp"], "--parallel.prefetch", "2"))
    communication = train.communication

    def other(config, parameters, layout):
        sent, formula = communication(config, parameters, layout)
        return (sent if config.parallel.prefetch == 1 else 0.5 * sent), formula

    monkeypatch.setattr(train, "communication", other)
    code, rows = run(tmp_path, "processes")
    assert code == 1
    assert set(rows) == {("processes", name) for name in ("one", "ddp", "fsdp")}
    told = capsys.readouterr()
    told = told.out + told.err
    assert "processes=2: noisy is wrong and not timed: the loss of step " in told
    assert "processes=2: silent is wrong and not timed: it sends" in told
    one, ddp, fsdp = (rows["processes", name] for name in ("one", "ddp", "fsdp"))
    assert float(one["sent_mb"]) == float(one["formula_mb"]) == 0
    assert float(ddp["sent_mb"]) == pytest.approx(float(ddp["formula_mb"]), rel=1e-3)
    assert float(ddp["sent_mb"]) < float(fsdp["sent_mb"]) <= 1.02 * float(fsdp["formula_mb"])
    for row in (ddp, fsdp):
        assert float(row["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)


def test_shards_that_are_wrong_are_not_written(tmp_path, monkeypatch):
    read = PreparedImages.read

    def mirrored(self, order, draws):
        found = read(self, order, draws)
        return found._replace(images=found.images[..., ::-1].copy())

    monkeypatch.setattr(PreparedImages, "read", mirrored)
    code, rows = run(tmp_path, "step")
    assert code == 1
    assert set(rows) == {("step", "synthetic"), ("step", "folder")}


def test_checkpoints_that_are_not_the_state_are_not_written(tmp_path, monkeypatch):
    state_dict = Trainer.state_dict

    def other(self):
        state = state_dict(self)
        return state | {"model": {name: value + 1 for name, value in state["model"].items()}}

    monkeypatch.setattr(Trainer, "state_dict", other)
    code, rows = run(tmp_path, "save")
    assert code == 1
    assert named(list(rows.values()), "case") == {("beside",)}


def test_what_is_wrong():
    assert processes.wrong_losses([1.0, 2.0], [1.0, 2.00001]) is None
    assert "step 2 is 2, that of one process 2.0001" in processes.wrong_losses([1.0, 2.0], [1.0, 2.0001])
    assert "step 1" in processes.wrong_losses([float("nan")], [1.0])
    assert train.wrong_bytes(0.0, 0.0) is None
    for sent in (0.7e6, 1.1e6):
        assert "by the formula" in train.wrong_bytes(sent, 1e6)
