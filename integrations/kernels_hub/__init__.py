"""`graphmoe_kernels` as a kernel for Hugging Face's kernels hub: the repository that kernel-builder builds."""
