"""The order of images, and the loader: the same batches for any number of workers and ranks."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from images import assert_same, fill, pair, united
from pixelgen_kernels import philox_uniform
from processes import signal_from_elsewhere

from pixelgen.data import ClassFolder, Digits, Share, build_loader, shuffled_indices
from pixelgen.data.decode import read_image

# --- the order


def _order(steps, num_images, share):
    return np.concatenate([shuffled_indices(step, num_images, share) for step in range(steps)])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 26])
def test_every_epoch_is_a_permutation(batch_size):
    size = 10
    order = _order(130 // batch_size + 1, size, Share(batch_size, seed=3))
    epochs = order[:130].reshape(-1, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 10
    assert order.dtype == np.int64


def test_order_does_not_depend_on_batch_size_or_order_of_calls():
    whole = _order(1, 11, Share(60, seed=5))
    np.testing.assert_array_equal(_order(15, 11, Share(4, seed=5)), whole)
    backwards = [shuffled_indices(step, 11, Share(4, seed=5)) for step in reversed(range(15))]
    np.testing.assert_array_equal(np.concatenate(backwards[::-1]), whole)


def test_order_is_the_same_everywhere():
    # Stored values: a change of the shuffle would change every resumed run.
    assert shuffled_indices(0, 8, Share(8, seed=0)).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert shuffled_indices(2, 8, Share(6, seed=123)).tolist() == [2, 7, 0, 3, 6, 4]


def test_seeds_differ():
    orders = {tuple(_order(1, 20, Share(20, seed))) for seed in (-1, 0, 1, 2**63 + 5)}
    assert len(orders) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_global_batch(world_size):
    for step in range(4):
        shares = [Share(12, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
        parts = [shuffled_indices(step, 10, share) for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), shuffled_indices(step, 10, Share(12, seed=1)))
        assert {len(part) for part in parts} == {12 // world_size}


# --- the loader


def _take(loader, count):
    batches = [pair(next(loader)) for _ in range(count)]
    loader.close()
    return batches


@pytest.mark.parametrize("batch_size", [64, 2000])
def test_loader_follows_the_order(batch_size):
    digits = Digits()
    for step, (images, labels) in enumerate(_take(build_loader(digits, batch_size, seed=7), 3)):
        index = shuffled_indices(step, 1797, Share(batch_size, seed=7))
        assert images.shape == (batch_size, 1, 8, 8)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(images, digits.images[index])
        np.testing.assert_array_equal(labels, digits.labels[index])


def test_loader_resumes_at_any_step():
    straight = _take(build_loader(Digits(), 100, seed=1), 40)
    for start in (1, 17, 18, 37):  # 17 and 18: either side of the first epoch's end
        assert_same(
            _take(build_loader(Digits(), 100, seed=1, start_step=start), 3), straight[start : start + 3]
        )


@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_depend_on_neither_workers_nor_ranks(tmp_path, crop):
    data = ClassFolder(fill(tmp_path), image_size=8, crop=crop)
    arguments = {"batch_size": 6, "seed": 2, "start_step": 1}
    whole = _take(build_loader(data, **arguments), 4)
    for num_workers in (1, 2):
        assert_same(_take(build_loader(data, num_workers=num_workers, **arguments), 4), whole)
    for world_size in (2, 3):
        ranks = [
            _take(build_loader(data, rank=rank, world_size=world_size, **arguments), 4)
            for rank in range(world_size)
        ]
        assert_same(united(ranks), whole)


def test_random_crops_follow_seed_step_and_place(tmp_path):
    data = ClassFolder(fill(tmp_path, per_class=2, side=(30, 40)), image_size=8, crop="random")
    images, _ = _take(build_loader(data, 8, seed=5, start_step=3), 1)[0]
    indices = shuffled_indices(3, 4, Share(8, seed=5))
    draws = philox_uniform(5, 3, torch.arange(8), 3, stream=4).numpy()
    for place, index in enumerate(indices):
        expected = read_image(data.path(index), 8, 3, "random", draws[place])
        np.testing.assert_array_equal(images[place], expected)
    # Two epochs are in this batch: each image is there twice, and cropped differently.
    assert len({image.numpy().tobytes() for image in images}) == 8
    assert not torch.equal(images, _take(build_loader(data, 8, seed=5, start_step=4), 1)[0][0])


def test_loader_of_a_rank():
    whole = _take(build_loader(Digits(), 10, seed=4), 3)
    part = _take(build_loader(Digits(), 10, seed=4, rank=1, world_size=2), 3)
    assert_same(part, [(images[5:], labels[5:]) for images, labels in whole])


def test_loader_of_files_resumes_in_the_middle(tmp_path):
    data = ClassFolder(fill(tmp_path), image_size=8, crop="random")
    straight = _take(build_loader(data, 4, seed=1), 6)
    loader = build_loader(data, 4, seed=1, num_workers=2)
    first = [pair(next(loader)) for _ in range(3)]
    assert loader.state_dict() == {}
    loader.close()
    rest = _take(build_loader(data, 4, seed=1, start_step=3, num_workers=1, state={}), 3)
    assert_same(first + rest, straight)


def test_workers_outlive_signals_of_others(tmp_path):
    data = ClassFolder(fill(tmp_path), image_size=8)
    expected = _take(build_loader(data, 4, seed=1), 20)
    before = {child.pid for child in multiprocessing.active_children()}
    loader = build_loader(data, 4, seed=1, num_workers=2)
    first = pair(next(loader))  # of one worker: the other may not have begun yet
    workers = {child.pid for child in multiprocessing.active_children()} - before
    assert len(workers) == 2
    signal_from_elsewhere(workers)
    assert_same([first, *_take(loader, 19)], expected)
    loader.close()


_LEFT_OPEN = """
from pixelgen.data import Digits, build_loader

kept = []
for batches in (1, 5):
    loader = build_loader(Digits(), 4, seed=1, num_workers=2)
    for _ in range(batches):
        next(loader)
    kept += [loader, loader._batches]  # an iterator that something refers to is not closed with the loader
raise SystemExit(7)
"""


def test_a_process_with_open_loaders_ends():
    """A Python of its own, which takes down all modules."""
    assert subprocess.run([sys.executable, "-c", _LEFT_OPEN], check=False, timeout=120).returncode == 7


def test_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    np_before = np.random.get_state()[1].copy()  # noqa: NPY002
    _take(build_loader(Digits(), 10, seed=4), 3)
    _take(build_loader(Digits(), 10, seed=4, num_workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], np_before)  # noqa: NPY002


def test_close_ends_the_workers(tmp_path):
    data = ClassFolder(fill(tmp_path), image_size=8)
    before = {child.pid for child in multiprocessing.active_children()}
    loader = build_loader(data, 2, seed=0, num_workers=2)
    next(loader)
    assert len({child.pid for child in multiprocessing.active_children()} - before) == 2
    loader.close()
    assert not {child.pid for child in multiprocessing.active_children()} - before
