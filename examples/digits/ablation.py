"""The rows of an ablation of the loss terms, and what is told about them: a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows that the others are held against: nothing, and what the paper adds its terms to; of PixelDiT the
# patches alone, and all of it.
BASELINES = ("flow", "repa")
PIXEL_BASELINES = ("no_pixels", "pixeldit")
# Column of ablation.csv -> heading, digits behind the point.
FIGURES = {
    "frechet": ("Frechet", 1),
    "accuracy": ("accuracy", 4),
    "variance": ("variance", 3),
    "seconds_per_step": ("s/step", 4),
}

Line = dict[str, str]  # of ablation.csv


@dataclass(frozen=True, kw_only=True)
class Study:
    """A row of the table: what it trains with.

    Attributes:
        label: as the table shows it.
        alignment, lpips, p_dino: weights of the terms; the paper's unless the row is about them.
        gate_t: threshold of the noise gate; 0 for none, as the paper adds its terms one by one.
        gate: schedule of the noise gate.
        config: preset that the row changes; the default run's for the study of the loss terms.
        model: options of the model.
        paper_fid: FID of the same row in the paper (arXiv 2602.02493, Table 5: ImageNet 256, no guidance);
            None for a row that it does not have. Of rows of PixelDiT its own paper's (arXiv 2511.20645: 80
            epochs of ImageNet 256).
    """

    label: str
    alignment: float = 0.5
    lpips: float = 0.1
    p_dino: float = 0.01
    gate_t: float = 0.0
    gate: str = "hard"
    config: str = "digits"
    model: tuple[str, ...] = ()
    paper_fid: float | None = None

    @property
    def options(self) -> list[str]:
        """The row as options of ``pixelgen.train``."""
        values = {
            "alignment_weight": self.alignment,
            "lpips_weight": self.lpips,
            "p_dino_weight": self.p_dino,
            "gate_t": self.gate_t,
        }
        words = {name: f"{value:g}" for name, value in values.items()} | {"gate": self.gate}
        terms = [part for name, word in words.items() for part in (f"--loss.{name}", word)]
        preset = [] if self.config == "digits" else ["--config", self.config]
        return [*preset, *terms, *self.model]


def _pixeldit(label: str, *model: str, paper_fid: float | None = None) -> dict[bool, Study]:
    """Rows of PixelDiT, with PixelGen's perceptual terms or without."""
    plain = Study(label=label, lpips=0, p_dino=0, config="pixeldit-digits", model=model, paper_fid=paper_fid)
    return {
        False: plain,
        True: replace(
            plain, label=f"{label}, LPIPS, P-DINO", lpips=0.1, p_dino=0.01, gate_t=0.3, paper_fid=None
        ),
    }


_DUAL = _pixeldit("PixelDiT", paper_fid=2.36)
_NO_PIXELS = _pixeldit("no pixel path", "--model.pixel_depth", "0", paper_fid=8.53)
_PER_PATCH = _pixeldit("no pixel-wise AdaLN", "--model.pixel_modulation", "patch", paper_fid=3.50)

ROWS = {
    "flow": Study(label="flow matching alone", alignment=0, lpips=0, p_dino=0, paper_fid=34.85),
    "repa": Study(label="+ REPA", lpips=0, p_dino=0, paper_fid=23.67),
    "lpips": Study(label="+ REPA + LPIPS", p_dino=0, paper_fid=10.00),
    "p_dino": Study(label="all terms, no gate", paper_fid=7.46),
    "gate_0.1": Study(label="all terms, gate 0.1", gate_t=0.1, paper_fid=7.42),
    "gate_0.3": Study(label="all terms, gate 0.3", gate_t=0.3, paper_fid=7.53),
    "gate_0.6": Study(label="all terms, gate 0.6", gate_t=0.6, paper_fid=10.72),
    "gate_cosine": Study(label="all terms, cosine gate from 0.3", gate_t=0.3, gate="cosine"),
    "gate_sigmoid": Study(label="all terms, sigmoid gate at 0.3", gate_t=0.3, gate="sigmoid"),
    "gate_snr": Study(label="all terms, SNR gate from 0.3", gate_t=0.3, gate="snr"),
    "gate_learned": Study(label="all terms, learned gate from 0.3", gate_t=0.3, gate="learned"),
    "no_repa": Study(label="all but REPA, gate 0.3", alignment=0, gate_t=0.3, paper_fid=11.81),
    "lpips_0.5": Study(label="+ REPA + 0.5 LPIPS", lpips=0.5, p_dino=0, paper_fid=9.36),
    "p_dino_0.04": Study(label="all terms, no gate, 0.04 P-DINO", p_dino=0.04, paper_fid=6.62),
    "no_pixels": _NO_PIXELS[False],
    "per_patch": _PER_PATCH[False],
    "pixeldit": _DUAL[False],
    "no_pixels_terms": _NO_PIXELS[True],
    "per_patch_terms": _PER_PATCH[True],
    "pixeldit_terms": _DUAL[True],
}
TERM_ROWS = [name for name, study in ROWS.items() if study.config == "digits"]


class Table:
    """Means and standard deviations over the seeds that did not fail, row by row.

    Args:
        lines: finished and failed cells, at equal steps.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.values: dict[str, dict[str, Line]] = {}  # row -> seed -> line of what finished
        self.failures: dict[str, dict[str, str]] = {}  # row -> seed -> reason; the same rows
        for line in lines:
            finished = self.values.setdefault(line["row"], {})
            failed = self.failures.setdefault(line["row"], {})
            if line["failed"]:
                failed[line["seed"]] = line["failed"]
            else:
                finished[line["seed"]] = line

    def num_seeds(self, row: str) -> int:
        """Seeds of a row, finished or failed."""
        return len(self.values[row]) + len(self.failures[row])

    def label(self, row: str) -> str:
        """What a row trains with, and how much of it failed."""
        failed = len(self.failures[row])
        if not failed:
            return ROWS[row].label
        share = "" if failed == self.num_seeds(row) else f"{failed} of {self.num_seeds(row)} "
        return f"{ROWS[row].label} ({share}failed)"

    def of_seeds(self, row: str, column: str) -> list[float]:
        """The values of a row, in the order of its seeds; none where all failed."""
        return [float(line[column]) for line in self.values[row].values()]

    def mean(self, row: str, column: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.of_seeds(row, column))

    def deviation(self, row: str, column: str) -> float | None:
        """Standard deviation over the seeds (n - 1); None of one seed."""
        values = self.of_seeds(row, column)
        return statistics.stdev(values) if len(values) > 1 else None

    def gain(self, row: str, baseline: str) -> str:
        """How much the Frechet distance falls against another row, and for how many seeds it does."""
        if row == baseline or baseline not in self.values:
            return ""
        pairs = [
            (float(line["frechet"]), float(self.values[baseline][seed]["frechet"]))
            for seed, line in self.values[row].items()
            if seed in self.values[baseline]
        ]
        if not pairs:
            return ""
        change = statistics.fmean(ours - theirs for ours, theirs in pairs)
        return f"{change:+.1f}, {sum(ours < theirs for ours, theirs in pairs)} of {len(pairs)}"

    def markdown(self, steps: int, sample_steps: int) -> str:
        """The table as text."""
        has_terms = any(ROWS[row].config == "digits" for row in self.values)
        baselines = BASELINES if has_terms else PIXEL_BASELINES
        head = ["row", "terms", *(heading for heading, _ in FIGURES.values())]
        head += [*(f"Frechet against `{name}`" for name in baselines), "the paper's FID"]
        lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
        for row in self.values:
            cells, fid = [f"`{row}`", self.label(row)], ROWS[row].paper_fid
            for column, (_, digits) in FIGURES.items():
                if not self.values[row]:
                    cells.append("failed")
                    continue
                deviation = self.deviation(row, column)
                spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
                cells.append(f"{self.mean(row, column):.{digits}f}{spread}")
            cells += [*(self.gain(row, name) for name in baselines), "" if fid is None else f"{fid:.2f}"]
            lines.append(cells)
        seeds = max(map(self.num_seeds, self.values))
        told = (
            f"Digits, {steps} steps; number of seeds: {seeds}; mean ± standard deviation over them; "
            f"{sample_steps} Heun steps without guidance. Against a row: mean change of the Frechet distance "
            "at the same seed, below 0 is better, and for how many seeds it falls. The paper's FID: the same "
            "on ImageNet 256 (terms: arXiv 2602.02493, Table 5; PixelDiT: 2511.20645, 80 epochs)."
        )
        text = f"{told}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
        failures = "".join(
            f"- `{row}`, seed {seed}, failed: {reason}\n"
            for row, reasons in self.failures.items()
            for seed, reason in reasons.items()
        )
        return f"{text}\n{failures}" if failures else text

    def draw(self, steps: int) -> Figure:
        """A panel per figure: every seed, means and standard deviations."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = list(self.values)
        figure = Figure(figsize=(13, 1.4 + 0.42 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(FIGURES), sharey=True, squeeze=False)[0]
        for panel, (column, (heading, _)) in zip(panels, FIGURES.items(), strict=True):
            for place, row in enumerate(rows):
                values = self.of_seeds(row, column)
                if not values:
                    continue
                panel.plot(values, [place] * len(values), "o", color="#9ecae1", markersize=4)
                panel.errorbar(
                    self.mean(row, column),
                    place,
                    xerr=self.deviation(row, column) or 0,
                    fmt="D",
                    color="#08519c",
                    markersize=5,
                    capsize=3,
                )
            panel.set_title(heading, fontsize=10)
            panel.tick_params(labelsize=8)
            panel.locator_params(axis="x", nbins=4)
            panel.margins(x=0.1)
            panel.grid(True, color="#e5e5e5", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(range(len(rows)), [self.label(row) for row in rows], fontsize=9)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)  # from the top, with rows that have no point
        figure.suptitle(f"Digits, {steps} steps: every seed, mean and standard deviation", fontsize=10)
        return figure
