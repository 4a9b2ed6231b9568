"""Where the time of one training step goes: `python -m benchmarks.profile_step`."""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import setting
from benchmarks.suites.step import BATCH, CASES, KERNELS, Runner

WARM_UP = 2


def report(device: torch.device, case: str, provider: str, batch: int, rows: int) -> str:
    """The step's most expensive kernels, on a CPU its ops, and the time of all of them."""
    runner = Runner(device, case, provider, batch)
    for _ in range(WARM_UP):
        runner.step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        runner.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    order = f"self_{device.type}_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=90)
    columns = ", ".join(f"{name} {value}" for name, value in setting.columns(device).items() if value)
    return f"{case}, {provider}, {batch} images; {columns}\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--case", choices=list(CASES), default="all_terms")
    parser.add_argument("--provider", choices=list(KERNELS), default="ours")
    parser.add_argument("--batch", type=int, metavar="B", help="images; default: 64, on the CPU 8")
    parser.add_argument("--rows", type=int, default=40, help="lines of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the terminal")
    arguments = parser.parse_args()
    device = setting.pick_device(arguments.device)
    batch = arguments.batch or BATCH[device.type]
    text = report(device, arguments.case, arguments.provider, batch, arguments.rows)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
