"""Experiments whose results are committed: ``experiments.study`` and its JSON under ``experiments/results``."""
