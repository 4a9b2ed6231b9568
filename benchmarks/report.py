"""The row schema of all suites, and the CSV file that rows go to; all is drawn from that alone."""

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import Timing
from pixelgen.files import replacing

Row = dict[str, str]

# What is timed. Rows of one run that agree in these, one per provider, are measured side by side.
KEY = ("case", "shape", "dtype", "mode")
TIMES = ("median_ms", "p20_ms", "p80_ms")
# Other values -> their heading in tables. A suite fills those that it has.
VALUES = {
    "images_per_s": "img/s",
    "gbps": "GB/s",
    "share_of_copy": "of copy",
    "tflops": "TFLOP/s",
    "mfu_vendor": "MFU, vendor's peak",
    "mfu_matmul": "MFU, measured matmul",
    "vendor_tflops": "vendor's TFLOP/s",
    "matmul_tflops": "matmul TFLOP/s",
    "peak_mb": "MB",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "levels": "grey levels off",
    "data_wait": "data wait",
    "save_s": "save s",
    "stall_share": "stall",
    "sent_mb": "MB sent",
    "formula_mb": "MB by formula",
}
SHARES = ("share_of_copy", "mfu_vendor", "mfu_matmul", "data_wait", "stall_share")  # shown as percent
# With what a row was measured, the same for all rows of a run.
SETTING = ("device", "commit", "torch", "cuda", "threads", "triton")
COLUMNS = (*KEY, "provider", *TIMES, *VALUES, *SETTING)


def row(
    case: str,
    provider: str,
    timing: Timing,
    *,
    shape: str = "",
    dtype: str = "",
    mode: str = "",
    **values: float | None,
) -> Row:
    """A row without the columns of SETTING.

    Args:
        case: an op, or what else is timed.
        provider: what ran it.
        timing: milliseconds.
        shape: starts with the name of the model or network, where there is one.
        dtype: fp32 or bf16.
        mode: fwd, bwd or fwd_bwd.
        values: by the names of VALUES; None for one that is not known.
    """
    found: Row = {"case": case, "shape": shape, "dtype": dtype, "mode": mode, "provider": provider}
    found |= {name: f"{getattr(timing, name):.5g}" for name in TIMES}
    found |= dict.fromkeys(VALUES, "")
    for name, value in values.items():
        found[name]  # a KeyError for a value that the schema does not have
        found[name] = "" if value is None else f"{value:.7g}" if name == "loss" else f"{value:.5g}"
    return found


class Results:
    """The CSV file of a suite: what is added is on the disk at once.

    Older rows of a case that were measured in the same setting go when the case is measured again: only rows
    of one run compare.

    Args:
        path: the file; older rows of it are kept.
        setting: the columns of SETTING.
    """

    def __init__(self, path: Path, setting: Row) -> None:
        self.path, self.setting = path, setting
        self.rows: list[Row] = []  # of this run

    def add(self, row: Row) -> None:
        """Writes one more row."""
        self.rows.append({**row, **self.setting})
        replaced = {_key(row) for row in self.rows}
        kept = [row for row in read(self.path) if _key(row) not in replaced] if self.path.exists() else []
        with replacing(self.path, "w") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept + self.rows)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in (*KEY, *SETTING))


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: list[Row]) -> list[Row]:
    """Those that were measured in the setting of the last one: only these may stand in one table."""
    return [row for row in rows if all(row[name] == rows[-1][name] for name in SETTING)]


def grouped(rows: list[Row], columns: Iterable[str] = KEY) -> dict[tuple[str, ...], dict[str, Row]]:
    """Values of these columns -> provider -> row."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), {})[row["provider"]] = row
    return groups


def ratio(group: dict[str, Row], provider: str, other: str) -> float | None:
    """How many times faster `provider` is than `other`."""
    if provider not in group or other not in group:
        return None
    return float(group[other]["median_ms"]) / float(group[provider]["median_ms"])
