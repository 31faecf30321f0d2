"""The parts of a model card: what was measured and how it was trained, in words, tables, metadata and figures."""
