"""Ablations: many ways to select and train, compared so that a difference can be detected."""
