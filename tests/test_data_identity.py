"""A run that goes on with other data than it was trained on."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from training import FLOW_ONLY, fails_with, options

from pixelgen.data import ClassFolder
from pixelgen.data.identity import compare, identify
from pixelgen.errors import UserError
from pixelgen.train import main
from pixelgen.training.checkpoint import read as checkpoints


@pytest.fixture
def photos(tmp_path):
    for label, name in enumerate(("cat", "dog", "zebra")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            path = tmp_path / "photos" / name / f"{index}.png"
            Image.new("RGB", (20, 20), (60 * label, 40 * index, 0)).save(path)
    return tmp_path / "photos"


def identity(photos):
    return identify(ClassFolder(str(photos), 16))


def test_the_same_data_are_not_reported(photos, capsys):
    first = json.loads(json.dumps(identity(photos)))
    assert first["class_names"] == ["cat", "dog", "zebra"] and first["images"] == 12
    compare(first, identity(photos))
    compare({}, identity(photos))  # an older checkpoint
    assert capsys.readouterr().err == ""


def test_other_images_are_reported(photos, capsys):
    first = identity(photos)
    (photos / "dog" / "3.png").rename(photos / "zebra" / "4.png")
    compare(first, identity(photos))
    assert "12 images with other labels than the 12 that the run was trained on" in capsys.readouterr().err


def test_other_names_are_reported_and_other_labels_refused(photos, capsys):
    first = identity(photos)
    (photos / "dog").rename(photos / "dogs")
    compare(first, identity(photos))
    assert "other names than before: label 1 was dog, is dogs" in capsys.readouterr().err
    (photos / "dogs").rename(photos / "zz")
    with pytest.raises(UserError, match="class zebra had label 2 and now has 1"):
        compare(first, identity(photos))


def test_a_resume_reads_what_the_checkpoint_says(tmp_path, photos, capsys):
    data = ["--data.name", "folder", "--data.path", str(photos), "--data.num_classes", "3"]
    data += ["--data.image_size", "16", "--data.channels", "3", "--model.size", "tiny/4"]
    assert main(options(tmp_path, "run", 2, *FLOW_ONLY, *data)) == 0
    meta = checkpoints.read_meta(checkpoints.find_checkpoint(tmp_path / "run"))
    assert meta["data"] == identity(photos)
    (photos / "cat" / "new.png").write_bytes((photos / "cat" / "0.png").read_bytes())
    assert main(["--resume", str(tmp_path / "run"), "--train.max_steps", "3"]) == 0
    assert "13 images with other labels than the 12" in capsys.readouterr().err
    (photos / "zebra").rename(photos / "aardvark")
    error = fails_with(capsys, ["--resume", str(tmp_path / "run"), "--train.max_steps", "4"])
    assert "class cat had label 0 and now has 1" in error
