"""With what a row was measured: device, threads, commit, versions."""

import platform
import re
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from pixelgen_kernels import build_info

from pixelgen.errors import UserError

RESULTS = Path(__file__).parent / "results"


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def pick_device(name: str | None) -> torch.device:
    """The device of `--device`; without one, CUDA where it is usable, else the CPU."""
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise UserError("--device cuda needs a CUDA device, and torch.cuda.is_available() is False")
    return torch.device(name or ("cuda" if usable else "cpu"))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the instruction set that the kernels use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model} ({build_info()['cpu_isa']})"


def commit() -> str:
    """Short hash of the checkout, with "-dirty" when files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def columns(device: torch.device) -> dict[str, str]:
    """The columns of every row that say with what it was measured."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": device_name(device),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": (torch.version.cuda or "") if device.type == "cuda" else "",
        "threads": str(torch.get_num_threads()),
        "triton": triton,
    }


def folder_of(out: Path | None, device: str) -> Path:
    """The folder of the results: `--out`, or one that is named after the device and the month."""
    return out or RESULTS / f"{slug(device)}_{date.today():%Y%m}"


def make(folder: Path) -> None:
    """Makes the folder of the results.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made a folder: {error.strerror}") from error
