"""Tables and plots of a CSV of `report`, drawn from its newest rows and from nothing else."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from benchmarks.report import KEY, SHARES, VALUES, Row, grouped, newest, ratio, read

COLORS = {
    "eager": "#9aa0a6",
    "compile": "#4285f4",
    "liger": "#0f9d58",
    "masked": "#5f6368",
    "ours": "#e8710a",
    "ours_compile": "#a142f4",
}
DARK = "#3c4043"
HEADINGS = {"median_ms": "ms", **VALUES}


def heading(row: Row) -> str:
    """With what the rows were measured."""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "cuda") if row[name])
    return f"{row['device']}, {row['threads']} CPU threads, commit {row['commit']}, {versions}."


def draw(
    path: Path, *, baselines: tuple[str, ...], plots: dict[str, tuple[str, ...]], is_wide: bool
) -> list[Path]:
    """Writes the table of a CSV, and its plots, beside it.

    Args:
        path: the CSV.
        baselines: see `baseline_of`.
        plots: name of a picture, after that of the CSV -> the columns that it shows.
        is_wide: a line of the table per case, not per provider.

    Returns:
        What was written.
    """
    rows = newest(read(path))
    written = [path.with_suffix(".md")]
    told = WIDE_NOTE if is_wide else LONG_NOTE
    written[0].write_text(f"{heading(rows[-1])} {told}\n\n{table(rows, baselines, is_wide=is_wide)}\n")
    for name, columns in plots.items():
        written.append(path.with_name(f"{path.stem}{name}.png"))
        plot(rows, columns, written[-1])
    return written


# --- tables ---

WIDE_NOTE = "Medians; GB/s of ours and its share of a plain copy's in the same run; memory at the peak."
LONG_NOTE = "Medians (20th to 80th percentile); how many times faster than the provider with 1.00x."


def baseline_of(group: dict[str, Row], baselines: tuple[str, ...]) -> str | None:
    """The provider that the others of a case are held against: the first of `baselines` that was timed."""
    return next((name for name in baselines if name in group), None)


def table(rows: list[Row], baselines: tuple[str, ...], *, is_wide: bool) -> str:
    """Markdown: a table for each case, since each has columns of its own; wide, for each set of providers."""
    providers: dict[str, list[str]] = {}
    for row in rows:
        providers.setdefault(row["case"], []).append(row["provider"])
    parts: dict[str, list[Row]] = {}
    for row in rows:
        name = " ".join(ordered(providers[row["case"]])) if is_wide else row["case"]
        parts.setdefault(name, []).append(row)
    return "\n\n".join(_wide(part) if is_wide else _long(part, baselines) for part in parts.values())


def _markdown(head: list[str], num_texts: int, lines: list[list[str]]) -> str:
    rule = ["---"] * num_texts + ["---:"] * (len(head) - num_texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _shown(row: Row, column: str) -> str:
    """A value of a row as a table has it; empty where the row has none."""
    text = row.get(column, "")
    return f"{float(text):.1%}" if text and column in SHARES else text


def _used(rows: list[Row], columns: tuple[str, ...]) -> list[str]:
    return [column for column in columns if any(row[column] for row in rows)]


def _long(rows: list[Row], baselines: tuple[str, ...]) -> str:
    """A line per provider."""
    key, values = _used(rows, KEY), _used(rows, tuple(VALUES))
    lines = []
    for group in grouped(rows).values():
        baseline = baseline_of(group, baselines)
        for provider, row in group.items():
            times = f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})"
            gain = _times(ratio(group, provider, baseline)) if baseline else ""
            texts = [row[column] for column in key]
            lines.append([*texts, provider, times, gain, *(_shown(row, column) for column in values)])
    head = [*key, "provider", "ms", "faster", *(VALUES[column] for column in values)]
    return _markdown(head, len(key) + 1, lines)


def _wide(rows: list[Row]) -> str:
    """A line per case: times and memory of every provider, and what ours gains and reaches."""
    providers = ordered(row["provider"] for row in rows)
    others = [name for name in providers if name != "ours"]
    values = [name for name in _used(rows, tuple(VALUES)) if name != "peak_mb"]
    lines = []
    for key, group in grouped(rows).items():
        ours = group.get("ours", {})
        lines.append(
            [
                *key,
                *(_shown(group.get(name, {}), "median_ms") for name in providers),
                *(_times(ratio(group, "ours", name)) for name in others),
                *(_shown(ours, column) for column in values),
                *(_shown(group.get(name, {}), "peak_mb") for name in providers),
            ]
        )
    head = [*KEY, *(f"{name} ms" for name in providers), *(f"vs {name}" for name in others)]
    head += [*(VALUES[name] for name in values), *(f"{name} MB" for name in providers)]
    return _markdown(head, len(KEY), lines)


def summary(rows: list[Row], baselines: tuple[str, ...], *, is_wide: bool) -> str:
    """What a run prints: its table, or where that is wide, a line of ratios per op, mode and dtype."""
    if not is_wide:
        return table(rows, baselines, is_wide=False)
    told: dict[str, list[str]] = {}
    for (case, shape, dtype, mode), group in grouped(rows).items():
        gains = {name: ratio(group, "ours", name) for name in group if name != "ours"}
        texts = ", ".join(f"{_times(gain)} {name}" for name, gain in gains.items() if gain is not None)
        if texts:
            told.setdefault(f"{case} {mode} {dtype}", []).append(f"{shape.split()[0]} {texts}")
    return "\n".join(f"{name}: ours {'; '.join(texts)}" for name, texts in told.items())


# --- plots ---


def ordered(providers: Iterable[str]) -> list[str]:
    """Providers in the order of COLORS, then as they come; each once."""
    found = dict.fromkeys(providers)
    return [*(name for name in COLORS if name in found), *(name for name in found if name not in COLORS)]


def plot(rows: list[Row], columns: tuple[str, ...], path: Path) -> None:
    """A panel per case and column, in it a group of bars per shape and dtype, a bar per provider.

    Where forward was timed alone and with backward, the bar is both together, and a diamond forward alone.
    """
    cases = dict.fromkeys(row["case"] for row in rows)
    panels = [
        (case, column, [row for row in rows if row["case"] == case and row[column]])
        for case in cases
        for column in columns
    ]
    panels = [panel for panel in panels if panel[-1]]
    providers = ordered(row["provider"] for row in rows)
    others = [name for name in providers if name not in COLORS]
    colors = COLORS | {name: plt.get_cmap("tab20")(index) for index, name in enumerate(others)}
    width = min(3, len(panels))
    height = -(-len(panels) // width)
    figure, axes = plt.subplots(
        width and height, width, figsize=(6 * width, 1.1 + 3.1 * height), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (case, column, found) in zip(axes.flat, panels, strict=False):
        _bars(axis, found, column, colors)
        axis.set_title(f"{case}: {HEADINGS[column]}", fontsize=10, loc="left", fontweight="bold", pad=16)
    top = figure.get_figheight()
    figure.suptitle(heading(rows[-1]), fontsize=9, y=1 - 0.1 / top)
    handles: list[Patch | Line2D] = [Patch(color=colors[name], label=name) for name in providers]
    if any(row["mode"] == "fwd_bwd" for row in rows):
        handles.append(Line2D([], [], marker="D", ls="", ms=4, mfc="white", mec=DARK, label="forward alone"))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.35 / top)}
    figure.legend(handles=handles, ncols=min(9, len(handles)), fontsize=8, frameon=False, **place)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / top))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Axes, rows: list[Row], column: str, colors: dict[str, object]) -> None:
    groups = grouped(rows, ("shape", "dtype"))
    by_mode = {
        mode: grouped([row for row in rows if row["mode"] == mode], ("shape", "dtype"))
        for mode in dict.fromkeys(row["mode"] for row in rows)
    }
    whole = by_mode.get("fwd_bwd", next(iter(by_mode.values())))
    scale = 100.0 if column in SHARES else 1.0
    count = max(len(group) for group in groups.values())
    step = 0.84 / count
    size = 7.5 if count * len(groups) < 16 else 5.5
    for index, (key, group) in enumerate(whole.items()):
        names = ordered(group)
        for place, name in enumerate(names):
            row, x = group[name], index + (place - (len(names) - 1) / 2) * step
            value = top = scale * float(row[column])
            axis.bar(x, value, 0.92 * step, color=colors[name])
            if column == "median_ms":
                low, high = float(row["p20_ms"]), float(row["p80_ms"])
                spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axis.errorbar(x, value, yerr=spread, ecolor=DARK, lw=0.9)
                top = max(value, high)
            alone = by_mode.get("fwd", {}).get(key, {}).get(name)
            if alone is not None and alone is not row:
                axis.plot(x, scale * float(alone[column]), "D", ms=3.5, mfc="white", mec=DARK)
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            said = axis.annotate(
                text, (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=size
            )
            said.set_path_effects([withStroke(linewidth=2, foreground="white")])
    words = [[*shape.split(), dtype] for shape, dtype in whole]
    shared = [word for word in words[0] if all(word in other for other in words)]
    axis.text(0, 1.02, " ".join(shared), transform=axis.transAxes, fontsize=7, color=DARK)
    labels = ["\n".join(word for word in own if word not in shared) for own in words]
    axis.set_xticks(range(len(labels)), labels, fontsize=7.5 if len(labels) < 8 else 5)
    axis.margins(x=0.02, y=0.15)
    values = [scale * float(row[column]) for row in rows]
    if min(values) > 0 and max(values) > 50 * min(values):
        axis.set_yscale("log")
    if column in SHARES:
        axis.set_ylabel("%")
    axis.spines[["top", "right"]].set_visible(False)
