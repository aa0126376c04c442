"""Triton kernels and their launchers (no autograd): same file names as in `ops` and `reference`."""
