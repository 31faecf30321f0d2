"""Load images, draw their views, and select the labelled ones."""
