"""The CSV, and the table and plot that are drawn from it."""

import csv
import re
from pathlib import Path

COLUMNS = (
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
    "threads",
    "device",
    "commit",
    "torch",
    "triton",
    "cuda",
)
KEY = (
    "op",
    "provider",
    "mode",
    "dtype",
    "shape",
    "threads",
    "device",
    "commit",
    "torch",
    "triton",
    "cuda",
)
Row = dict[str, str]
COLORS = {"eager": "#9aa0a6", "compile": "#4285f4", "ours": "#e8710a"}


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_csv(path: Path, rows: list[Row]) -> None:
    """Adds rows to the file; a row with the key of an older one replaces it."""
    kept: dict[tuple[str, ...], Row] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                kept[tuple(row.get(column, "") for column in KEY)] = row
    for row in rows:
        kept[tuple(row[column] for column in KEY)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(kept.values())
    partial.replace(path)


def read_csv(path: Path, like: Row) -> list[Row]:
    """Rows measured with the device, threads, commit and versions of `like`."""
    setting = ("threads", "device", "commit", "torch", "triton", "cuda")
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == like[key] for key in setting)]


def grouped(rows: list[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """(op, shape, dtype, mode) -> provider -> row."""
    groups: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"], row["mode"]), {})[row["provider"]] = row
    return groups


def ratio(group: dict[str, Row], provider: str) -> float | None:
    """How many times faster ours is than `provider`."""
    if "ours" not in group or provider not in group:
        return None
    return float(group[provider]["median_ms"]) / float(group["ours"]["median_ms"])


def markdown(rows: list[Row]) -> str:
    """One line per (op, shape, dtype, mode): times, bandwidth of ours, ours against the others."""
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "cuda") if first[name])
    lines = [
        f"{first['device']}, {first['threads']} CPU threads, commit {first['commit']}, {versions}. "
        "Medians in ms, cold cache; share of the bandwidth of a plain copy in the same run.",
        "",
        "| op | shape | dtype | mode | eager | compile | ours | GB/s | of copy | vs eager | vs compile |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (op, shape, dtype, mode), group in grouped(rows).items():
        times = [group[name]["median_ms"] if name in group else "" for name in ("eager", "compile", "ours")]
        ours = group.get("ours", {})
        share = f"{float(ours['share_of_copy']):.0%}" if ours else ""
        gains = [ratio(group, name) for name in ("eager", "compile")]
        texts = ["" if gain is None else f"{gain:.2f}x" for gain in gains]
        cells = [op, shape, dtype, mode, *times, ours.get("gbps", ""), share, *texts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Bars per op: median milliseconds of each provider in each mode, with the 20th to 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(rows)
    panels: dict[tuple[str, str], list[tuple[str, dict[str, Row]]]] = {}
    for (op, shape, dtype, mode), group in groups.items():
        panels.setdefault((op, f"{shape} {dtype}"), []).append((mode, group))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((op, case), modes) in zip(axes.flat, panels.items(), strict=False):
        for offset, (provider, color) in enumerate(COLORS.items()):
            bars = [
                (i + (offset - 1) * 0.27, group[provider])
                for i, (_, group) in enumerate(modes)
                if provider in group
            ]
            if not bars:
                continue
            medians = [float(row["median_ms"]) for _, row in bars]
            below = [max(0.0, m - float(row["p20_ms"])) for m, (_, row) in zip(medians, bars, strict=True)]
            above = [max(0.0, float(row["p80_ms"]) - m) for m, (_, row) in zip(medians, bars, strict=True)]
            drawn = axis.bar([x for x, _ in bars], medians, 0.25, color=color, label=provider)
            axis.errorbar(
                [x for x, _ in bars], medians, yerr=[below, above], fmt="none", ecolor="#3c4043", lw=1
            )
            axis.bar_label(drawn, labels=[f"{m:.2g}" for m in medians], fontsize=7, padding=2)
        axis.set_xticks(range(len(modes)), [mode for mode, _ in modes])
        axis.set_ylabel("ms")
        axis.margins(y=0.15)
        axis.set_title(f"{op}\n{case}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{rows[0]['device']}, commit {rows[0]['commit']}, torch {rows[0]['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
