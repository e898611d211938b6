"""What trained adapters do: where their tokens go, and how that and accuracy hang on the method's settings."""
