"""Questions about the state of PyTorch that a traced call asks, and does not trace."""

from __future__ import annotations

from collections.abc import Callable

Question = Callable[..., bool]


def asked_while_tracing(question: Question) -> Question:
    """Have Dynamo call ``question`` and take its answer as a constant of the graph.

    As ``torch.compiler.assume_constant_result`` does, which would load Dynamo, and with it Triton, at import.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question
