"""How good samples are, in figures."""
