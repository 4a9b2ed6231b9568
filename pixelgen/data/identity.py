"""What a run was trained on, in few words: kept with its checkpoints and compared when it goes on."""

from __future__ import annotations

import sys
import zlib
from typing import Any

from pixelgen.data.source import Source
from pixelgen.errors import UserError


def identify(source: Source) -> dict[str, Any]:
    """What tells data apart, as JSON: names of classes, and a checksum of all labels where they are known."""
    identity: dict[str, Any] = {"class_names": list(source.class_names)}
    if source.labels is not None:
        identity |= {"images": len(source.labels), "labels": zlib.crc32(source.labels.tobytes())}
    return identity


def compare(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares the data that a run was trained on with those it is to go on with.

    Other data are the user's choice: a warning on stderr. Labels that have changed places are refused.

    Args:
        before, now: from ``identify``; ``before`` may be empty.

    Raises:
        UserError: a class has another label than before.
    """
    names, others = before.get("class_names", []), now["class_names"]
    labels = {name: label for label, name in enumerate(others)}
    for label, name in enumerate(names):
        if labels.get(name, label) != label:
            raise UserError(
                f"data: class {name} had label {label} and now has {labels[name]}: these are not the data "
                f"that the run was trained on"
            )
    if names and names != others:
        label = next(i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1])
        print(
            f"warning: data: classes have other names than before: label {label} was {names[label]}, is "
            f"{others[label]}",
            file=sys.stderr,
        )
    images = "images" in before and "images" in now
    if images and (before["images"], before["labels"]) != (now["images"], now["labels"]):
        print(
            f"warning: data: {now['images']:,} images with other labels than the {before['images']:,} that "
            f"the run was trained on so far; they come in another order",
            file=sys.stderr,
        )
