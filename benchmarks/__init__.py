"""Speed and memory beside natively narrow models: `python benchmarks/neurons.py --help`."""
