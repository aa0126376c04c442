"""parrot_kernels: fused kernels for entropic optimal transport and Mamba-1."""
