"""What runs over `torch.distributed`: knows no model, no loss and no Trainer."""
