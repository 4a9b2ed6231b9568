"""Command line of the benchmarks."""

import argparse
import os
import sys
from pathlib import Path

# libgomp spins while it waits: with busy cores a 12 ms step takes 2 s. Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

RESULTS = Path(__file__).parent / "results"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times every op against eager PyTorch and torch.compile, once it is known to be right. "
        "Rows go to a CSV in --out; the table and the plot beside it are drawn from that CSV.",
    )
    parser.add_argument("--suite", choices=["kernels"], default="kernels", help="what to time")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one that the kernels can use"
    )
    parser.add_argument("--only", metavar="OP", action="append", help="time this op only; may be repeated")
    parser.add_argument(
        "--shapes", metavar="MODEL", action="append", help="time the shapes of this model only, such as L/16"
    )
    parser.add_argument("--dtypes", metavar="DTYPE", action="append", help="time this dtype only: fp32, bf16")
    parser.add_argument(
        "--providers",
        metavar="PROVIDER",
        action="append",
        help="time this provider only: eager, compile, ours; eager is always there as the ratios' base",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument(
        "--repeats", type=int, default=30, metavar="N", help="timed calls of each row (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the CSV, table and plot"
    )
    arguments = parser.parse_args(argv)
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.repeats < 3:
        parser.error(f"--repeats must be at least 3, got {arguments.repeats}")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    from benchmarks import kernels

    try:
        kernels.run(arguments)
    except ValueError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
