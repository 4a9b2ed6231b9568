"""Where ``python -m pixelgen.ablate`` went."""

raise SystemExit(
    "pixelgen.ablate is examples/digits/ablate.py in the sources: python examples/digits/ablate.py"
)
