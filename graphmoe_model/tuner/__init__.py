"""The method as PEFT knows it: which modules of a model get adapters, and how adapters come and go."""
