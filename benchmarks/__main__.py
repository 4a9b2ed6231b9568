"""Command line of the benchmarks."""

import argparse
import importlib
import os
import sys
from pathlib import Path

# libgomp spins while it waits: with busy cores a 12 ms step takes 2 s. Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The profiler, which counts memory on the CPU, otherwise writes four lines to the terminal at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Suites, modules of benchmarks.suites, and the options that not every one has.
OPTIONS = {
    "kernels": ("shapes", "dtypes", "providers"),
    "step": ("batch", "providers"),
    "pixel_block": ("batch", "providers"),
    "perceptual": ("batch", "providers"),
    "data": ("batch", "providers"),
    "train": ("batch",),
    "machine": ("batch", "dtypes"),
}


def names(text: str) -> list[str]:
    """The names of a list separated by commas."""
    return [name.strip() for name in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="kernels: every op against eager PyTorch, torch.compile and Liger, once it is right. "
        "step: whole training steps. pixel_block: a block of PixelDiT's pixel path. perceptual: LPIPS, "
        "P-DINO and REPA's targets, gathered and masked, and their ops. data: decoding, prepared shards and "
        "the loader. train: what data, checkpoints and more processes cost a step. machine: copy bandwidth, "
        "the models' matrix products, attention backends. Rows go to a CSV in --out, each as soon as it is "
        "measured; table and plots are drawn from it.",
    )

    def add_names(option: str, metavar: str, text: str) -> None:
        parser.add_argument(option, metavar=metavar, action="extend", type=names, help=text)

    parser.add_argument("--suite", choices=list(OPTIONS), default="kernels", help="what to time")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one that PyTorch can use"
    )
    add_names("--only", "CASE", "these cases of the suite only, such as swiglu; several by commas")
    add_names("--shapes", "MODEL", "kernels: the shapes of these models only, such as L/16")
    add_names(
        "--dtypes",
        "DTYPE",
        "kernels, machine: these dtypes only, fp32 or bf16; default of kernels: both, on the CPU bf16 for "
        "L/16 alone; of machine: bf16, on the CPU fp32",
    )
    add_names(
        "--providers",
        "PROVIDER",
        "these only: eager, compile, liger, ours, for step also ours_compile, for pixel_block "
        "ours_recomputed, for perceptual also masked, for data pil, center, fast, prepared, folder and "
        "others; but for step, the provider that the others are held against is timed as well",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="timed calls of each row; default: as many as fit into a second, at least 7",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="images per step; default: 64, of pixel_block 16; on the CPU 8, of data 64, of machine 1, of "
        "pixel_block 2",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        metavar="S",
        help="after so many nothing more is begun, and what is missing is named",
    )
    parser.add_argument("--csv-only", action="store_true", help="draw no table and no plots")
    parser.add_argument(
        "--draw-only",
        action="store_true",
        help="time nothing: draw table and plots of the CSV in --out again",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results; default: benchmarks/results/ and the device and month",
    )
    arguments = parser.parse_args(argv)
    for name, least in (("threads", 1), ("repeats", 3), ("batch", 1), ("max_seconds", 0)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
        if name not in OPTIONS[arguments.suite] and getattr(arguments, name) is not None:
            parser.error(f"--{name} has no meaning with --suite {arguments.suite}")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    from benchmarks import suite
    from pixelgen.errors import UserError

    try:
        return suite.run(importlib.import_module(f"benchmarks.suites.{arguments.suite}").SUITE, arguments)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
