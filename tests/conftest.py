"""Settings of the whole test run: threads, and what happens to tests that need a GPU."""

import os
import shutil
from pathlib import Path

# libgomp spins while it waits: with busy cores a 12 ms step takes 2 s. It reads this when torch is first
# imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Uses the threads that OMP_NUM_THREADS allows, at most two: the tensors of these tests are small."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
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
def embedded_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the digits, trained once: they depend on data, patch size and seed only."""
    from pixelgen.data.digits import Digits
    from pixelgen.encoders.embedded import FILE_NAME, EmbeddedConfig, embedded_features

    folder = tmp_path_factory.mktemp("embedded")
    digits = Digits()
    config = EmbeddedConfig(channels=1, patch_size=2, num_classes=10, seed=0)
    embedded_features(folder, config, lambda: (digits.images, digits.labels))
    return folder / FILE_NAME


@pytest.fixture
def with_embedded(embedded_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New runs find the features in their folder, as a resumed run does."""
    from pixelgen.trainer import Trainer

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
        monkeypatch.setattr("pixelgen.trainlog.save_loss_curves", lambda *_: None)
