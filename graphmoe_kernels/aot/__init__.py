"""Ahead-of-time compilation of the Triton kernels: what the compiler makes of them, read without a GPU.

`python -m graphmoe_kernels.aot` compiles every kernel with every configuration that the package ships, for each device
class, and fails where one does not compile, does not fit or spills in a loop.

`case` is what an operator offers; `trace` runs host code, that of whole layers too, on tensors without memory and
writes down what it starts; `catalogue` collects the launches; `absent` lets Triton compile for a GPU that is not there;
`inspector` compiles one case and reads the result, `listing` its machine code, whose loops `flow` finds and `cycles`
counts; `limits` says what a device grants and which readings are faults; `report` prints.
"""

from graphmoe_kernels.aot.absent import absent_gpu as absent_gpu
from graphmoe_kernels.aot.case import CompileCase as CompileCase
from graphmoe_kernels.aot.case import Variant as Variant
