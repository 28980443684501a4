"""Whole programs over the package, from a checkout: `python -m examples.generate path/to/checkpoint`."""
