"""Streams: every image once an epoch, and the same batches whoever reads them and however often it stops."""

import io
import json
import multiprocessing
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from images import assert_same, pair, united, write_tar
from PIL import Image
from pixelgen_kernels import philox_uniform
from processes import signal_from_elsewhere

from pixelgen.data import Digits, HubStream, build_dataset, build_loader
from pixelgen.data.decode import read_image
from pixelgen.data.options import DataConfig
from pixelgen.errors import UserError

NUM_IMAGES = 23
SHARDS = (5, 0, 9, 2, 7)  # rows of each file; one is empty


pytestmark = pytest.mark.usefixtures("hub_cache")


def _png(index: int) -> bytes:
    """An image whose grey level tells its number, and in which every crop is different."""
    noise = np.random.default_rng(index).integers(0, 7, (12, 20), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(10 * index + noise).save(file, "PNG")
    return file.getvalue()


_PNGS = [_png(index) for index in range(NUM_IMAGES)]


def _parquet(root: Path, images=_PNGS, label=None, labels=None, shards=SHARDS) -> Path:
    root.mkdir()
    features = Features({"image": datasets.Image(), "label": label or ClassLabel(names=["even", "odd"])})
    cells = [image and {"bytes": image, "path": f"{index}.png"} for index, image in enumerate(images)]
    labels = labels or [index % 2 for index in range(NUM_IMAGES)]
    first = 0
    for shard, rows in enumerate(shards):
        part = slice(first, first + rows)
        table = Dataset.from_dict({"image": cells[part], "label": labels[part]}, features=features)
        table.to_parquet(root / f"train-{shard:05}-of-{len(shards):05}.parquet")
        first += rows
    return root


def _tars(root: Path) -> Path:
    root.mkdir()
    first = 0
    for shard, rows in enumerate(rows for rows in SHARDS if rows):
        members = [
            (f"{index:04}.{field}", content)
            for index in range(first, first + rows)
            for field, content in (("png", _PNGS[index]), ("cls", str(index % 2).encode()))
        ]
        write_tar(root / f"{shard:03}.tar", members)
        first += rows
    return root


def _stream(path, **more) -> HubStream:
    options = {"image_size": 8, "channels": 1, "num_classes": 2, "shuffle_block": 6, **more}
    return build_dataset(DataConfig(name="hf", path=str(path), streaming=True, **options))


def _numbers(batches) -> list[int]:
    """Which images these are; checks their labels, too."""
    numbers = []
    for images, labels in batches:
        found = torch.round((images.double().mean((1, 2, 3)) - 3) / 10).long()
        assert torch.equal(found % 2, labels)
        numbers += found.tolist()
    return numbers


def _take(stream, count, batch_size=6, seed=0, **more):
    """Batches, and the state after each of them."""
    loader = build_loader(stream, batch_size, seed=seed, **more)
    batches, states = [], []
    for _ in range(count):
        batches.append(pair(next(loader)))
        states.append(loader.state_dict())
    loader.close()
    return batches, states


@pytest.fixture(params=["parquet", "tars"])
def root(request, tmp_path):
    return _parquet(tmp_path / "set") if request.param == "parquet" else _tars(tmp_path / "set")


@pytest.mark.parametrize("shuffle_block", [1, 6, 23, 1000])
def test_every_epoch_holds_every_image_once(root, shuffle_block):
    stream = _stream(root, shuffle_block=shuffle_block)
    batches, _ = _take(stream, NUM_IMAGES, batch_size=3)
    epochs = np.array(_numbers(batches)).reshape(3, NUM_IMAGES)
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert all(epoch != sorted(epoch) for epoch in epochs.tolist())
    again, _ = _take(stream, NUM_IMAGES, batch_size=3, seed=1)
    assert _numbers(again) != _numbers(batches)


def test_rows_are_shuffled_in_blocks_that_cross_files(tmp_path):
    root = _parquet(tmp_path / "set")
    files = np.split(np.arange(NUM_IMAGES), np.cumsum(SHARDS)[:-1])
    # In blocks of one nothing but the order of the files is random.
    stored = _numbers(_take(_stream(root, shuffle_block=1), NUM_IMAGES, batch_size=1)[0])
    order = sorted(range(5), key=lambda file: stored.index(files[file][0]) if len(files[file]) else -1)
    assert order != sorted(order)
    assert stored == [number for file in order for number in files[file]]
    shuffled = _numbers(_take(_stream(root), NUM_IMAGES, batch_size=1)[0])
    for first in range(0, NUM_IMAGES, 6):
        block, expected = shuffled[first : first + 6], stored[first : first + 6]
        assert block != expected
        assert sorted(block) == sorted(expected)


def test_stream_is_the_same_everywhere(tmp_path):
    # Stored values: a change of the shuffle would change every resumed run.
    batches, states = _take(_stream(_parquet(tmp_path / "set")), 4, batch_size=7, seed=3)
    numbers = [8, 7, 6, 10, 9, 5, 13, 11, 12, 17, 18, 16, 21, 15, 14, 20, 19, 22, 1, 0, 2, 3, 4]
    assert _numbers(batches) == [*numbers, 14, 16, 19, 17, 18]
    place = {"step": 4, "epoch": 1, "shard": 0, "row": 0, "offset": 5}
    assert states[-1] == {**place, "seed": 3, "num_shards": 5, "shuffle_block": 6}


@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_depend_on_neither_workers_nor_ranks(root, crop):
    stream = _stream(root, crop=crop)
    whole, states = _take(stream, 9)
    for num_workers in (1, 3):
        batches, parallel_states = _take(stream, 9, num_workers=num_workers)
        assert_same(batches, whole)
        assert parallel_states == states
    for world_size in (2, 3):
        ranks = [_take(stream, 9, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert_same(united(batches for batches, _ in ranks), whole)
        assert all(rank_states == states for _, rank_states in ranks)
    assert not multiprocessing.active_children()


def test_random_crops_follow_seed_step_and_place(root):
    batches, _ = _take(_stream(root, crop="random"), 4, seed=5)
    numbers = _numbers(batches)
    for step, (images, _) in enumerate(batches):
        draws = philox_uniform(5, step, torch.arange(6), 3, stream=4).numpy()
        for place, image in enumerate(images):
            file = _PNGS[numbers[6 * step + place]]
            np.testing.assert_array_equal(image, read_image(file, 8, 1, "random", draws[place]))


def test_resumes_in_the_middle(root):
    stream = _stream(root)
    whole, states = _take(stream, 10)
    for step in (1, 4, 7, 8):
        state = json.loads(json.dumps(states[step - 1]))  # as it comes back from a checkpoint
        rest, rest_states = _take(_stream(root), 10 - step, start_step=step, state=state)
        assert_same(rest, whole[step:])
        assert rest_states == states[step:]


def test_two_ranks_go_on_as_one_and_as_three(root):
    stream = _stream(root, crop="random")
    whole, _ = _take(stream, 8)
    ranks = [_take(stream, 3, rank=rank, world_size=2, num_workers=1) for rank in range(2)]
    state = ranks[0][1][-1]
    assert state == ranks[1][1][-1]
    assert_same(_take(stream, 5, start_step=3, state=state)[0], whole[3:])
    parts = [
        _take(stream, 5, start_step=3, state=state, rank=rank, world_size=3, num_workers=rank)[0]
        for rank in range(3)
    ]
    assert_same(united(parts), whole[3:])


def test_state_before_the_first_batch(root):
    loader = build_loader(_stream(root), 6, seed=0)
    state = loader.state_dict()
    assert_same(_take(_stream(root), 2, state=state)[0], _take(_stream(root), 2)[0])


def test_first_images(root):
    stream = _stream(root)
    images, labels = stream.examples(9, seed=0)
    expected, _ = _take(stream, 1, batch_size=9)
    assert_same([(images, labels)], expected)


def test_worker_outlives_signals_of_others(root):
    expected, _ = _take(_stream(root), 12)
    loader = build_loader(_stream(root), 6, seed=0, num_workers=2)
    batches = [pair(next(loader))]
    workers = multiprocessing.active_children()
    assert len(workers) == 1  # one process reads, two threads in it decode
    signal_from_elsewhere([workers[0].pid])
    batches += [pair(next(loader)) for _ in range(11)]
    loader.close()
    assert_same(batches, expected)


# --- broken images and files


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_replaced(tmp_path, num_workers):
    images = list(_PNGS)
    images[3], images[10], images[11] = None, b"", _PNGS[11][:40]
    stream = _stream(_parquet(tmp_path / "set", images))
    loader = build_loader(stream, 23, seed=0, num_workers=num_workers, max_broken=0.5)
    batches = [pair(next(loader)) for _ in range(2)]
    loader.close()
    for batch in batches:
        numbers = _numbers([batch])
        assert len(numbers) == 23
        assert not {3, 10, 11} & set(numbers)
        assert set(range(NUM_IMAGES)) - {3, 10, 11} == set(numbers)
    assert (loader.num_broken, loader.num_drawn) == (6, 46)
    assert len(loader.broken) == 3
    reasons = dict(loader.broken)
    assert reasons[f"row 3 of shard 0 of {tmp_path / 'set'}"] == "the row holds no image"
    assert reasons[f"row 5 of shard 2 of {tmp_path / 'set'}"] == "the file is empty"
    assert f"row 6 of shard 2 of {tmp_path / 'set'} (11.png)" in reasons


def test_replacements_do_not_depend_on_ranks(tmp_path):
    images = [b"" if index % 3 == 0 else image for index, image in enumerate(_PNGS)]
    stream = _stream(_parquet(tmp_path / "set", images))
    whole, _ = _take(stream, 6, max_broken=1.0)
    parts = [_take(stream, 6, rank=rank, world_size=2, max_broken=1.0)[0] for rank in range(2)]
    assert_same(united(parts), whole)


def test_all_images_broken(tmp_path):
    stream = _stream(_parquet(tmp_path / "set", [b""] * NUM_IMAGES))
    with pytest.raises(UserError, match=r"^data: 6 images in a row cannot be read, beginning with row "):
        _take(stream, 1, max_broken=1.0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_is_cut_short_is_named(tmp_path, num_workers):
    stream = _stream(_parquet(tmp_path / "set"))
    file = tmp_path / "set" / "train-00002-of-00005.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"^data: cannot read shard 2 of [^\n]*set: [^\n]+$"):
        _take(stream, 8, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("wrong", [2, -1, None])
def test_wrong_labels_are_named(tmp_path, wrong, num_workers):
    labels = [index % 2 for index in range(NUM_IMAGES)]
    labels[7] = wrong
    stream = _stream(_parquet(tmp_path / "set", label=Value("int64"), labels=labels))
    with pytest.raises(
        UserError, match=rf"must hold class numbers in \[0, 2\), got {wrong} in row 2 of shard 2"
    ):
        _take(stream, 8, num_workers=num_workers)


def test_no_rows(tmp_path):
    stream = _stream(_parquet(tmp_path / "set", shards=(0, 0)))
    with pytest.raises(UserError, match="set holds no images"):
        _take(stream, 1)


# --- what cannot be continued or streamed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "same seed: it was 0, now it is 1"),
        ({"shuffle_block": 7}, "same shuffle_block: it was 6, now it is 7"),
        ({"files": 4}, "same num_shards: it was 5, now it is 4"),
    ],
)
def test_a_stream_continues_only_as_it_was(tmp_path, change, message):
    root = _parquet(tmp_path / "set")
    state = _take(_stream(root), 2)[1][-1]
    if "files" in change:
        (root / "train-00001-of-00005.parquet").unlink()
    stream = _stream(root, shuffle_block=change.get("shuffle_block", 6))
    with pytest.raises(UserError, match=f"^data: a stream continues only with the {message}$"):
        build_loader(stream, 6, seed=change.get("seed", 0), start_step=2, state=state)


def test_a_stream_that_lost_rows_is_refused(tmp_path):
    root = _parquet(tmp_path / "set", shards=(NUM_IMAGES,))
    state = _take(_stream(root, shuffle_block=100), 3)[1][-1]
    assert state["offset"] == 18
    file = root / "train-00000-of-00001.parquet"
    Dataset.from_parquet(str(file)).select(range(10)).to_parquet(file)
    with pytest.raises(UserError, match="set has changed: fewer rows than when the checkpoint was saved"):
        _take(_stream(root, shuffle_block=100), 1, start_step=3, state=state)


def test_state_and_step_belong_together(tmp_path):
    stream = _stream(_parquet(tmp_path / "set"))
    state = _take(stream, 2)[1][-1]
    with pytest.raises(ValueError, match="state must be that of step 3, got 2"):
        build_loader(stream, 6, seed=0, start_step=3, state=state)


def test_streaming_is_not_switched_at_a_resume(tmp_path):
    stream = _stream(_parquet(tmp_path / "set"))
    for state in (None, {}):
        with pytest.raises(UserError, match=r"cannot begin at step 2: .* set --data\.streaming false"):
            build_loader(stream, 6, seed=0, start_step=2, state=state)
    state = _take(stream, 2)[1][-1]
    with pytest.raises(UserError, match=r"the checkpoint is of a stream; set --data\.streaming true"):
        build_loader(Digits(), 6, seed=0, start_step=2, state=state)


def test_a_folder_of_images_is_not_streamed(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "0.png").write_bytes(_PNGS[0])
    with pytest.raises(UserError, match=r"set is a folder of images; set --data\.streaming false"):
        _stream(tmp_path / "set", num_classes=1)


def test_wrong_columns_of_a_stream(tmp_path):
    root = _parquet(tmp_path / "set", label=Value("string"), labels=["a"] * NUM_IMAGES)
    with pytest.raises(UserError, match="must hold class numbers, got string"):
        _stream(root)
    with pytest.raises(UserError, match=r"data\.image_column must be one of image, label, got nope"):
        _stream(root, image_column="nope")
    with pytest.raises(UserError, match=r"cannot open .*; look at --data\.split"):
        _stream(root, split="nope")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        _stream(tmp_path / "nowhere")
