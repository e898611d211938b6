"""Training an adapter on questions by a recipe: what ``graphmoe train`` does.

`rows` makes batches of questions, `models` loads what is trained, `run_folder` tells whose a folder is and which of its
checkpoints are whole, `trainer` and `callbacks` are Transformers' Trainer with what is ours, `run` puts them together.
"""

from graphmoe_model.training.callbacks import DivergedError
from graphmoe_model.training.result import TrainingResult
from graphmoe_model.training.run import train
from graphmoe_tables.recipe import TrainingRecipe

__all__ = ["DivergedError", "TrainingRecipe", "TrainingResult", "train"]
