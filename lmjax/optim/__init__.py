"""Optimizers and schedules, all of them optax."""
