"""Sources from outside: one file is all that training, resuming and reading in other processes need."""

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_source
from images import assert_same, pair, united
from training import FLOW_ONLY, curve, fails_with, options, refused, start_trainer

from pixelgen.config import DataConfig, TrainConfig, config_from_yaml, config_to_yaml, load_config
from pixelgen.data import Share, Source, build_dataset, build_loader, register, shuffled_indices
from pixelgen.data.source import SOURCES
from pixelgen.errors import UserError
from pixelgen.train import main

pytestmark = pytest.mark.usefixtures("no_curves", "toys")
TOY = ("--data.name", "toy", "--data.toy_option", "3")
STREAM = ("--data.name", "toy_stream")


@pytest.fixture
def only_here():
    """Other tests know the package's own sources alone."""
    before = dict(SOURCES)
    yield
    SOURCES.clear()
    SOURCES.update(before)


@pytest.fixture
def toys(only_here):
    toy_source.register_all()


def run(folder: Path, name: str, steps: int, *more: str) -> list[float]:
    """The losses of a run of the command, with a checkpoint every two steps."""
    common = (*FLOW_ONLY, "--train.log_every", "1", "--train.checkpoint_every", "2", *more)
    assert main(options(folder, name, steps, *common)) == 0
    return [line["loss"] for line in curve(folder / name)]


# --- options


def test_its_options_are_its_own():
    config, _ = load_config([*TOY, "--name", "run"])
    assert (config.data.toy_option, config.data.toy_images) == (3, 50)
    text = config_to_yaml(config)
    assert "toy_option: 3" in text and "shuffle_block" not in text  # nor what other sources would have there
    assert config_from_yaml(text) == config == pickle.loads(pickle.dumps(config))
    assert DataConfig(name="toy", toy_images=7).toy_images == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--data.toy_option", "3"],
            "data.toy_option is an option of data.name toy, not of digits: leave it",
        ),
        (
            [*TOY, "--data.path", "x"],
            "data.path is an option of data.name folder and hf and prepared, not of",
        ),
        (["--data.name", "toy", "--data.toy_option", "99"], "data.toy_option must lie in [1, 25], got 99"),
        (
            [*TOY, "--data.num_classes", "4"],
            "data: toy has 10 classes but num_classes is 4; set --data.num_cl",
        ),
    ],
)
def test_what_is_refused(tmp_path, capsys, given, message):
    assert f"error: {message}" in fails_with(capsys, ["--out_dir", str(tmp_path), *given])


def test_a_wrong_name_is_answered_with_the_known_ones(capsys):
    assert "digits|folder|hf|prepared|synthetic|toy" in refused(capsys, load_config, ["--data.name", "toys"])
    assert "--data.toy_images" in refused(capsys, load_config, [*TOY, "--data.toy_image", "1"])


def test_options_of_other_sources_may_stand_in_an_old_file_at_their_defaults():
    old = (
        "data: {name: digits, path: null, subset: null, split: train, streaming: false, shuffle_block: 10000}"
    )
    assert config_from_yaml(old) == TrainConfig()


def test_the_help_explains_it(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "for toy: grey levels between two classes" in text
    assert "toy is flat images" in text and "digits is the embedded set of 1,797 real 8x8 images" in text


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="source toy is registered already"):
        register("toy")(toy_source.Toy)


def test_a_source_that_cannot_be_read_cannot_be_made():
    with pytest.raises(TypeError, match=r"abstract method '?read"):
        type("Half", (Source,), {})(8, 1, ["a"])


# --- training


@pytest.mark.parametrize("source", [TOY, STREAM], ids=["toy", "stream"])
def test_it_trains_and_resumes_to_the_bit(tmp_path, source):
    whole = run(tmp_path, "whole", 5, *source)
    run(tmp_path, "parts", 2, *source)
    for steps in ("3", "5"):  # a checkpoint in the middle of an epoch, and the last one
        assert main(["--resume", str(tmp_path / "parts"), "--train.max_steps", steps]) == 0
    assert [line["loss"] for line in curve(tmp_path / "parts")] == whole
    assert run(tmp_path, "workers", 5, *source, "--data.workers", "2") == whole


def test_its_options_change_what_is_trained(tmp_path):
    assert run(tmp_path, "a", 2, *TOY) != run(
        tmp_path, "b", 2, "--data.name", "toy", "--data.toy_option", "9"
    )


@pytest.mark.parametrize(("first", "then"), [(STREAM, TOY), (TOY[:2], STREAM)])
def test_a_stream_is_not_continued_as_something_else(tmp_path, capsys, first, then):
    run(tmp_path, "run", 2, *first)
    before = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    error = fails_with(capsys, ["--resume", str(tmp_path / "run"), "--train.max_steps", "3", *then[:2]])
    assert "data.name or data.streaming cannot change so at a resume" in error
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_samples_are_called_by_their_names(tmp_path):
    def description(name: str, *source: str) -> str:
        return start_trainer(options(tmp_path, name, 1, *FLOW_ONLY, *source)).describe_sample(1, 5)

    index = shuffled_indices(1, 50, Share(16, seed=0))[5]
    assert re.fullmatch(rf"5 \(image {index}, t [\d.]+\)", description("toy", *TOY))
    assert re.fullmatch(r"5 \(t [\d.]+\)", description("stream", *STREAM))


# --- reading


def take(source: Source, steps: int, **more):
    """Batches, and the state after each of them."""
    loader = build_loader(source, 6, seed=0, **more)
    found = [(pair(next(loader)), loader.state_dict()) for _ in range(steps)]
    loader.close()
    return [batch for batch, _ in found], [state for _, state in found]


@pytest.mark.parametrize("name", ["toy", "toy_stream"])
def test_batches_depend_on_neither_workers_nor_ranks(name):
    source = build_dataset(DataConfig(name=name))
    whole, states = take(source, 5)
    assert states == [{"gone": 6 * step} if name == "toy_stream" else {} for step in range(1, 6)]
    for workers in (1, 2):
        batches, found = take(source, 5, num_workers=workers)
        assert_same(batches, whole)
        assert found == states
    parts = [take(source, 5, rank=rank, world_size=3)[0] for rank in range(3)]
    assert_same(united(parts), whole)
    assert_same(take(source, 2, start_step=3, state=states[2])[0], whole[3:])


def test_a_source_without_an_end_has_no_length_and_first_images():
    stream = build_dataset(DataConfig(name="toy_stream"))
    assert stream.num_images is None and stream.labels is None and stream.name(3) is None
    with pytest.raises(TypeError, match="ToyStream has no length"):
        len(stream)
    images, labels = stream.examples(4, seed=0)
    assert labels.tolist() == [0, 1, 2, 3] and images[:, 0, 0, 0].tolist() == [0, 20, 40, 60]
    assert take(stream, 1)[0][0][1].tolist() == [0, 1, 2, 3, 4, 5]  # from the beginning again


def test_a_source_must_hold_images():
    with pytest.raises(UserError, match=r"^data: toy holds no images$"):
        build_dataset(DataConfig(name="toy", toy_images=0))


def test_examples_are_evenly_spaced():
    toy = build_dataset(DataConfig(name="toy", toy_images=25))
    images, labels = toy.examples(5, seed=3)
    assert labels.tolist() == [0, 5, 0, 5, 0]
    assert len(toy.examples(100, seed=3)[0]) == 25
    image, label = toy[7]
    assert (image.shape, label) == ((1, 8, 8), 7) and images.shape == (5, 1, 8, 8)
    np.testing.assert_array_equal(image, toy.batch([7])[0][0])


def test_the_example_of_the_documentation_trains(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    code = re.search(r"## Your own source\n.*?```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "stripes.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stripes", raising=False)
    import stripes

    source = build_dataset(DataConfig(name="stripes", stripes_images=30, image_size=16, num_classes=3))
    assert isinstance(source, stripes.Stripes) and len(source) == 30
    images, labels = source.batch([0, 1, 2])
    assert labels.tolist() == [0, 1, 2]
    assert [row[0, 0].tolist()[:4] for row in images] == [[0, 255, 0, 255], [0, 0, 255, 255], [0, 0, 0, 255]]
    whole = run(tmp_path, "whole", 3, "--data.name", "stripes", "--data.stripes_images", "30")
    run(tmp_path, "parts", 2, "--data.name", "stripes", "--data.stripes_images", "30")
    assert main(["--resume", str(tmp_path / "parts"), "--train.max_steps", "3"]) == 0
    assert [line["loss"] for line in curve(tmp_path / "parts")] == whole
