"""The expert operators on Triton: kernels, and the host code that launches them."""
