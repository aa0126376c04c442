"""The operators: argument checks, torch.library registration and gradients, one file per op."""
