"""Training objective: one file per term, and one place, ``objective``, that gates, weights and sums them."""

from pixelgen.losses.objective import Objective

__all__ = ["Objective"]
