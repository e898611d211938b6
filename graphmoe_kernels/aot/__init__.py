"""Ahead-of-time compilation of the Triton kernels: what the compiler makes of them, read without a GPU.

`python -m graphmoe_kernels.aot` compiles every kernel with every shipped configuration and prints the result.
"""

from graphmoe_kernels.aot.case import CompileCase as CompileCase
