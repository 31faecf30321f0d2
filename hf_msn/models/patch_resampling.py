"""One patch embedding for patches of any size (FlexiViT, arXiv 2212.08013)."""

from functools import lru_cache

import torch
from timm.layers import resample_patch_embed


def resample_patch_weight(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Return the weight of a patch embedding for patches of another size, with gradient to the given one.

    w' = (B^T)^+ w with B the bicubic resize matrix from p to p' pixels: for p' > p a patch that is enlarged by B has
    the embedding that it had before, <w', B x> = <w, x> (FlexiViT, section 3.4).

    Args:
        weight (`torch.Tensor` of shape `(D, C, p, p)`): The weight for patches of p pixels.
        patch_size (`int`): p'.

    Returns:
        `torch.Tensor`: Of shape `(D, C, p', p')`.
    """
    with torch.autocast(weight.device.type, enabled=False):
        resampled = weight.flatten(2) @ _resampling(weight.shape[-1], patch_size, weight.device, weight.dtype)
    return resampled.unflatten(2, (patch_size, patch_size))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _resampling(old: int, new: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # Cached, as a pseudo-inverse at each step would cost more than the embedding.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        matrix = resample_patch_embed(torch.eye(old * old).reshape(old * old, 1, old, old), [new, new])
    return matrix.flatten(1).to(device, dtype)
