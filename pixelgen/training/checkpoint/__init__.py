"""Checkpoints: reading and writing them."""
