"""``python -m pixelgen.data.prepare``: decoding a data set once."""
