"""One module per op; see `pixelgen_kernels.registry`."""
