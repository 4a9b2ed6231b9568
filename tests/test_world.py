"""What processes agree on, and how they part."""

from __future__ import annotations

import time

import pytest
import torch
from forked import Forked
from processes import rank_environments

from pixelgen.config import ParallelConfig
from pixelgen.errors import AlreadyReported, UserError
from pixelgen.training.processes import world as processes
from pixelgen.training.processes.world import World, leaving_together, start_world


@pytest.mark.parametrize(
    ("raised", "leaves"),
    [
        (None, True),
        (UserError("all have this one"), True),
        (FileNotFoundError("and this"), True),
        (RuntimeError("out of memory, on one GPU"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_an_end_that_all_come_to_waits_for_the_others(monkeypatch, raised, leaves):
    left = []
    monkeypatch.setattr(processes, "_leave", lambda: left.append(True))

    def end() -> None:
        with leaving_together():
            if raised is not None:
                raise raised

    if raised is None:
        end()
    else:
        with pytest.raises(type(raised)):
            end()
    assert left == [True] * leaves


def test_who_takes_long_says_so(monkeypatch, capsys):
    monkeypatch.setattr(processes, "_REPORT_EVERY_S", 0.1)
    cpu = torch.device("cpu")
    with World(cpu)._reported_if_slow("opening the data"):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""
    with World(cpu, rank=1, size=2)._reported_if_slow("opening the data"):
        time.sleep(0.3)
    assert "rank 1: opening the data for 0 s; the others wait\n" in capsys.readouterr().err
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


_SLOW_START = """
import time
from datetime import timedelta
import torch.distributed as dist
from pixelgen.config import ParallelConfig
from pixelgen.training.processes.world import start_world

init = dist.init_process_group
dist.init_process_group = lambda backend, timeout: init(backend, timeout=timedelta(seconds=2))
world = start_world("cpu", ParallelConfig())
print(world.in_turn("downloading", lambda: time.sleep(5) or world.rank), flush=True)
"""


def test_a_slow_start_is_waited_for(tmp_path):
    """Longer than a collective of the training may take."""
    store, environments = rank_environments(2)
    with (tmp_path / "log").open("w") as log:
        processes = [
            Forked(["-c", _SLOW_START], environment=environment, stderr=log) for environment in environments
        ]
    try:
        printed = ["".join(process.lines(60)) for process in processes]
        assert [process.wait(60) for process in processes] == [0, 0], (tmp_path / "log").read_text()
    finally:
        for process in processes:
            process.kill()
    del store
    assert printed == ["0\n", "1\n"]


@pytest.mark.parametrize(
    ("count", "launcher", "expected"),
    [
        (8, "torchrun", "cuda:3"),
        (8, "srun", "cuda:3"),
        (1, "srun", "cuda:0"),  # that shows each process its own
        (1, "torchrun", None),
        (2, "srun", None),
    ],
)
def test_each_process_gets_a_gpu_of_its_own(monkeypatch, count, launcher, expected):
    for name, value in {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    chosen = []
    monkeypatch.setattr(processes, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(processes, "gloo_group", lambda _: None)
    if expected is None:
        with pytest.raises(AlreadyReported, match=rf"8 processes on .*, which has {count} GPUs; start fewer"):
            start_world("cuda", ParallelConfig())
        return
    world = start_world("cuda", ParallelConfig())
    assert str(world.device) == expected and chosen == [world.device]
    assert (world.rank, world.size, world.local_rank, world.local_size) == (11, 16, 3, 8)
