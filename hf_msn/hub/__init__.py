"""To and from the checkpoints that others read, and their cards."""
