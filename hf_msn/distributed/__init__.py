"""What runs over `torch.distributed`: knows no model, no loss and no Trainer."""

from .collectives import all_gather_cat, all_reduce_mean, all_reduce_sum, is_distributed, rank, world_size

__all__ = ["all_gather_cat", "all_reduce_mean", "all_reduce_sum", "is_distributed", "rank", "world_size"]
