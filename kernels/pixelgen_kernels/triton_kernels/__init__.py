"""Triton kernels, one file per op. Only the op files import them, when a CUDA tensor first needs them."""
