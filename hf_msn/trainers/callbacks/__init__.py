"""Thin adapters between the events of a Trainer and the objects of the layers above."""
