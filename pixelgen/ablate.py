"""Where ``python -m pixelgen.ablate`` went."""

import sys

if __name__ == "__main__":
    sys.stderr.write(
        "pixelgen.ablate: error: this is an example now, in the sources: python examples/digits/ablate.py\n"
    )
    sys.exit(2)
