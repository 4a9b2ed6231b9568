"""What the tests of the benchmarks share: a run of the command line, and the rows that it wrote."""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are not installed
from benchmarks import report
from benchmarks.__main__ import main

Rows = list[dict[str, str]]


def bench(suite: str, out: Path, *options: str, device: str = "cpu") -> tuple[int, Rows]:
    """Runs a suite, three repeats; the exit code, and the rows of its CSV, all of the one schema."""
    argv = ["--suite", suite, "--device", device, "--out", str(out), *options]
    try:
        code = main(argv if "--repeats" in options else [*argv, "--repeats", "3"])
    except SystemExit as exit_:
        code = exit_.code
    path = out / f"{suite}.csv"
    if not path.exists():
        return code, []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert tuple(row) == report.COLUMNS
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]), row
        assert row["device"] and row["commit"] and row["torch"] and row["threads"]
    return code, rows


def named(rows: Rows, *columns: str) -> set[tuple[str, ...]]:
    """What the rows have in some columns."""
    return {tuple(row[column] for column in columns) for row in rows}


def assert_are_plots(folder: Path, *names: str) -> None:
    assert {path.name for path in folder.glob("*.png")} == set(names)
    for name in names:
        pixels = plt.imread(folder / name)
        assert pixels.shape[0] > 200 and pixels.shape[1] > 200 and pixels.std() > 0.01, name
