"""What torchrun starts for the suite of the run: steps of one process and of several, side by side."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import elapsed_ms, in_turns
from pixelgen.config import TrainConfig, load_config
from pixelgen.data.order import Share
from pixelgen.data.source import build_dataset
from pixelgen.errors import UserError
from pixelgen.training.processes.world import World, leaving_together, start_world
from pixelgen.training.step import Trainer

ROOT = Path(__file__).parent.parent
ONE = "one"  # the provider that all others must agree with
TOLERANCE = 1e-5  # relative, of the first losses


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the processes are to do.

    Attributes:
        options: provider -> its command line; that of ``ONE`` runs in the first process alone.
        steps: whose losses are compared before anything is timed.
        repeats: timed steps of each provider.
    """

    options: dict[str, list[str]]
    steps: int
    repeats: int


class SentBytes(TorchDispatchMode):
    """Counts what this process sends in collectives, as rings do it.

    Of n processes, one sends (n - 1) / n of what an all-gather gives and of what a reduce-scatter takes, and
    twice that share of what an all-reduce sums.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes back as the collectives that it stands for
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            self.total += _sent(func._opname, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Sequence[Any]) -> float:
    if name in ("wait_tensor", "_wrap_tensor_autograd"):
        return 0.0
    if name == "_allgather_base_":
        return args[0].nbytes - args[1].nbytes
    if name == "_reduce_scatter_base_":
        return args[1].nbytes - args[0].nbytes
    if name in ("allreduce_", "all_reduce"):
        tensors = args[0] if isinstance(args[0], list) else [args[0]]
        if name == "all_reduce":
            size = dist.distributed_c10d._resolve_process_group(args[2]).size()
        else:
            size = dist.ProcessGroup.unbox(args[1]).size()
        return 2 * sum(tensor.nbytes for tensor in tensors) * (size - 1) / size
    raise NotImplementedError(f"what the collective {name} sends is not known here")


class Runner:
    """A trainer of one provider, with its part of the batches of synthetic images."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.device = config, world, world.device
        self.images = build_dataset(config.data)
        # the folder is not used: only features trained on the run's own images would be kept in it
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = Trainer(config, Path(folder), self.images, world)

    def step(self) -> dict[str, Tensor]:
        """One training step with the images that are due."""
        config, step, world = self.config, self.trainer.step, self.world
        share = Share(config.train.batch_size, config.seed, step, world.rank, world.size)
        images, labels = self.images.batch(self.images.order(step, share))
        return self.trainer.train_step(images.to(self.device), {"label": labels.to(self.device)})

    def losses(self, steps: int) -> tuple[list[float], float]:
        """The losses of the next steps, of all processes together, and the bytes sent in the last one."""
        found = []
        for _ in range(steps):
            with SentBytes() as sent:
                terms = self.step()
            found.append(self.world.sum(terms["loss"]).item())
        return found, sent.total


def wrong_losses(found: list[float], one: list[float]) -> str | None:
    """What is wrong with the losses of several processes, given those of one."""
    for step, (value, expected) in enumerate(zip(found, one, strict=True), start=1):
        if not abs(value - expected) <= TOLERANCE * abs(expected):
            return f"the loss of step {step} is {value:.9g}, that of one process {expected:.9g}"
    return None


@leaving_together()
def work(task: Task) -> dict[str, dict[str, Any]]:
    """Does a task; every process calls it.

    Returns:
        In the first process: provider -> its ``losses``, ``sent`` bytes, ``parameters``, and either ``wrong``
        or its ``timing``.
    """
    configs = {name: load_config(options)[0] for name, options in task.options.items()}
    config = configs[ONE]
    world = start_world(config.device, config.parallel)
    alone = World(world.device)
    results: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    for name, config in configs.items():
        if name == ONE and not world.is_main:
            continue
        runner = Runner(config, alone if name == ONE else world)
        losses, sent = runner.losses(task.steps)
        results[name] = {"losses": losses, "sent": sent, "parameters": runner.trainer.num_parameters}
        runners[name] = runner

    def judge() -> list[str]:
        for name in results:
            if wrong := wrong_losses(results[name]["losses"], results[ONE]["losses"]):
                results[name]["wrong"] = wrong
        return [name for name in configs if "wrong" not in results[name]]

    def once(name: str) -> float:
        dist.barrier()  # nobody computes while one process is timed alone
        elapsed = elapsed_ms(world.device, runners[name].step) if name in runners else 0.0
        dist.barrier()
        return elapsed

    right = world.on_main(judge)
    timings = in_turns({name: lambda name=name: once(name) for name in right}, task.repeats, warm_up=1)
    for name, timing in timings.items():
        if name in results:
            results[name]["timing"] = asdict(timing)
    return results


def launch(task: Task, processes: int, threads: int) -> dict[str, dict[str, Any]]:
    """Has processes of this machine do a task.

    Returns:
        What ``work`` gave.

    Raises:
        UserError: they failed; with the last line that they wrote.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with tempfile.TemporaryDirectory() as folder:
        todo, done = Path(folder) / "task.json", Path(folder) / "results.json"
        todo.write_text(json.dumps(asdict(task)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "benchmarks.processes", str(todo), str(done)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            told = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*Error: .*)$", ran.stderr, re.MULTILINE)
            raise UserError(f"the {processes} processes failed: {told[0] if told else ran.stderr.strip()}")
        return json.loads(done.read_text())


if __name__ == "__main__":
    found = work(Task(**json.loads(Path(sys.argv[1]).read_text())))
    if int(os.environ["RANK"]) == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
