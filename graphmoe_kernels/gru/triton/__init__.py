"""The GRU step on Triton: what the host launches, and the kernels."""
