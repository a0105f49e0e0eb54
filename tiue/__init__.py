"""Distilling text-to-image diffusion models into students that draw in one pass. Method: arXiv 2505.21960."""
