"""The loss terms, in the order in which they are summed and logged. Importing them registers them."""

from pixelgen.losses.terms import flow_matching, alignment, lpips, p_dino, adversarial  # noqa: F401, I001
