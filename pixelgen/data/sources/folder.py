"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from pixelgen.data.encoded import EncodedImages
from pixelgen.data.source import Crop, SourceOptions, print_once, register
from pixelgen.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
_EXPECTED = "a folder that holds one sub-folder of images per class"


@dataclass(frozen=True, kw_only=True)
class FolderOptions(SourceOptions):
    """One sub-folder of images per class.

    Args:
        path: a folder of class folders
        crop: center cuts the middle square exactly as ADM does; fast is within 2 grey levels of it; random
            cuts a square at random, of 80 % of the short side or more.
    """

    path: str | None = None
    crop: Crop = "center"


class ClassFolder(EncodedImages):
    """Images of ``root/<class>/**/<file>``; labels follow the sorted names of the classes.

    Hidden files and folders (a leading dot) are skipped, and so are links to a folder that holds the link.
    Files of other kinds are counted on stderr. See `read_image` for how files become pixels.
    """

    def __init__(
        self, root: str | os.PathLike[str], image_size: int, channels: int = 3, crop: Crop = "center"
    ) -> None:
        """Lists the images; none is opened yet.

        Raises:
            FileNotFoundError: root does not exist.
            UserError: root is a file, has no class folder, or a class folder has no image; or a folder cannot
                be listed.
        """
        self.root = Path(root)
        class_names = _find_classes(self.root)
        paths, labels = _find_images(self.root, class_names)
        super().__init__(image_size, channels, class_names, np.array(labels, dtype=np.int64), crop)
        # One array of bytes, not a million str: by counting references to those, a worker copies them.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def path(self, index: int) -> Path:
        """The file that holds image ``index``."""
        return Path(os.fsdecode(self._paths[index].item()))

    encoded = path

    def name(self, index: int) -> str:
        """The path of image ``index``."""
        return str(self.path(index))


register("folder", FolderOptions, path=_EXPECTED)(
    lambda data, options: ClassFolder(options.path, data.image_size, data.channels, options.crop)
)


def _find_classes(root: Path) -> tuple[str, ...]:
    """Sorted names of the class folders of ``root``."""
    if not root.exists():
        raise FileNotFoundError(f"data: folder {root} does not exist; data.path must be {_EXPECTED}")
    if not root.is_dir():
        raise UserError(f"data: {root} is a file; data.path must be {_EXPECTED}")
    try:
        entries = list(os.scandir(root))
    except OSError as error:
        _cannot_list(error)
    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"data: no class folders in {root}; data.path must be {_EXPECTED}")
    return tuple(names)


def _find_images(root: Path, class_names: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Paths and labels of all images, sorted by class and path."""
    paths: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, class_name in enumerate(class_names):
        for folder, files in sorted(_walk(root, class_name)):
            found = [name for name in files if name.lower().endswith(EXTENSIONS)]
            others.update(Path(name).suffix.lower() for name in set(files).difference(found))
            paths += [os.path.join(folder, name) for name in sorted(found)]
            labels += [label] * len(found)
    empty = sorted(set(range(len(class_names))) - set(labels))
    if empty:
        shown = ", ".join(class_names[label] for label in empty[:3]) + (", ..." if len(empty) > 3 else "")
        raise UserError(
            f"data: {len(empty)} of {len(class_names)} class folders of {root} hold no images ({shown}); "
            f"looked for {' '.join(extension.removeprefix('.') for extension in EXTENSIONS)}"
        )
    _report_others(root, others)
    return paths, labels


def _walk(root: Path, class_name: str) -> Iterator[tuple[str, list[str]]]:
    """The folders of a class and the names of their files, without what is hidden.

    A folder that can be reached from itself by a link is visited once.
    """
    top = {_identity(root)}
    above: dict[str, set[tuple[int, int]]] = {}  # a folder itself and all that hold it
    # A folder that cannot be listed would otherwise be left out without a word.
    for folder, names, files in os.walk(root / class_name, onerror=_cannot_list, followlinks=True):
        holders = above.get(os.path.dirname(folder), top)
        identity = _identity(folder)
        if identity in holders:
            names.clear()
            continue
        above[folder] = holders | {identity}
        names[:] = [name for name in names if not name.startswith(".")]
        yield folder, [name for name in files if not name.startswith(".")]


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and number of a folder, whichever path leads to it."""
    try:
        status = os.stat(folder)
    except OSError as error:
        _cannot_list(error)
    return status.st_dev, status.st_ino


def _report_others(root: Path, others: Counter[str]) -> None:
    """One line about the files that are no images by their names, from the first process of a run."""
    if not others or os.environ.get("RANK", "0") != "0":
        return
    most_first = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{suffix or 'no extension'} {count}" for suffix, count in most_first[:5])
    print_once(
        f"data: files of other kinds in {root} were left out: {others.total():,} "
        f"({shown}{', ...' if len(others) > 5 else ''})"
    )


def _cannot_list(error: OSError) -> NoReturn:
    raise UserError(f"data: cannot list folder {error.filename}: {error.strerror}") from error
