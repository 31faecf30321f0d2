"""Images from anywhere, and the views that a network learns from."""
