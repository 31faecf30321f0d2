"""What ranks send to one another: collectives with a deadline, messages in the background, the form of tensors."""
