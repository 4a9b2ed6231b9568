"""The CSV files; tables and plots are drawn from them and from nothing else."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, str]
SETTING = ("device", "commit", "torch", "cuda", "threads", "triton")


@dataclass(frozen=True, kw_only=True)
class Theme:
    """One kind of CSV file.

    Attributes:
        columns: all columns, in order.
        case: columns that, with those of SETTING, name the rows that one run measures side by side.
    """

    columns: tuple[str, ...]
    case: tuple[str, ...]


KERNELS = Theme(
    columns=(
        "op",
        "provider",
        "mode",
        "dtype",
        "shape",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "gbps",
        "share_of_copy",
        "peak_mb",
        *SETTING,
    ),
    case=("op", "dtype", "shape"),
)
STEP = Theme(
    columns=(
        "provider",
        "model",
        "batch",
        "dtype",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "images_per_s",
        "tflops",
        "peak_tflops",
        "mfu",
        "peak_mb",
        "loss",
        "grad_norm",
        *SETTING,
    ),
    case=("model", "batch", "dtype"),
)
DATA = Theme(
    columns=(
        "op",
        "provider",
        "shape",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "images_per_s",
        "levels",
        *SETTING,
    ),
    case=("op", "shape"),
)
TRAIN = Theme(
    columns=(
        "op",
        "provider",
        "shape",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "images_per_s",
        "data_wait",
        "save_s",
        "stall_share",
        "sent_mb",
        "formula_mb",
        "loss",
        *SETTING,
    ),
    case=("op", "shape"),
)


def write_csv(path: Path, theme: Theme, rows: list[Row]) -> None:
    """Adds rows to the file. Older rows of the same case and setting go: only rows of one run compare."""

    def key(row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in (*theme.case, *SETTING))

    replaced = {key(row) for row in rows}
    kept: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if key(row) not in replaced]
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, theme.columns)
        writer.writeheader()
        writer.writerows(kept + rows)
    partial.replace(path)


def read_csv(path: Path, like: Row) -> list[Row]:
    """Rows with the setting of `like`."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[name] == like[name] for name in SETTING)]


def grouped(rows: list[Row], columns: Iterable[str]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Values of these columns -> provider -> row."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), {})[row["provider"]] = row
    return groups


def ratio(group: dict[str, Row], provider: str, ours: str = "ours") -> float | None:
    """How many times faster `ours` is than `provider`."""
    if ours not in group or provider not in group:
        return None
    return float(group[provider]["median_ms"]) / float(group[ours]["median_ms"])
