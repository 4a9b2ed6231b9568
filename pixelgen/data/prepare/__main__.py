"""``python -m pixelgen.data.prepare``."""

from pixelgen.config.command_line import run
from pixelgen.data.prepare.command import main

if __name__ == "__main__":
    run(main, "pixelgen.data.prepare")
