"""The progress bar of the sampling commands."""

from __future__ import annotations

from tqdm import tqdm


class ImageBar(tqdm):
    """Counts images; ``update_to`` fits the ``progress`` argument of ``Pipeline.sample``."""

    def __init__(self, *, total: int, desc: str, leave: bool = True) -> None:
        super().__init__(total=total, desc=desc, leave=leave, unit="img", dynamic_ncols=True)

    def update_to(self, done: int) -> None:
        """Moves the bar to ``done`` images."""
        self.update(done - self.n)
