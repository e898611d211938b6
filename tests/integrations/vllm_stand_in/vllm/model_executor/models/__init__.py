"""Models and their loading."""
