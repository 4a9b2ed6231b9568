"""Runs of the training command in processes that can be killed one by one, unlike torchrun's."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from forked import Forked
from torch.distributed import TCPStore

from pixelgen.training.checkpoint.read import find_checkpoint, list_checkpoints, load_part

COMMAND = Path(__file__).with_name("train_command.py")
# Everything that has a state: all terms, a trained gate and discriminator, a weight of each process.
EVERYTHING = [
    *("--loss.gate", "learned", "--loss.adversarial_weight", "0.1", "--loss.adversarial_start_step", "3"),
    *("--loss.balance", "released", "--loss.balance_start_step", "2", "--loss.balance_every", "3"),
    *("--ema.decay", "[0.9,0.99]", "--ema.power", "[0.1]", "--data.flip", "true"),
    *("--optimizer.skip_grad_norm", "1000"),
]
SMALL = [
    *("--device", "cpu", "--threads", "1", "--train.batch_size", "12", "--train.sample_every", "0"),
    *("--model.depth", "3", "--model.width", "32", "--model.heads", "2", "--train.log_every", "1"),
]


def rank_environments(processes: int) -> tuple[TCPStore, list[dict[str, str]]]:
    """Where the processes of a job meet, which holds its port from the start as torchrun's does; and the
    variables that make them its ranks. It must be kept as long as they run."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes)}
    common |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common["TORCHELASTIC_RESTART_COUNT"] = "0"
    return store, [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def signal_from_elsewhere(pids: Iterable[int]) -> None:
    """Interrupts and terminates processes as a terminal and a scheduler do: not from their parent."""
    for name in ("INT", "TERM"):
        subprocess.run(["kill", "-s", name, *map(str, pids)], check=True)


class Job:
    """``python -m pixelgen.train``, but for the loss curves, in a number of processes.

    The first one's lines are read.

    Args:
        arguments: of the command.
        processes: how many.
        log: gets the errors of all, and what the others print.
        features: embedded features of the digits, to save their training.
        script: what runs it, given the features and the arguments.
    """

    def __init__(
        self,
        arguments: list[str],
        processes: int = 1,
        *,
        log: Path,
        features: Path | None = None,
        script: Path = COMMAND,
    ) -> None:
        command = [str(script), str(features or "")]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        self._store, ranks = rank_environments(processes) if processes > 1 else (None, [{}])
        self.processes: list[Forked] = []
        self.log = log
        with log.open("a") as errors:
            for rank in ranks:
                stdout = None if rank is ranks[0] else errors
                process = Forked(
                    [*command, *arguments], environment=environment | rank, stdout=stdout, stderr=errors
                )
                self.processes.append(process)

    def lines(self) -> Iterator[str]:
        """What the first process prints, as it prints it."""
        return self.processes[0].lines()

    def until_step(self, step: int, saved_in: Path | None = None) -> int:
        """Reads up to the line of a step, and until a run's folder has a checkpoint; the step reached.

        Raises:
            RuntimeError: the job ended before; tells how.
        """
        for line in self.lines():
            is_reached = line.startswith("step ") and int(line.split()[1]) >= step
            if is_reached and (saved_in is None or list_checkpoints(saved_in)):
                return int(line.split()[1])
        raise RuntimeError(f"exit codes {self.wait()} before step {step}\n{self.log.read_text()[-2000:]}")

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.send_signal(number)

    def kill(self) -> None:
        """All processes at once, as when the power goes."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit codes, of all processes."""
        try:
            for _ in self.processes[0].lines(timeout):  # a pipe that is full would hold it up
                pass
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def train(
    arguments: list[str],
    processes: int = 1,
    *,
    log: Path,
    code: int = 0,
    features: Path | None = None,
    script: Path = COMMAND,
) -> str:
    """Runs a job to its end; returns what the first process printed, and all errors."""
    job = Job(arguments, processes, log=log, features=features, script=script)
    try:
        lines = "".join(job.lines())
        codes = job.wait()
    finally:
        job.signal(signal.SIGKILL)
    text = lines + log.read_text()
    assert codes == [code] * processes, f"exit codes {codes}\n{text}"
    return text


def stored(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    return load_part(find_checkpoint(run_dir), "")


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bit-equal, or that only one has."""
    return [
        key for key in sorted(a.keys() | b.keys()) if key not in a or key not in b or not a[key].equal(b[key])
    ]
