"""Every op of the package: its public function, its reference, and the cases by which it is tested and timed.

A module of `pixelgen_kernels.ops` makes an `Op` at its end; nothing else lists it.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pixelgen_kernels.cases import Benchmark, Inputs

__all__ = ["Op", "load", "ops"]

_OPS: dict[str, "Op"] = {}


@dataclass(frozen=True, kw_only=True)
class Op:
    """An op, known to the package from when it is made.

    Attributes:
        fused: the public function; checks its arguments and runs compiled code where there is some.
        eager: its plain PyTorch definition, of the same signature.
        call: what `fused.register` returned.
        differentiable: arguments that have a gradient.
        is_exact: it moves numbers and computes nothing, so results are equal to the last bit.
        inputs: (draw, shape, **options) -> arguments by name, every tensor made by `draw`.
        shapes: first the smallest, then one that is odd in every dimension, then others; one is empty.
        small: a shape for gradcheck and malformed calls.
        options: keyword of `inputs` -> its values, the most usual first.
        layouts: keys of `cases.LAYOUTS`, those that the op reads in place, "dense" first.
        benchmarks: (kind of device) -> the cases that are timed.
        idle: argument of backward -> the share of it that need not be read, for the bandwidth of a benchmark.
    """

    fused: Callable[..., Any]
    eager: Callable[..., Any]
    call: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    is_exact: bool = False
    inputs: Callable[..., Inputs]
    shapes: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    layouts: tuple[str, ...]
    benchmarks: Callable[[str], Iterator[Benchmark]] = lambda device: iter(())
    idle: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _OPS[self.name] = self

    @property
    def name(self) -> str:
        """That of the public function."""
        return self.fused.__name__


def load() -> None:
    """Imports every module of `pixelgen_kernels.ops` but those of Triton kernels, needed later."""
    import pixelgen_kernels.ops as package

    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.endswith("_triton"):
            importlib.import_module(f"{package.__name__}.{module.name}")


def ops() -> dict[str, Op]:
    """All ops by name."""
    return dict(_OPS)
