"""A vote on when to stop."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pixelgen.training.processes.world import World, gloo_group


class StopVote:
    """Lets all processes stop after the same step, though what stops them reaches one of them first."""

    def __init__(self, world: World) -> None:
        self._group = gloo_group(world.size)

    def count(self, reason: int) -> int:
        """Gives a vote, 0 to go on; returns the highest one of all processes.

        On the host: the device works on meanwhile.
        """
        if self._group is None:
            return reason
        votes = torch.tensor(reason)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return int(votes)
