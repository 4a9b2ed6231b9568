"""Plots of the rows of a CSV."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from benchmarks.report import Row, grouped, ratio
from benchmarks.tables import heading

COLORS = {
    "eager": "#9aa0a6",
    "compile": "#4285f4",
    "masked": "#5f6368",
    "ours": "#e8710a",
    "ours_compile": "#a142f4",
}
DARK = "#3c4043"
WIDTH = 0.27

Groups = dict[tuple[str, str], dict[str, dict[str, Row]]]  # (shape, dtype) -> mode -> provider -> row


def _panels(rows: list[Row]) -> dict[str, Groups]:
    """Op -> its groups of bars, fp32 first."""
    panels: dict[str, Groups] = {}
    for (op, shape, dtype, mode), group in grouped(rows, ("op", "shape", "dtype", "mode")).items():
        panels.setdefault(op, {}).setdefault((shape, dtype), {})[mode] = group
    for op, groups in panels.items():
        panels[op] = dict(sorted(groups.items(), key=lambda item: item[0][1] != "fp32"))
    return panels


def _small_multiples(
    rows: list[Row], draw: Callable[[Axes, Groups], None], title: str, handles: list[Patch | Line2D]
) -> Figure:
    """A panel per op, two in a row; `draw` fills one."""
    panels = _panels(rows)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(7.5 * columns, 0.9 + 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (op, groups) in zip(axes.flat, panels.items(), strict=False):
        draw(axis, groups)
        labels = []
        for shape, dtype in groups:
            model, *rest = shape.split()
            option = [item.split("=")[1] for item in rest if item.startswith("noise=")]
            labels.append("\n".join((model, dtype, *option)))
        axis.set_xticks(range(len(groups)), labels, fontsize=9 if len(groups) < 8 else 6.5)
        axis.set_title(op, fontsize=11, loc="left", fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    height = figure.get_figheight()
    figure.suptitle(
        f"{title}\n{heading(rows[0])}",
        fontsize=10,
        y=1 - 0.1 / height,
    )
    figure.legend(
        handles=handles,
        ncols=len(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.5 / height),
        fontsize=9,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / height))
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _providers(rows: list[Row]) -> list[str]:
    found = {row["provider"] for row in rows}
    return [name for name in COLORS if name in found]


def _positions(groups: Groups, providers: list[str]) -> list[tuple[float, str, dict[str, Row]]]:
    """(x, provider, mode -> row) of every bar of a panel."""
    bars = []
    found = {name for modes in groups.values() for group in modes.values() for name in group}
    providers = [name for name in providers if name in found]
    for index, modes in enumerate(groups.values()):
        for offset, name in enumerate(providers):
            by_mode = {mode: group[name] for mode, group in modes.items() if name in group}
            if by_mode:
                bars.append((index + (offset - (len(providers) - 1) / 2) * WIDTH, name, by_mode))
    return bars


def times(rows: list[Row], path: Path) -> None:
    """Median milliseconds of forward, and of forward with backward, with the 20th to 80th percentile."""
    providers = _providers(rows)

    def draw(axis: Axes, groups: Groups) -> None:
        for x, name, modes in _positions(groups, providers):
            whole = modes["fwd_bwd"] if "fwd_bwd" in modes else modes["fwd"]
            median = float(whole["median_ms"])
            axis.bar(x, median, WIDTH * 0.92, color=COLORS[name], alpha=0.45 if "fwd_bwd" in modes else 1)
            if "fwd" in modes:
                axis.bar(x, float(modes["fwd"]["median_ms"]), WIDTH * 0.92, color=COLORS[name])
            spread = [[median - float(whole["p20_ms"])], [float(whole["p80_ms"]) - median]]
            axis.errorbar(x, median, yerr=[[max(0.0, v) for v in s] for s in spread], ecolor=DARK, lw=0.9)
            top = max(median, float(whole["p80_ms"]))
            text = f"{median:.0f}" if median >= 1000 else f"{median:.3g}"  # no powers of ten
            axis.annotate(text, (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
        axis.set_ylabel("ms")
        axis.margins(y=0.12)

    handles: list[Patch | Line2D] = [Patch(color=COLORS[name], label=name) for name in providers]
    handles += [Patch(color=DARK, label="solid: fwd"), Patch(color=DARK, alpha=0.45, label="pale: fwd_bwd")]
    title = "Milliseconds, median and 20th to 80th percentile, cold cache"
    _save(_small_multiples(rows, draw, title, handles), path)


def bandwidth(rows: list[Row], path: Path) -> None:
    """Share of the measured copy bandwidth: what has to move at least, over the time it took."""
    providers = _providers(rows)

    def draw(axis: Axes, groups: Groups) -> None:
        for x, name, modes in _positions(groups, providers):
            whole = modes.get("fwd_bwd", modes["fwd"])
            share = 100 * float(whole["share_of_copy"])
            axis.bar(x, share, WIDTH * 0.92, color=COLORS[name])
            if "fwd_bwd" in modes:
                axis.plot(x, 100 * float(modes["fwd"]["share_of_copy"]), "D", ms=4, mfc="white", mec=DARK)
            # at the foot of the bar, where it cannot be taken for the number of the diamond
            number = axis.annotate(
                f"{share:.0f}", (x, 0), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
            number.set_path_effects([withStroke(linewidth=2, foreground="white")])
        axis.axhline(100, color=DARK, lw=0.8, ls="--")
        axis.set_ylabel("% of copy")
        axis.set_ylim(0, max(112, axis.get_ylim()[1]))

    handles: list[Patch | Line2D] = [Patch(color=COLORS[name], label=name) for name in providers]
    diamond = Line2D([], [], marker="D", ls="", ms=4, mfc="white", mec=DARK, label="fwd alone")
    handles += [diamond, Line2D([], [], color=DARK, lw=0.8, ls="--", label="a plain copy")]
    title = "Share of the copy bandwidth of the same run; bars and numbers: fwd_bwd, or fwd without gradient"
    _save(_small_multiples(rows, draw, title, handles), path)


def step(rows: list[Row], path: Path) -> None:
    """Time, use of the device and memory of a training step, a bar per provider."""
    (model, batch, dtype), group = list(grouped(rows, ("model", "batch", "dtype")).items())[-1]
    names = [name for name in COLORS if name in group]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    panels = (("ms/step", "median_ms", 1.0), ("MFU, %", "mfu", 100.0), ("peak memory, MB", "peak_mb", 1.0))
    for axis, (title, column, factor) in zip(axes, panels, strict=True):
        values = [factor * float(group[name][column]) for name in names]
        axis.bar(names, values, 0.6, color=[COLORS[name] for name in names])
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            text, top = f"{value:.4g}", value
            if column == "median_ms":
                low, high = float(group[name]["p20_ms"]), float(group[name]["p80_ms"])
                axis.errorbar(index, value, yerr=[[value - low], [high - value]], ecolor=DARK, lw=1)
                text, top = f"{text}\n{ratio(group, 'eager', name):.2f}x eager", high
            axis.annotate(text, (index, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axis.margins(y=0.2)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Training step: {model}, batch {batch}, {dtype}\n{heading(rows[0])}",
        fontsize=10,
    )
    figure.tight_layout()
    _save(figure, path)


def data(rows: list[Row], path: Path) -> None:
    """Images per second: of one core for every way to decode, and of the loader over its workers."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4))
    decoded = grouped([row for row in rows if row["op"] == "decode"], ("shape",))
    names = list(dict.fromkeys(name for group in decoded.values() for name in group))
    height = 0.8 / len(decoded)
    for index, ((shape,), group) in enumerate(decoded.items()):
        color = plt.get_cmap("tab10")(index)
        for place, name in enumerate(names):
            if name in group:
                value = float(group[name]["images_per_s"])
                y = place + (index - (len(decoded) - 1) / 2) * height
                left.barh(y, value, height * 0.9, color=color, label=shape if name == "pil" else None)
                left.annotate(f"{value:,.0f}", (value, y), (3, -3), textcoords="offset points", fontsize=7)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xscale("log")
    left.margins(x=0.12)
    left.set_xlabel("images per second and core")
    left.legend(fontsize=8, frameon=False)

    loaded: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["op"] == "loader":
            workers = int(row["shape"].split()[0].removeprefix("workers="))
            loaded.setdefault(row["provider"], []).append((workers, float(row["images_per_s"])))
    for name, points in loaded.items():
        right.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        for workers, value in points:
            right.annotate(f"{value:,.0f}", (workers, value), (4, 4), textcoords="offset points", fontsize=8)
    right.set_yscale("log")
    right.set_xticks(sorted({workers for points in loaded.values() for workers, _ in points}))
    right.set_xlabel("workers of the loader (0: the training process itself)")
    right.set_ylabel("images per second")
    right.margins(x=0.12, y=0.15)
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"From files to batches\n{heading(rows[0])}", fontsize=10)
    figure.tight_layout()
    _save(figure, path)


def train(rows: list[Row], path: Path) -> None:
    """A panel for each op: steps and their wait for data, saves and their stall, steps beside, processes."""
    ops = {
        "step": "ms/step; pale: waiting for images",
        "save": "ms that training waits at a checkpoint",
        "beside": "ms/step beside a checkpoint",
        "processes": "ms/step of one process and several",
    }
    panels = {
        op: [row for row in rows if row["op"] == op] for op in ops if any(row["op"] == op for row in rows)
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 4.2), squeeze=False)
    for axis, (op, found) in zip(axes.flat, panels.items(), strict=True):
        for index, row in enumerate(found):
            median, low, high = (float(row[f"{name}_ms"]) for name in ("median", "p20", "p80"))
            waited = median * float(row["data_wait"] or 0)
            axis.bar(index, median - waited, 0.7, color=COLORS["compile"])
            axis.bar(index, waited, 0.7, bottom=median - waited, color=COLORS["compile"], alpha=0.35)
            spread = [[max(0.0, median - low)], [max(0.0, high - median)]]
            axis.errorbar(index, median, yerr=spread, ecolor=DARK, lw=0.9)
            text = f"{median:.0f}" if median >= 100 else f"{median:.3g}"
            if row["data_wait"]:
                text += f"\n{float(row['data_wait']):.1%}"
            if row["save_s"]:
                text += f"\nof {float(row['save_s']):.3g} s\n{float(row['stall_share']):.1%}"
            if float(row["sent_mb"] or 0):
                text += f"\n{float(row['sent_mb']):.3g} MB\n(formula {float(row['formula_mb']):.3g})"
            axis.annotate(
                text, (index, max(median, high)), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
        names = [row["provider"] for row in found]
        if op == "step":
            names = [f"{name}\n{row['shape'].split()[-1]}" for name, row in zip(names, found, strict=True)]
        axis.set_xticks(range(len(found)), names, fontsize=7 if len(found) < 5 else 5.5)
        axis.set_title(ops[op], fontsize=9)
        axis.margins(y=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"What a run costs beside its steps\n{heading(rows[0])}", fontsize=10)
    figure.tight_layout()
    _save(figure, path)
