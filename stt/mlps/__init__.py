"""Narrow layers that stand in for the dense ones."""
