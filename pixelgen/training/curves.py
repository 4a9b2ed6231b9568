"""What a run has logged, as arrays and as a picture of the loss curves."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixelgen.errors import UserError
from pixelgen.losses.options import LossConfig
from pixelgen.losses.term import TERMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _labels() -> dict[str, str]:
    """Labels of the panels by the name in the log, in order, with those of all terms registered by now."""
    terms = {name: TERMS[name].label for name in LossConfig.parts()}
    shown = {name: label for name, label in terms.items() if label}
    return {"loss": "loss", **shown, "grad_norm": "gradient norm", "lr": "learning rate"}


def read_metrics(path: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads a metrics.jsonl: one JSON object per line with "step" and numbers by name.

    Of lines with the same step the last counts (a resumed run writes some steps again). A last line that is
    still being written is left out; so are, with a warning, other lines that are no JSON object with a step.
    Values that are not finite numbers are left out.

    Returns:
        name -> (steps (n,) int64 ascending, values (n,) float64), in order of first appearance.
    """
    by_step: dict[int, dict[str, float]] = {}
    broken = 0
    for line in Path(path).read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            broken += line.endswith(b"\n") and not line.isspace()
            continue
        by_step[step] = {name: float(value) for name, value in record.items() if _is_number(value)}
    if broken:
        warnings.warn(f"read_metrics: {path} has {broken} unreadable lines, left out", stacklevel=2)
    curves = {}
    for name in dict.fromkeys(name for record in by_step.values() for name in record):
        steps = sorted(step for step in by_step if name in by_step[step])
        values = np.array([by_step[step][name] for step in steps])
        curves[name] = (np.array(steps, dtype=np.int64), values)
    return curves


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def save_loss_curves(metrics: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draws the curves of a metrics.jsonl as one PNG: a panel per term, raw values thin, a running mean bold.

    Drawn are the loss, its terms, gradient norm and learning rate where the file has them. A panel whose mean
    is positive and spans more than a factor of 10 gets a logarithmic axis.

    Args:
        metrics: file that ``read_metrics`` reads.
        path: file to write; its folder is made if missing.

    Raises:
        UserError: the file has no value of any.
    """
    curves = read_metrics(metrics)
    labels = _labels()
    names = [name for name in labels if name in curves]
    if not names:
        raise UserError(f"save_loss_curves: {metrics} has no values of {', '.join(labels)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _draw({name: curves[name] for name in names}).savefig(path, format="png", dpi=110)
    return path


def _draw(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Figure with a panel per curve, without pyplot: no global state, no backend is chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = _labels()
    columns = min(len(curves), 4 if len(curves) > 6 else 3)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (name, (steps, values)) in zip(panels, curves.items(), strict=False):
        if name != "lr":  # exact, not noisy
            panel.plot(steps, values, color="#9ecae1", linewidth=0.7)
            values = _running_mean(values)
        panel.plot(steps, values, color="#08519c", linewidth=1.6)
        if len(steps) == 1:  # a line through one point is invisible
            panel.plot(steps, values, "o", color="#08519c", markersize=3)
        if values.min() > 0 and values.max() > 10 * values.min():
            panel.set_yscale("log")
        panel.set_ylabel(labels.get(name, name), fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(True, color="#e5e5e5", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean (n,) over up to a fortieth of the points on either side; fewer near the ends, against lag."""
    count = len(values)
    place, limit = np.arange(count), max(1, count // 40)
    reach = np.minimum(limit, np.maximum(np.minimum(place, place[::-1]), limit // 4))
    first, last = np.maximum(place - reach, 0), np.minimum(place + reach + 1, count)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last] - total[first]) / (last - first)
