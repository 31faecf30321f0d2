"""Losses: tensors in, a small named output out. A loss never holds a model and never opens a process group."""
