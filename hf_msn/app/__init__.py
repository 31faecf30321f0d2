"""`hf-msn app`: a classifier from a few labelled images, in the browser."""
