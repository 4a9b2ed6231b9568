"""Settings of the whole test run: threads, and what happens to tests that need a GPU."""

import os

# libgomp spins while it waits: with busy cores a 12 ms step takes 2 s. It reads this when torch is first
# imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Uses the threads that OMP_NUM_THREADS allows, at most two: the tensors of these tests are small."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what carries the mark `gpu` where there is no CUDA device, with the reason in the summary."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Draws without a generator are the same in every run and in every order of the tests."""
    torch.manual_seed(0)
