"""Measure representations with few labels: features, probes, and accuracy over splits."""
