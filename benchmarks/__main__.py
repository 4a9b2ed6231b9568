"""Command line of the benchmarks."""

import argparse
import os
import sys
from pathlib import Path

# libgomp spins while it waits: with busy cores a 12 ms step takes 2 s. Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The profiler, which counts memory on the CPU, otherwise writes four lines to the terminal at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Options that not every suite has.
OPTIONS = {
    "kernels": ("only", "shapes", "dtypes", "providers"),
    "step": ("batch", "providers"),
    "perceptual": ("only", "batch", "providers"),
    "data": ("batch", "providers"),
    "train": ("only", "batch"),
}


def names(text: str) -> list[str]:
    """The names of a list separated by commas."""
    return [name.strip() for name in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="kernels: times every op against eager PyTorch and torch.compile, once it is right. "
        "step: times whole training steps. perceptual: times LPIPS, P-DINO and REPA's targets, gathered and "
        "masked, and their ops. data: times decoding, prepared shards and the loader. "
        "train: times what data, checkpoints and more processes cost a step. "
        "Rows go to a CSV in --out; tables and plots are drawn from it. "
        "Options that take names take several, separated by commas, or are repeated.",
    )

    def add_names(option: str, metavar: str, text: str) -> None:
        parser.add_argument(option, metavar=metavar, action="extend", type=names, help=text)

    parser.add_argument("--suite", choices=list(OPTIONS), default="kernels", help="what to time")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one that PyTorch can use"
    )
    add_names(
        "--only", "OP", "kernels, perceptual: these ops only; train: these of step, save and processes only"
    )
    add_names("--shapes", "MODEL", "kernels: the shapes of these models only, such as L/16")
    add_names(
        "--dtypes",
        "DTYPE",
        "kernels: these dtypes only, fp32 or bf16; default: both, on the CPU bf16 for L/16 alone",
    )
    add_names(
        "--providers",
        "PROVIDER",
        "these only: eager, compile, ours, for step also ours_compile, for perceptual also masked (of the op "
        "branch, which has masked and ours), for data pil, center, fast, prepared, folder and others; the "
        "baseline, eager, masked, pil or folder, is always timed",
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
        help="step, perceptual, data, train: images per step; default: 64, on the CPU 8 but for data",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results; default: benchmarks/results/ and the device and month",
    )
    arguments = parser.parse_args(argv)
    for name, least in (("threads", 1), ("repeats", 3), ("batch", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
        if name not in OPTIONS[arguments.suite] and getattr(arguments, name) is not None:
            parser.error(f"--{name} has no meaning with --suite {arguments.suite}")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    from benchmarks import data, kernels, perceptual, step, train
    from pixelgen.errors import UserError

    suites = {"kernels": kernels.run, "step": step.run, "perceptual": perceptual.run, "data": data.run}
    suites["train"] = train.run
    try:
        return suites[arguments.suite](arguments)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
