"""A tiny random model, and a batch it runs on, of every model type of the transformers library that has a feed-forward
block to look for: decoders, encoders, encoder-decoders, vision, speech and models with several towers.

`types.py` lists the types, `rules.py` makes any configuration tiny, `overrides.py` holds what the rules do not reach,
`inputs.py` the batches, `build.py` puts them together. `python -m tests.architectures --list` prints the table.
`matrix.py` slices each and compares, `worker.py` loads what was exported, `page.py` writes docs/architectures.md.
"""
