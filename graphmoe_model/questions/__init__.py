"""Multiple-choice questions: what one is, where they come from, and how a model reads and answers them."""

from graphmoe_model.questions.encoding import QuestionEncoder
from graphmoe_model.questions.loading import load_questions, load_sets
from graphmoe_model.questions.question import Question, check_split
from graphmoe_model.questions.question_set import QuestionSet, count_shared, questions_digest

__all__ = [
    "Question",
    "QuestionEncoder",
    "QuestionSet",
    "check_split",
    "count_shared",
    "load_questions",
    "load_sets",
    "questions_digest",
]
