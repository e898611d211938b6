"""Stands for the base class of benchmarks, whose kernel and device the runner sets."""


class Benchmark:
    seed = None
    device = "cpu"
    kernel = None
    out = None
