"""A small fine-tuning run from nothing on the CPU: ``python -m graphmoe_model.demo``, or ``make demo``."""
