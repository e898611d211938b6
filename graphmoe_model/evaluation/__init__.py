"""Evaluation by lm-eval: of the model in memory on multiple-choice questions, in a form that can be repeated."""

from graphmoe_model.evaluation.evaluate import evaluate_questions, first_token_answers
from graphmoe_model.evaluation.records import QuestionRecord, TaskResult
from graphmoe_model.evaluation.tasks import EvaluationTask
from graphmoe_model.evaluation.voting import SelfConsistency

__all__ = [
    "EvaluationTask",
    "QuestionRecord",
    "SelfConsistency",
    "TaskResult",
    "evaluate_questions",
    "first_token_answers",
]
