"""All ops in one value, so that a model chooses between fused and eager in one place."""

from types import SimpleNamespace
from typing import Literal

from pixelgen_kernels import registry

registry.load()
OP_NAMES = tuple(registry.ops())


class Ops(SimpleNamespace):
    """One callable per op, by its name; fused and eager ones have the same signatures (see select.pyi)."""


_FUSED = Ops(**{name: op.fused for name, op in registry.ops().items()})
_EAGER = Ops(**{name: op.eager for name, op in registry.ops().items()})


def select(kernels: Literal["auto", "eager"]) -> Ops:
    """The fused ops (``"auto"``) or their eager references (``"eager"``).

    Raises:
        ValueError: another name.
    """
    if kernels not in ("auto", "eager"):
        raise ValueError(f"select: kernels must be 'auto' or 'eager', got {kernels!r}")
    return _FUSED if kernels == "auto" else _EAGER
