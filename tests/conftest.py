"""Settings of the whole test run: threads, and what happens to tests that need a GPU."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

# libgomp spins while it waits: with busy cores a 12 ms step takes 2 s. It reads this when torch is first
# imported. One thread in each of the test processes, which use all cores together, and in what they start.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from forked import allow_interrupts

MOST_WORKERS = 16  # each takes one to two gigabytes


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker per core that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, usable)


def pytest_configure(config: pytest.Config) -> None:
    """Uses the threads that OMP_NUM_THREADS allows, at most two: the tensors of these tests are small."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    allow_interrupts()
    config.addinivalue_line("markers", "curves: draws the loss curves of its runs, whatever `no_curves` says")


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


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that `make(folder)` has filled, by one of the test processes for all.

    Nobody may write into it afterwards: copy what is to change.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / f"once_{name}"
        with FileLock(root / f"once_{name}.lock"):
            if not folder.exists():
                partial = tmp_path_factory.mktemp(name)
                make(partial)
                partial.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def embedded_file(made_once) -> Path:
    """Features of the digits, trained once: they depend on data, patch size and seed only."""
    from pixelgen.data.sources.digits import Digits
    from pixelgen.encoders.embedded import FILE_NAME, EmbeddedConfig, embedded_features

    def make(folder: Path) -> None:
        digits = Digits()
        config = EmbeddedConfig(channels=1, patch_size=2, num_classes=10, seed=0)
        embedded_features(folder, config, lambda: digits.batch(range(len(digits))))

    return made_once("embedded", make) / FILE_NAME


@pytest.fixture
def with_embedded(embedded_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New runs find the features in their folder, as a resumed run does."""
    from pixelgen.training.step import Trainer

    start = Trainer.__init__

    def init(self, config, run_dir, *arguments):
        if not (run_dir / embedded_file.name).exists():
            shutil.copy(embedded_file, run_dir)
        start(self, config, run_dir, *arguments)

    monkeypatch.setattr(Trainer, "__init__", init)


@pytest.fixture
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no loss curves, which takes seconds; but in a test with the mark `curves`."""
    if "curves" not in request.keywords:
        monkeypatch.setattr("pixelgen.training.log.save_loss_curves", lambda *_: None)


@pytest.fixture
def flow_run(tmp_path: Path, made_once) -> Path:
    """`run`, a copy of a run of five steps of flow matching with the checkpoints of steps 4 and 5."""
    from training import FLOW_ONLY, options

    from pixelgen.train import main

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pixelgen.training.log.save_loss_curves", lambda *_: None)
            more = ["--train.checkpoint_every", "2", "--train.keep_checkpoints", "2"]
            assert main(options(folder, "run", 5, *FLOW_ONLY, *more)) == 0

    return Path(shutil.copytree(made_once("flow", make) / "run", tmp_path / "run"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hugging Face library keeps of a data set lies beside the test's own files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")
