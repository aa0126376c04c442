"""Measurements side by side with peers: ``python -m benchmarks.run --help``."""
