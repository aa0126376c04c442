"""Plain PyTorch references, fp64-capable: the oracle of every kernel and the `torch` backend."""
