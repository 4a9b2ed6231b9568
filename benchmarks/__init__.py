"""Benchmarks of pixelgen: `python -m benchmarks --help`."""
