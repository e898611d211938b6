"""Ahead-of-time compilation of the Triton kernels: what the compiler makes of them, read without a GPU.

`python -m graphmoe_kernels.aot` compiles every kernel with every configuration that the package ships, for each device
class, and fails where one does not compile, does not fit or spills.

`case` is what an operator offers; `catalogue` collects it from the operators; `inspector` compiles one case and reads
the result; `limits` says what a device grants and which readings are faults; `report` prints.
"""

from graphmoe_kernels.aot.case import CompileCase as CompileCase
