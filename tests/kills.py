"""Kills a run again and again, resumes it each time, and compares its end with that of a run left alone.

    python tests/kills.py --kills 20 --processes 2

Every second kill hits while a checkpoint is being written. The command exits with 1 unless every resume
succeeds and the final state, averages and optimizers included, is bit-equal.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from processes import EVERYTHING, SMALL, Job, differences, stored, train

from pixelgen.encoders.embedded import FILE_NAME

STEPS_PER_KILL = 9


def kill_in_save(job: Job, run_dir: Path, wait: float) -> None:
    """Kills a little after a checkpoint has begun to be written."""
    while job.processes[0].poll() is None and not list((run_dir / "checkpoints").glob(".step_*.partial")):
        time.sleep(0.0005)
    time.sleep(wait)
    job.kill()


def run(
    kills: int, processes: int, seed: int, folder: Path, features: Path | None = None, tell=print
) -> list[str]:
    """Trains with and without kills.

    Args:
        kills, processes, seed: as on the command line.
        folder: for the runs.
        features: embedded features of the digits, to save their training.
        tell: is called as ``print`` is.

    Returns:
        What differs at the end; empty when all is well.
    """
    draw = random.Random(seed)
    steps = STEPS_PER_KILL * (kills + 1)
    options = [*SMALL, *EVERYTHING, "--out_dir", str(folder), "--train.max_steps", str(steps)]
    options += ["--train.checkpoint_every", "3"]
    train([*options, "--name", "alone"], processes, log=folder / "alone.log", features=features)
    killed = {"log": folder / "killed.log", "features": folder / "alone" / FILE_NAME}
    reached = 0
    for number in range(kills):
        job = Job([*options, "--name", "killed", "--resume", "auto"], processes, **killed)
        found = job.until_step(reached + draw.randint(1, STEPS_PER_KILL - 2))
        in_save = number % 2 == 0
        if in_save:
            kill_in_save(job, folder / "killed", draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 0.1))
            job.kill()
        saved = sorted(path.name for path in (folder / "killed" / "checkpoints").glob("step_*"))
        reached = int(saved[-1].removeprefix("step_")) if saved else 0
        place = "in a save" if in_save else "anywhere"
        tell(f"kill {number + 1} of {kills}, {place}, after step {found}: ", end="")
        tell(f"goes on from {reached or 'the start'}", flush=True)
    train([*options, "--name", "killed", "--resume", "auto"], processes, **killed)
    return differences(stored(folder / "alone"), stored(folder / "killed"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        found = run(arguments.kills, arguments.processes, arguments.seed, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if found:
        print(f"{len(found)} tensors differ: {', '.join(found[:5])}")
        return 1
    print(f"{arguments.kills} kills, {arguments.processes} processes: bit-equal to the run left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
