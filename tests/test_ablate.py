"""The grid of loss terms: what it writes, that it is continued and not run again, and how it sums up."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import ablate
import matplotlib.pyplot as plt
import pytest
from ablate import COLUMNS, Cell
from ablation import FIGURES, ROWS, TERM_ROWS, Study, Table
from training import refused, unframed

from pixelgen.config import LossConfig
from pixelgen.encoders import embedded
from pixelgen.encoders.embedded import FILE_NAME
from pixelgen.errors import UserError
from pixelgen.training.step import Trainer

pytestmark = pytest.mark.usefixtures("no_curves")

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
    assert ablate.main([*QUICK, "--rows", "flow,lpips", "--out", str(out)]) == 0
    rows = read(out)
    assert tuple(rows[0]) == COLUMNS and {row["failed"] for row in rows} == {""}
    assert [row["row"] for row in rows] == ["flow", "lpips"]
    for row in rows:
        assert (row["seed"], row["steps"], row["sample_steps"]) == ("0", "4", "1")
        assert float(row["frechet"]) > 0 and 0 <= float(row["accuracy"]) <= 1
        assert float(row["variance"]) > 0 and float(row["seconds_per_step"]) > 0
    assert trainings == [0]
    assert not (out / "runs" / "flow-4-seed0" / FILE_NAME).exists()
    shared = (out / "features" / "0" / FILE_NAME).read_bytes()
    assert (out / "runs" / "lpips-4-seed0" / FILE_NAME).read_bytes() == shared
    assert "`lpips` | + REPA + LPIPS |" in (out / "ablation.md").read_text()
    pixels = plt.imread(out / "ablation.png")
    assert pixels.shape[1] > 1000 and pixels.std() > 0.01
    told = capsys.readouterr().out
    assert "2 runs, 0 of them finished" in told and "2 of 2  lpips-4-seed0: Frechet" in told
    assert "step 4 " not in told and "step 4 " in (out / "runs" / "lpips-4-seed0.log").read_text()

    trained, train_step = [], Trainer.train_step
    monkeypatch.setattr(
        Trainer,
        "train_step",
        lambda self, *batch: trained.append(self.run_dir.name) or train_step(self, *batch),
    )
    assert ablate.main([*QUICK, "--rows", "no_repa,lpips", "--out", str(out)]) == 0
    assert set(trained) == {"no_repa-4-seed0"} and trainings == [0]  # one set of features for all of a seed
    assert read(out)[:2] == rows and len(read(out)) == 3
    table = (out / "ablation.md").read_text()  # of the rows that were asked for, in their order
    named = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert named == ["no_repa", "lpips"]
    trained.clear()  # samples of a finished run are drawn anew without training it
    assert ablate.main([*QUICK, "--rows", "flow", "--out", str(out), "--sample-steps", "2"]) == 0
    assert not trained and len(read(out)) == 4


def test_a_grid_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    argv = [*QUICK, "--rows", "flow", "--out"]
    (tmp_path / "undisturbed" / "runs" / "flow-4-seed0").mkdir(parents=True)  # without a checkpoint: anew
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
    log = (tmp_path / "stopped" / "runs" / "flow-4-seed0.log").read_text()
    before, _, after = log.partition("stopped by signal 2;")  # of the run that was stopped, then of the other
    assert "step 3 " in before and "step 4 " not in before and "step 4 " in after
    # a run of another row is not taken for this one
    monkeypatch.setitem(ROWS, "flow", Study(label="x", alignment=0, lpips=0, p_dino=0.5, paper_fid=1))
    with pytest.raises(UserError, match="runs/flow-4-seed0 was trained with other options; choose another"):
        ablate.main([*argv, str(tmp_path / "undisturbed")])


def test_a_file_that_is_no_grid_is_refused(tmp_path):
    (tmp_path / "ablation.csv").write_text("row,fid\nflow,3\n")
    with pytest.raises(
        UserError, match=r"ablation\.csv: the columns must be row,seed,.*got \['row', 'fid'\]"
    ):
        ablate.main([*QUICK, "--rows", "flow", "--out", str(tmp_path)])


KEY_CELLS = ",".join(("flow", "0", "4", "1", "x"))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (f"{KEY_CELLS},1,1,1,1,", None),
        (f"{KEY_CELLS},1,1,,1,", "line 3: variance must be a number, got ''"),
        (f"{KEY_CELLS},many,1,1,1,", "line 3: frechet must be a number, got 'many'"),
        (f"{KEY_CELLS},1,nan,1,1,", "line 3: accuracy must be a number, got 'nan'"),
        (f"{KEY_CELLS},1,1", "line 3: there must be 10 cells"),
        (f"{KEY_CELLS},1,1,1,1,,1", "line 3: there must be 10 cells"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, cells, said):
    path = tmp_path / "ablation.csv"
    path.write_text(f"{','.join(COLUMNS)}\n{KEY_CELLS},,,,,training stopped\n{cells}\n")
    if said is None:
        assert len(ablate.read_lines(path)) == 1  # the same cell: the last line counts
        return
    with pytest.raises(UserError) as caught:
        ablate.read_lines(path)
    assert str(caught.value) == f"{path}, {said}"


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "ablation.csv"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"ablation\.csv: not a CSV file: "):
        ablate.read_lines(path)


@pytest.fixture
def exploding(monkeypatch) -> list[str]:
    """Rows whose weights become NaN before their third step: repa, unless the list is changed."""
    rows, train_step = ["repa"], Trainer.train_step

    def explode(self, *batch):
        if self.run_dir.name.split("-")[0] in rows and self.step == 2:
            self.model.final_layer.linear.weight.data.fill_(float("nan"))
        return train_step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", explode)
    return rows


def test_a_run_that_fails_is_recorded_and_others_go_on(tmp_path, trainings, exploding, capsys, monkeypatch):
    argv = [*QUICK, "--rows", "repa,flow", "--out", str(tmp_path)]
    assert ablate.main(argv) == 1
    failed, finished = read(tmp_path)
    reason = failed["failed"]
    assert failed["row"] == "repa" and "training stopped at step 3" in reason
    assert {failed[column] for column in FIGURES} == {""}
    assert finished["row"] == "flow" and finished["failed"] == "" and float(finished["frechet"]) > 0
    told = capsys.readouterr()
    assert f"1 of 2  repa-4-seed0 failed: {reason}" in told.out
    assert "2 of 2  flow-4-seed0: Frechet" in told.out
    assert "1 of 2 runs failed: repa-4-seed0" in told.err
    assert reason in (tmp_path / "runs" / "repa-4-seed0.log").read_text()
    table = (tmp_path / "ablation.md").read_text()
    assert "| `repa` | + REPA (failed) | failed | failed | failed | failed |  |  | 23.67 |" in table
    assert f"`repa`, seed 0, failed: {reason}" in table

    exploding.clear()
    with monkeypatch.context() as patch:  # it would fail again: not tried
        patch.setattr(ablate, "run_cell", lambda *arguments: pytest.fail("run again"))
        assert ablate.main(argv) == 1
    assert "2 runs, 1 of them finished and 1 failed" in capsys.readouterr().out
    assert read(tmp_path) == [failed, finished]
    ablate.write_lines(tmp_path / "ablation.csv", [finished])  # as --help says
    shutil.rmtree(tmp_path / "runs" / "repa-4-seed0")
    assert ablate.main(argv) == 0
    assert [row["row"] for row in read(tmp_path)] == ["flow", "repa"]
    assert (tmp_path / "ablation.md").read_text().count("failed") == 0


def test_a_mistake_outside_training_stops_the_grid(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise UserError("no features")

    monkeypatch.setattr(embedded, "train_embedded", refuse)
    with pytest.raises(UserError, match="no features"):
        ablate.main([*QUICK, "--rows", "repa,flow", "--out", str(tmp_path)])
    assert not (tmp_path / "ablation.csv").exists()


def test_help_lists_the_rows(capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(row in text for row in ROWS) and "which are all that null takes" in text
    assert "delete its line in ablation.csv" in text


def test_it_is_run_as_a_file():
    root = Path(ablate.__file__).parents[2]

    def called(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=root, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    name = "examples/digits/ablate.py"
    code, told, _ = called(name, "--help")
    assert code == 0 and told.startswith(f"usage: python {name} [-h] [OPTIONS]\n")
    code, told, error = called(name, "--row", "flow")
    assert (code, told) == (2, "")
    assert "Unrecognized options: --row, flow Perhaps you meant: --rows " in unframed(error)
    assert f"python {name} --help" in unframed(error)
    code, told, error = called("-m", "pixelgen.ablate", "--rows", "flow")
    assert (code, told) == (2, "")
    assert error.startswith("pixelgen.ablate: error: ") and error.endswith(f": python {name}\n")
    assert error.count("\n") == 1


def test_rows_differ_in_their_terms_alone():
    configs = {row: Cell(row=row, seed="3", steps=60, sample_steps=2).config("cpu", 0) for row in TERM_ROWS}
    loss = {row: c.loss for row, c in configs.items()}
    terms = {
        row: (c.alignment_weight, c.lpips_weight, c.p_dino_weight, c.gate_t, c.gate)
        for row, c in loss.items()
    }
    assert len(set(terms.values())) == len(TERM_ROWS)
    assert terms["flow"][:3] == (0, 0, 0)
    assert terms["repa"][:3] == (0.5, 0, 0)
    assert terms["p_dino"] == (0.5, 0.1, 0.01, 0, "hard")
    assert terms["gate_0.3"] == (0.5, 0.1, 0.01, 0.3, "hard")
    assert terms["no_repa"] == (0, 0.1, 0.01, 0.3, "hard")
    assert terms["gate_cosine"] == (0.5, 0.1, 0.01, 0.3, "cosine")
    assert ROWS["gate_sigmoid"].label == "all terms, sigmoid gate at 0.3"
    gates = set(typing.get_args(typing.get_type_hints(LossConfig)["gate"]))
    assert {gate for *_, gate in terms.values()} == gates
    assert {(c.seed, c.train.max_steps, c.train.sample_every) for c in configs.values()} == {(3, 60, 0)}
    assert len({(c.model, c.data, c.time, c.optimizer, c.ema) for c in configs.values()}) == 1


def line(row: str, seed: str, frechet: float) -> dict[str, str]:
    rest = {"accuracy": "0.5", "variance": "0.25", "seconds_per_step": "0.1"}
    return {"row": row, "seed": seed, "frechet": str(frechet), **rest, "failed": ""}


def failure(row: str, seed: str) -> dict[str, str]:
    return {"row": row, "seed": seed, **dict.fromkeys(FIGURES, ""), "failed": "a | b"}


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


def test_rows_that_the_paper_does_not_have_and_that_failed_as_a_whole():
    row = Table([line("gate_snr", "0", 12.5)]).markdown(7, 9).splitlines()[-1]
    assert row.endswith("| 0.1000 |  |  |  |")
    table = Table([failure("flow", "0")])
    assert "| `flow` | flow matching alone (failed) | failed |" in table.markdown(7, 9)
    assert table.draw(7).axes


def test_failed_seeds_are_left_out_of_means_and_told():
    table = Table(
        [
            *(line("flow", seed, value) for seed, value in zip("01", (10.0, 20.0), strict=True)),
            failure("flow", "2"),
            *(failure("repa", seed) for seed in "01"),
            line("repa", "2", 4),
            *(failure("lpips", seed) for seed in "012"),
        ]
    )
    assert table.mean("flow", "frechet") == 15
    assert table.gain("repa", "flow") == ""  # no seed has both
    text = table.markdown(7, 9)
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    assert rows["flow"].startswith("| `flow` | flow matching alone (1 of 3 failed) | 15.0 ± 7.1 | 0.5000 ±")
    assert rows["repa"].startswith("| `repa` | + REPA (2 of 3 failed) | 4.0 | 0.5000 |")
    assert rows["lpips"].startswith("| `lpips` | + REPA + LPIPS (failed) | failed | failed | failed |")
    assert "number of seeds: 3;" in text
    assert text.endswith("\n- `lpips`, seed 2, failed: a | b\n") and text.count("failed: a | b") == 6
    labels = [label.get_text() for label in table.draw(7).axes[0].get_yticklabels()]
    assert labels[1:] == ["+ REPA (2 of 3 failed)", "+ REPA + LPIPS (failed)"]


def test_one_seed_has_no_deviation():
    table = Table([line("lpips", "0", 12.5)])
    assert table.deviation("lpips", "frechet") is None
    row = table.markdown(7, 9).splitlines()[-1]
    assert row == "| `lpips` | + REPA + LPIPS | 12.5 | 0.5000 | 0.250 | 0.1000 |  |  | 10.00 |"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "flow,lpip"], "--rows must be some of flow, repa, .*, got 'lpip'"),
        (["--seeds", "0,-1"], "--seeds must be whole numbers below 2\\^63 separated by commas, got '0,-1'"),
        (["--seeds", ""], "--seeds must be whole numbers below 2\\^63 separated by commas, got ''"),
        (["--seeds", "1,9223372036854775808"], "--seeds must be whole numbers below 2\\^63"),
        (["--seeds", "9" * 5000], "--seeds must be whole numbers below 2\\^63"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--sample-steps", "0"], "--sample-steps must be at least 1, got 0"),
    ],
)
def test_wrong_options(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        ablate.main([*options, "--out", str(tmp_path / "grid")])
    assert not (tmp_path / "grid").exists()


def test_a_device_that_there_is_not(tmp_path, capsys):
    argv = ["--device", "gpu", "--out", str(tmp_path / "grid")]
    assert "--device: must be auto|cpu|cuda, got 'gpu'" in refused(capsys, ablate.main, argv)
    assert not (tmp_path / "grid").exists()


def test_a_seed_counts_once_however_it_is_written():
    names = ablate.AblateOptions(seeds="00,0, 1,01,9223372036854775807").seed_names
    assert names == ["0", "1", "9223372036854775807"]


def test_cuda_that_is_not_there_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="'cuda' was asked for but PyTorch sees no CUDA device"):
        ablate.main(["--device", "cuda", "--out", str(tmp_path / "grid")])
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("out", ["file", "file/grid"])
def test_a_file_in_the_place_of_the_folder(tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--out .*/{out} cannot be made a folder: "):
        ablate.main([*QUICK, "--out", str(tmp_path / out)])


def test_rows_of_pixeldit_differ_in_path_and_perceptual_terms_alone():
    rows = [row for row in ROWS if row not in TERM_ROWS]
    configs = {row: Cell(row=row, seed="3", steps=60, sample_steps=2).config("cpu", 0) for row in rows}
    seen = {
        row: (c.model.pixel_depth, c.model.pixel_modulation, c.loss.lpips_weight, c.loss.p_dino_weight)
        for row, c in configs.items()
    }
    assert seen == {
        "no_pixels": (0, None, 0, 0),
        "per_patch": (None, "patch", 0, 0),
        "pixeldit": (None, None, 0, 0),
        "no_pixels_terms": (0, None, 0.1, 0.01),
        "per_patch_terms": (None, "patch", 0.1, 0.01),
        "pixeldit_terms": (None, None, 0.1, 0.01),
    }
    assert {(c.model.family, c.loss.alignment_weight) for c in configs.values()} == {("pixeldit", 0.5)}
    shared = {Cell(row=row, seed="3", steps=60, sample_steps=2).shared for row in ROWS}
    assert shared == {"3", "pixeldit-digits-3"}
