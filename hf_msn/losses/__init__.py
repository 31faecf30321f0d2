"""Losses: tensors in, a small named output out. None holds a model or opens a process group."""
