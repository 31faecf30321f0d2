"""The files of the papers' own code: read safely, described by their shapes, and their tensors under our names."""
