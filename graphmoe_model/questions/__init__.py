"""Multiple-choice questions: what one is, where they come from, and how a model reads and answers them."""

from graphmoe_model.questions.encoding import QuestionEncoder
from graphmoe_model.questions.question import Question, check_split

__all__ = ["Question", "QuestionEncoder", "check_split"]
