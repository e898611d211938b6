"""What can be named on a command line and in a configuration: methods, presets, base models, ways to train.

Plain data. Importing it loads neither PyTorch nor a model library, so that a command line can answer at once.
"""
