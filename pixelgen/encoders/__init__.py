"""Frozen feature networks for the perceptual terms, behind two small interfaces."""
