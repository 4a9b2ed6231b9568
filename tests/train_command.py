"""``python -m pixelgen.train`` without what takes seconds: no loss curves, and features that are there.

The first argument is a file with embedded features of the digits, of which a new run finds a copy in its
folder; or empty, and they are trained.
"""

import shutil
import sys
from pathlib import Path


def main() -> None:
    features = sys.argv.pop(1)
    import pixelgen.losses.build as build
    from pixelgen.config.command_line import run
    from pixelgen.train import main as train
    from pixelgen.training import log as trainlog

    embedded_features = build.embedded_features

    def with_copy(run_dir, config, images):
        if features and not (Path(run_dir) / Path(features).name).exists():
            shutil.copy(features, run_dir)
        return embedded_features(run_dir, config, images)

    build.embedded_features = with_copy
    trainlog.save_loss_curves = lambda *_: None
    run(train, "pixelgen.train")


if __name__ == "__main__":
    main()
