"""Augmentation: pure functions of (example, seed, index), as batches are of (seed, step)."""
