"""Linen modules that models are composed from. Every matrix product with weights is `Linear`."""
