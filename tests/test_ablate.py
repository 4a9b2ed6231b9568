"""The grid of loss terms: what it writes, that it is continued and not run again, and how it sums up."""

import csv
import os
import signal
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from pixelgen import ablate
from pixelgen.ablate import KEY, Cell
from pixelgen.ablation import FIGURES, ROWS, Study, Table
from pixelgen.encoders import embedded
from pixelgen.encoders.embedded import FILE_NAME
from pixelgen.errors import UserError
from pixelgen.trainer import Trainer

QUICK = ["--device", "cpu", "--steps", "4", "--sample-steps", "1", "--seeds", "0"]


def read(out: Path) -> list[dict[str, str]]:
    with (out / "ablation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """Seeds whose features were asked for; what is handed out is untrained."""
    seeds = []

    def train(config, images, labels):
        seeds.append(config.seed)
        features = embedded.EmbeddedFeatures(config)
        features.freeze()
        return features

    monkeypatch.setattr(embedded, "train_embedded", train)
    return seeds


def test_a_grid_is_run_once_and_grows(tmp_path, trainings, monkeypatch, capsys):
    out = tmp_path / "grid"
    assert ablate.main([*QUICK, "--rows", "flow,repa,lpips", "--out", str(out)]) == 0
    rows = read(out)
    assert tuple(rows[0]) == (*KEY, *FIGURES)
    assert [row["row"] for row in rows] == ["flow", "repa", "lpips"]
    for row in rows:
        assert (row["seed"], row["steps"], row["sample_steps"]) == ("0", "4", "1")
        assert float(row["frechet"]) > 0 and 0 <= float(row["accuracy"]) <= 1
        assert float(row["variance"]) > 0 and float(row["seconds_per_step"]) > 0
    assert trainings == [0]  # one set of features for all rows of a seed
    assert not (out / "runs" / "flow-4-seed0" / FILE_NAME).exists()
    shared = (out / "features" / "0" / FILE_NAME).read_bytes()
    assert (out / "runs" / "lpips-4-seed0" / FILE_NAME).read_bytes() == shared
    assert "`lpips` | + REPA + LPIPS |" in (out / "ablation.md").read_text()
    pixels = plt.imread(out / "ablation.png")
    assert pixels.shape[1] > 1000 and pixels.std() > 0.01
    told = capsys.readouterr().out
    assert "3 runs, 0 of them finished" in told and "2 of 3  repa-4-seed0: Frechet" in told
    assert "step 4 " not in told and "step 4 " in (out / "runs" / "repa-4-seed0.log").read_text()

    trained, train_step = [], Trainer.train_step
    monkeypatch.setattr(
        Trainer,
        "train_step",
        lambda self, *batch: trained.append(self.run_dir.name) or train_step(self, *batch),
    )
    assert ablate.main([*QUICK, "--rows", "no_repa,lpips,flow", "--out", str(out)]) == 0
    assert set(trained) == {"no_repa-4-seed0"}
    assert read(out)[:3] == rows and len(read(out)) == 4
    table = (out / "ablation.md").read_text()  # of the rows that were asked for, in their order
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == [
        "no_repa",
        "lpips",
        "flow",
    ]
    trained.clear()  # samples of a finished run are drawn anew without training it
    assert ablate.main([*QUICK, "--rows", "flow", "--out", str(out), "--sample-steps", "2"]) == 0
    assert not trained and len(read(out)) == 5


def test_a_grid_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    argv = [*QUICK, "--rows", "flow", "--out"]
    assert ablate.main([*argv, str(tmp_path / "undisturbed")]) == 0
    train_step = Trainer.train_step

    def interrupted(self, *batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert ablate.main([*argv, str(tmp_path / "stopped")]) == 128 + signal.SIGINT
    assert not (tmp_path / "stopped" / "ablation.csv").exists()
    steps = []
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, *batch: steps.append(self.step) or train_step(self, *batch)
    )
    assert ablate.main([*argv, str(tmp_path / "stopped")]) == 0
    assert steps == [3]
    (undisturbed,), (stopped,) = read(tmp_path / "undisturbed"), read(tmp_path / "stopped")
    for column in ("frechet", "accuracy", "variance"):
        assert undisturbed[column] == stopped[column]


def test_a_run_without_a_checkpoint_starts_anew(tmp_path):
    (tmp_path / "runs" / "flow-4-seed0").mkdir(parents=True)
    assert ablate.main([*QUICK, "--rows", "flow", "--out", str(tmp_path)]) == 0
    assert len(read(tmp_path)) == 1


def test_a_run_of_another_row_is_not_taken_for_this_one(tmp_path, monkeypatch):
    argv = [*QUICK, "--rows", "flow", "--out", str(tmp_path)]
    assert ablate.main(argv) == 0
    monkeypatch.setitem(ROWS, "flow", Study(label="x", alignment=0, lpips=0, p_dino=0.5, paper_fid=1))
    with pytest.raises(UserError, match="runs/flow-4-seed0 was trained with other options; choose another"):
        ablate.main(argv)


def test_a_file_that_is_no_grid_is_refused(tmp_path):
    (tmp_path / "ablation.csv").write_text("row,fid\nflow,3\n")
    with pytest.raises(
        UserError, match=r"ablation\.csv: the columns must be row,seed,.*got \['row', 'fid'\]"
    ):
        ablate.main([*QUICK, "--rows", "flow", "--out", str(tmp_path)])


def test_rows_differ_in_their_terms_alone():
    configs = {row: Cell(row=row, seed="3", steps=60, sample_steps=2).config("cpu", 0) for row in ROWS}
    terms = {
        row: (
            c.loss.alignment_weight,
            c.loss.lpips_weight,
            c.loss.p_dino_weight,
            c.loss.gate_t,
            c.loss.gate,
        )
        for row, c in configs.items()
    }
    assert len(set(terms.values())) == len(ROWS)
    assert terms["flow"][:3] == (0, 0, 0)
    assert terms["repa"][:3] == (0.5, 0, 0)
    assert terms["p_dino"] == (0.5, 0.1, 0.01, 0, "hard")
    assert terms["gate_0.3"] == (0.5, 0.1, 0.01, 0.3, "hard")
    assert terms["no_repa"] == (0, 0.1, 0.01, 0.3, "hard")
    assert {(c.seed, c.train.max_steps, c.train.sample_every) for c in configs.values()} == {(3, 60, 0)}
    assert terms["gate_cosine"] == (0.5, 0.1, 0.01, 0.3, "cosine")
    same = {(c.model, c.data, c.time, c.optimizer, c.ema) for c in configs.values()}
    assert len(same) == 1


def line(row: str, seed: str, frechet: float) -> dict[str, str]:
    rest = {"accuracy": "0.5", "variance": "0.25", "seconds_per_step": "0.1"}
    return {"row": row, "seed": seed, "frechet": str(frechet), **rest}


def test_means_deviations_and_gains():
    table = Table(
        [
            *(line("flow", seed, value) for seed, value in zip("012", (10.0, 20.0, 30.0), strict=True)),
            *(line("repa", seed, value) for seed, value in zip("210", (27.0, 14.0, 10.0), strict=True)),
        ]
    )
    assert (table.mean("flow", "frechet"), table.deviation("flow", "frechet")) == (20, 10)
    assert table.gain("repa", "flow") == "-3.0, 2 of 3"  # by seed: 0, -6, -3
    assert table.gain("flow", "flow") == ""
    text = table.markdown(7, 9)
    assert "Digits, 7 steps; number of seeds: 3;" in text and "9 Heun steps" in text
    same = "0.5000 ± 0.0000 | 0.250 ± 0.000 | 0.1000 ± 0.0000"
    assert f"| `flow` | flow matching alone | 20.0 ± 10.0 | {same} |  | +3.0, 0 of 3 | 34.85 |" in text


def test_a_row_that_the_paper_does_not_have():
    row = Table([line("gate_snr", "0", 12.5)]).markdown(7, 9).splitlines()[-1]
    assert row.endswith("| 0.1000 |  |  |  |")


def test_one_seed_has_no_deviation():
    table = Table([line("lpips", "0", 12.5)])
    assert table.deviation("lpips", "frechet") is None
    row = table.markdown(7, 9).splitlines()[-1]
    assert row == "| `lpips` | + REPA + LPIPS | 12.5 | 0.5000 | 0.250 | 0.1000 |  |  | 10.00 |"


def test_the_plot_shows_every_seed_and_the_means():
    table = Table([line("flow", "0", 10), line("flow", "1", 20), line("repa", "0", 5), line("repa", "1", 7)])
    panel = table.draw(7).axes[0]
    points = [tuple(drawn.get_xdata()) for drawn in panel.lines if len(drawn.get_xdata()) == 2]
    assert points[0] == (10, 20) and (5, 7) in points
    means = [container.lines[0].get_xdata()[0] for container in panel.containers]
    assert means == [15, 6]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["flow matching alone", "+ REPA"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "flow,lpip"], "--rows must be some of flow, repa, .*, got 'lpip'"),
        (["--seeds", "0,-1"], "--seeds must be whole numbers separated by commas, got '0,-1'"),
        (["--seeds", ""], "--seeds must be whole numbers separated by commas, got ''"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--sample-steps", "0"], "--sample-steps must be at least 1, got 0"),
        (["--device", "gpu"], "--device must be one of auto, cpu, cuda, got 'gpu'"),
    ],
)
def test_wrong_options(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        ablate.main([*options, "--out", str(tmp_path / "grid")])
    assert not (tmp_path / "grid").exists()
