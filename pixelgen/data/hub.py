"""Data sets of the Hugging Face ``datasets`` library as rows: opening them, their columns, their cells."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pixelgen.data.source import Crop, ImageError, SourceOptions
from pixelgen.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features

LABEL_NAMES = ("label", "labels", "cls", "class")
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves beside the Arrow files


@dataclass(frozen=True, kw_only=True)
class HubOptions(SourceOptions):
    """A data set of the Hugging Face library.

    Args:
        path: a hub id, or a folder or pattern of parquet files, webdataset tars or images
        crop: center cuts the middle square exactly as ADM does; fast is within 2 grey levels of it; random
            cuts a square at random, of 80 % of the short side or more.
        subset: name of the data set's configuration, where it has several.
        split: the split.
        image_column: the column of the images; null finds it.
        label_column: the column of the class numbers; null finds it.
        streaming: read the data set as a stream instead of downloading it first.
        shuffle_block: images of a stream that are shuffled among each other.
    """

    path: str | None = None
    crop: Crop = "center"
    subset: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    shuffle_block: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("shuffle_block", self.shuffle_block >= 1, "be at least 1")


class Columns(NamedTuple):
    """Which columns hold images and labels."""

    image: str
    label: tuple[str, ...]  # of a column of records that hold them its name and that of their field
    class_names: tuple[str, ...]

    def check_label(self, label: int | None, row: str) -> int:
        """The label of a row; a UserError where it is not the number of a class."""
        num_classes = len(self.class_names)
        if label is None or not 0 <= label < num_classes:
            raise UserError(
                f"data: label column {'.'.join(self.label)} must hold class numbers in [0, {num_classes}), "
                f"got {label} in {row}; change --data.num_classes, --data.label_column or --data.split"
            )
        return int(label)


def open_images(options: HubOptions, num_classes: int) -> tuple[Any, Columns]:
    """Opens a data set with its columns of images, which stay encoded, and labels.

    It is a `datasets.Dataset`, or a `datasets.IterableDataset` for ``data.streaming``; ``num_classes`` counts
    where the label column does not name the classes.

    Raises:
        UserError: it cannot be read, or its columns do not fit; the message says in one line why.
    """
    import datasets

    rows = _open_rows(options)
    columns = _find_columns(rows, options, num_classes)
    rows = rows.select_columns([columns.image, columns.label[0]])
    try:
        return rows.cast_column(columns.image, datasets.Image(decode=False)), columns
    except readable_errors() as error:
        raise UserError(
            f"data: data.image_column {columns.image} cannot be read as images: {one_line(error)}"
        ) from error


def _open_rows(options: HubOptions) -> Any:
    """Opens a data set with `datasets.load_dataset`, or `load_from_disk` for what it saved."""
    path = str(options.path)
    files = [path]
    if glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if not files:
            raise UserError(f"data: no file matches data.path {path}")
    is_local = Path(files[0]).exists()
    # The hub's names have at most one slash and begin with a letter or digit.
    if not is_local and (path.count("/") > 1 or not path[:1].isalnum()):
        raise FileNotFoundError(
            f"data: {path} does not exist; data.path must be a file, a folder or a hub id"
        )
    try:
        if is_local and Path(files[0]).is_file():
            return _load(_builder_of(files), options, data_files={options.split: files})
        if is_local and any((Path(path) / name).exists() for name in _SAVED):
            return _open_saved(options, path)
        return _load(str(Path(path).resolve()) if is_local else path, options, name=options.subset)
    except UserError:
        raise
    except readable_errors() as error:
        advice = (
            "look at --data.split and --data.subset"
            if is_local
            else "it is no file or folder here; for a data set of the hub look at its id, the network, "
            "HF_HUB_OFFLINE and, for a gated one, HF_TOKEN"
        )
        raise UserError(f"data: cannot open {path}: {one_line(error)}; {advice}") from error


def _load(source: str, options: HubOptions, **more: Any) -> Any:
    """`datasets.load_dataset`, which checks local tars first."""
    import datasets

    builder = datasets.load_dataset_builder(source, **more)
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if file.endswith(".tar") and os.path.isfile(file):
                check_tar(file)
    if options.streaming:
        if builder.info.builder_name == "imagefolder":
            # One shard, sorted by class: blocks of it would hold a few classes each.
            raise UserError(f"data: {options.path} is a folder of images; set --data.streaming false")
        return builder.as_streaming_dataset(split=options.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=options.split)


def check_tar(path: str) -> None:
    """Checks that a tar archive was not cut short, of which its readers say nothing: they just end there.

    What ends with two blocks of zeros, as nearly all archives do, is taken as whole, in 30 us. Of others the
    headers are walked, up to 0.1 ms each. One that was cut between two files cannot be told from a whole one
    whose writer left the zeros out, and passes.

    Raises:
        UserError: the archive ends within a file or its header, or a header is damaged.
    """
    cut_short = f"data: {path} is cut short or damaged: it ends within a file; fetch it again"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
        if size % tarfile.BLOCKSIZE == 0 and not file.read().strip(b"\0"):
            return
        begin = 0  # of a header
        end = 0  # of the data before it
        while begin < size:
            file.seek(begin)
            block = file.read(tarfile.BLOCKSIZE)
            if not block.strip(b"\0"):
                return
            try:
                member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                if begin == 0:
                    return  # compressed, or no archive: that is for the reader to say
                raise UserError(cut_short) from error
            # Links, folders and devices are a header alone, whatever size they state.
            has_data = not (member.islnk() or member.issym() or member.isdir() or member.isdev())
            end = begin + tarfile.BLOCKSIZE + (max(0, member.size) if has_data else 0)
            begin = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if end > size:
        raise UserError(cut_short)


def _builder_of(files: list[str]) -> str:
    kinds = {Path(file).suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= set(_BUILDERS):
        raise UserError(
            f"data: data.path must match files of one kind, {' or '.join(_BUILDERS)}, got "
            f"{', '.join(sorted(kind or 'none' for kind in kinds))}"
        )
    return _BUILDERS[kinds.pop()]


def _open_saved(options: HubOptions, path: str) -> Dataset:
    import datasets

    if options.streaming:
        raise UserError(
            f"data: {path} was written by save_to_disk and is memory-mapped; set --data.streaming false"
        )
    saved = datasets.load_from_disk(path)
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if options.split not in saved:
        raise UserError(f"data: {path} has the splits {', '.join(saved)}, got data.split {options.split}")
    return saved[options.split]


def _find_columns(rows: Any, options: HubOptions, num_classes: int) -> Columns:
    import datasets

    features: Features | None = rows.features
    if features is None:
        raise UserError(f"data: {options.path} does not say which columns it has, so it cannot be used")
    # Fields of records, such as the "json" of a webdataset, count as columns of their own.
    flat = dict(features)
    for name, feature in features.items():
        if isinstance(feature, dict):
            flat |= {f"{name}.{key}": value for key, value in feature.items()}

    def choose(kind: str, asked: str | None, found: list[str], names: Iterable[str], hint: str = "") -> str:
        if not asked and not found:
            raise UserError(
                f"data: {options.path} has no column of {kind}s among {', '.join(features)}; name one with "
                f"--data.{kind}_column{hint}"
            )
        if asked and asked not in names:
            raise UserError(f"data: data.{kind}_column must be one of {', '.join(names)}, got {asked}")
        return asked or found[0]

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = choose("image", options.image_column, images, features)
    is_folder = rows.info.builder_name == "imagefolder" and Path(str(options.path)).is_dir()
    hint = "; a folder of class folders is read with --data.name folder" if is_folder else ""
    labels = [name for name, feature in flat.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in LABEL_NAMES if name in flat]
    # A webdataset's "cls" comes before what its "json" holds.
    labels += [name for name in flat if name.rpartition(".")[2] in LABEL_NAMES]
    label = choose("label", options.label_column, labels, flat, hint)
    place = (label,) if label in features else tuple(label.split(".", 1))
    feature = flat[label]
    if isinstance(feature, datasets.ClassLabel):
        return Columns(image, place, tuple(feature.names))
    kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    if "int" not in kind:
        advice = (
            f"turn it into class numbers, for example with class_encode_column({label!r}) and save_to_disk"
            if "string" in kind
            else "name another one with --data.label_column"
        )
        raise UserError(
            f"data: label column {label} of {options.path} must hold class numbers, got {kind}; {advice}"
        )
    return Columns(image, place, tuple(str(number) for number in range(num_classes)))


def encoded_image(cell: dict[str, Any] | None) -> bytes | Path:
    """The bytes or the file of an image that is not decoded; an ImageError where the cell is empty."""
    if cell and cell["bytes"] is not None:
        return bytes(cell["bytes"])
    if cell and cell["path"] is not None:
        return Path(cell["path"])
    raise ImageError("the row holds no image")


def cell_name(cell: dict[str, Any] | None, row: str) -> str:
    """What to call an image in a message: its file, or its row and what it is called there."""
    if not cell or not cell.get("path"):
        return row
    return cell["path"] if cell.get("bytes") is None else f"{row} ({cell['path']})"


def readable_errors() -> tuple[type[Exception], ...]:
    """What ``datasets`` raises for data that is missing, damaged, out of reach or of another kind."""
    import datasets

    kinds = (OSError, ValueError, TypeError, LookupError, RuntimeError, tarfile.TarError)
    return (*kinds, datasets.exceptions.DatasetsError)


def one_line(error: BaseException) -> str:
    """The message of an error, or of its cause where the error only says that something failed."""
    if error.__cause__ is not None and type(error).__name__ == "DatasetGenerationError":
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
