"""The layers: an MLP or a linear with routed experts, and what they are made of."""
