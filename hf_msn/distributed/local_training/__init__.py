"""What a rank that trains on its own switches off in torch, and what of its model takes part in an exchange."""
