"""Routing on Triton: what the host launches, and the kernels."""
