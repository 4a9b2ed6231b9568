"""Fused kernels for pixel-space diffusion transformers: ops with their references, registration and checks.

Every op is a `torch.library` op with a plain PyTorch reference beside it, works under autograd and
`torch.compile(fullgraph=True)`, and runs compiled code where there is some for the device. The ops are
functions of this package, such as `pixelgen_kernels.swiglu`; each stands in a module of
`pixelgen_kernels.ops`.
"""

from pixelgen_kernels.native import build_info
from pixelgen_kernels.select import OP_NAMES, Ops, select

globals().update(vars(select("auto")))
__all__ = ["OP_NAMES", "Ops", "build_info", "select", *OP_NAMES]
