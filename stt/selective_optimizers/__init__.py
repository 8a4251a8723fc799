"""Selective optimizers: choose single weights, rows or whole parts of a model under one exact budget; train those."""
