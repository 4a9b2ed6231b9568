"""``python -m pixelgen.train`` with embedded features that are there already, which otherwise takes seconds.

The first argument is a file with the features of the digits; a new run finds a copy of it in its folder.
"""

import shutil
import sys
from pathlib import Path


def main() -> None:
    features = Path(sys.argv.pop(1))
    import pixelgen.losses.build as build
    from pixelgen.cli import run
    from pixelgen.train import main as train

    embedded_features = build.embedded_features

    def with_copy(run_dir, config, images):
        if not (Path(run_dir) / features.name).exists():
            shutil.copy(features, run_dir)
        return embedded_features(run_dir, config, images)

    build.embedded_features = with_copy
    run(train, "pixelgen.train")


if __name__ == "__main__":
    main()
