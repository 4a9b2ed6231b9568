"""What a suite is, and the one way in which all of them are run, written and drawn."""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import draw, setting
from benchmarks.report import Results, Row
from pixelgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is timed in one go.

    Attributes:
        case: by which `--only` names it.
        label: what the bar shows meanwhile.
        rows: measures; a row is written as soon as it is yielded.
    """

    case: str
    label: str
    rows: Callable[[], Iterable[Row]]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite of `python -m benchmarks`.

    Attributes:
        name: of the suite and of its files.
        parts: what a run times, the most valuable first.
        baselines: providers that others are held against; of a case the first that was timed.
        plots: name of a picture, after that of the suite -> the columns that it shows.
        is_wide: tables have a line per case, with a column per provider, and not a line per provider.
        device: the only kind of device that it runs on; None for any.
        cpu_threads: unless `--threads` says otherwise; None for torch's.
    """

    name: str
    parts: Callable[["Run"], list[Part]]
    baselines: tuple[str, ...]
    plots: dict[str, tuple[str, ...]]
    is_wide: bool = False
    device: str | None = None
    cpu_threads: int | None = None

    def draw(self, folder: Path) -> list[Path]:
        """Draws table and plots from the CSV file in `folder`, and from nothing else.

        Raises:
            UserError: there is none.
        """
        path = folder / f"{self.name}.csv"
        if not path.exists():
            raise UserError(f"{path}: there is no such file to draw from")
        return draw.draw(path, baselines=self.baselines, plots=self.plots, is_wide=self.is_wide)


class Run:
    """One call of the command line: its device, setting and options, and what went wrong.

    Raises:
        UserError: the device is not there, or not one that the suite runs on.
    """

    def __init__(self, suite: Suite, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        if suite.device and arguments.device not in (None, suite.device):
            raise UserError(f"--device must be {suite.device} with --suite {suite.name}")
        self.device = setting.pick_device(suite.device or arguments.device)
        threads = arguments.threads or (suite.cpu_threads if self.device.type == "cpu" else None)
        if threads:
            torch.set_num_threads(threads)
        self.setting = setting.columns(self.device)
        self.folder = setting.folder_of(arguments.out, self.setting["device"])
        self.results = Results(self.folder / f"{suite.name}.csv", self.setting)
        self.has_failed = False
        self._bar: tqdm | None = None

    def chosen(self, option: str, known: Sequence[str], always: Sequence[str] = ()) -> list[str]:
        """Those of `known` that an option asks for, all when it was not given, and those of `always`.

        Raises:
            UserError: the option has another name.
        """
        names = getattr(self.arguments, option)
        for name in names or ():
            if name not in known:
                raise UserError(f"--{option} must be one of {', '.join(known)}, got {name}")
        return [name for name in known if not names or name in names or name in always]

    def wrong(self, what: str, provider: str, problem: str, *, is_ours: bool = True) -> None:
        """Tells that a provider computes something else and is not timed; if it is ours, the run fails."""
        tqdm.write(f"{what}: {provider} is wrong and not timed: {problem}")
        self.has_failed |= is_ours

    def show(self, text: str) -> None:
        """Shows at the bar what is being done."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def time(self, parts: list[Part]) -> None:
        """Times the parts that `--only` asks for, until `--max-seconds` are over.

        Raises:
            UserError: an unknown name, nothing to time, or the folder of the results cannot be made.
        """
        cases = self.chosen("only", list(dict.fromkeys(part.case for part in parts)))
        parts = [part for part in parts if part.case in cases]
        if not parts:
            raise UserError("nothing is left to time: the options exclude each other")
        setting.make(self.folder)
        limit = self.arguments.max_seconds
        begin = time.monotonic()
        with tqdm(total=len(parts), unit="part", dynamic_ncols=True) as self._bar:
            for done, part in enumerate(parts):
                if limit is not None and time.monotonic() - begin > limit:
                    left = ", ".join(part.label for part in parts[done:])
                    tqdm.write(f"--max-seconds {limit:g} are over; not timed: {left}")
                    break
                self.show(part.label)
                for row in part.rows():
                    self.results.add(row)
                self._bar.update()
        self._bar = None


def run(suite: Suite, arguments: argparse.Namespace) -> int:
    """Times what the command line asks for, writes CSV, table and plots, prints the ratios.

    Returns:
        0, or 1 when something of ours was wrong.
    """
    this = Run(suite, arguments)
    if arguments.draw_only:
        print(*suite.draw(this.folder), sep="\n")
        return 0
    this.time(suite.parts(this))
    if not this.results.rows:
        print("nothing was timed")
        return 1
    drawn = [] if arguments.csv_only else suite.draw(this.folder)
    print(draw.summary(this.results.rows, suite.baselines, is_wide=suite.is_wide))
    names = ", ".join(path.name for path in drawn)
    print(f"\n{this.results.path}{f' and, drawn from it, {names}' if drawn else ''}")
    return int(this.has_failed)
