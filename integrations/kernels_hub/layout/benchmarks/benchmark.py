"""The operators' times, each with its plain definition for comparison."""

import torch
from kernels.benchmark import Benchmark


class OperatorsBenchmark(Benchmark):
    """Experts of 8 and rank 16 over an MLP of width 2,048; on a GPU 4,096 tokens in bf16, else 64 in fp32."""

    seed = 0

    def setup(self):
        """Draw the inputs of every workload."""
        gpu = self.device != "cpu"
        tokens, width, experts, rank, gru = 4096 if gpu else 64, 2048, 8, 16, 64
        dtype = torch.bfloat16 if gpu else torch.float32

        def draw(*shape):
            return (0.1 * torch.randn(shape, device=self.device)).to(dtype)

        self.logits = torch.randn(tokens, experts, device=self.device)
        weights, ids, *_ = self.kernel.topk_softmax_routing(self.logits, 2)
        pairs = [(draw(*shape), draw(*shape)) for shape in ((tokens, width), (experts, width, rank))]
        pre, B = (self.kernel.GateUp(*pair) for pair in pairs)
        low, down_A = draw(tokens, 2 * experts * rank), draw(experts, rank, width)
        self.operands = self.kernel.ExpertOperands(pre, low, B, down_A, weights, ids)
        shapes = (tokens, 3 * gru), (tokens, 2 * gru), (tokens, gru), (tokens, gru), (gru, gru), (gru,)
        self.recurrence = [draw(*shape) for shape in shapes]

    def benchmark_routing(self):
        """Run the softmax and the choice of two experts."""
        self.out = self.kernel.topk_softmax_routing(self.logits, 2).routing_weights

    def verify_routing(self):
        """Return what they are by definition."""
        return self.kernel.topk_softmax_routing(self.logits, 2, backend="reference").routing_weights

    def benchmark_experts(self):
        """Run a round of experts."""
        self.out = self.kernel.expert_swiglu(self.operands, scale=2.0)[0]

    def verify_experts(self):
        """Return what it is by definition."""
        return self.kernel.expert_swiglu(self.operands, scale=2.0, backend="reference")[0]

    def benchmark_gru_step(self):
        """Run the step between two rounds."""
        self.out = self.kernel.gru_step(*self.recurrence)

    def verify_gru_step(self):
        """Return what it is by definition."""
        return self.kernel.gru_step(*self.recurrence, backend="reference")
