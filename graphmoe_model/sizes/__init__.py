"""How many parameters an adapter has on a model, without the model's weights."""
