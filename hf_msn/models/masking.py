"""The draw of the patches that each anchor view keeps (MSN, section 3)."""

import math

import numpy as np
import torch


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """Return floor(num_patches * (1 - mask_ratio)), correct also where floating point gives 10 * (1 - 0.9) < 1."""
    return math.floor(num_patches * (1.0 - mask_ratio) + 1e-9)


def patches_per_side(side: int, patch_size: int) -> int:
    """Return the number of patches of `patch_size` pixels nearest to `side` pixels; 0 is a `ValueError`."""
    number = (2 * side + patch_size) // (2 * patch_size)
    if number < 1:
        raise ValueError(
            f"`patch_size` {patch_size} leaves no patch of a side of {side} pixels, which must have at least half of "
            "it. Choose a smaller one, or larger views."
        )
    return number


def draw_kept_patches(
    batch_size: int, num_patches: int, mask_ratio: float, *, seed: tuple[int, ...], shared: bool = False
) -> torch.Tensor:
    """Return the indices of the patches that each image keeps, drawn uniformly and without replacement on the CPU.

    Of shape `(batch_size, floor(num_patches * (1 - mask_ratio)))`, distinct within a row; with `shared`, all rows are
    one draw. It depends only on `seed`: (seed, rank, number of the draw).
    """
    num_kept = num_kept_patches(num_patches, mask_ratio)
    if num_kept < 1:
        raise ValueError(
            f"`mask_ratio` {mask_ratio:g} (with token dropout) leaves none of the {num_patches} patches of a view. "
            "Lower it, or choose larger views or a smaller `patch_size`."
        )
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    keys = torch.rand(1 if shared else batch_size, num_patches, generator=generator)
    return keys.argsort(dim=1)[:, :num_kept].expand(batch_size, -1)
