"""Linen modules that models are composed from.

Every matrix product with weights is `Linear`, but for those of a mixture's experts and router.
"""
