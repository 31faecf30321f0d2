"""What is left to do to a view once it is cut, on the device of the batch: flip, colour, gray, blur, normalisation."""

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from . import torch_augmentation
from .view_parameters import FLIP

logger = logging.getLogger(__name__)


def finish_views(
    crops: torch.Tensor, parameters: torch.Tensor, mean: Sequence[float], std: Sequence[float], *, colored: bool = True
) -> torch.Tensor:
    """Finishes views from their crops: the second half of a [`~hf_msn.data.MultiViewTransform`].

    On a CPU one compiled loop takes each view through everything (numba, which releases the interpreter's lock, on as
    many threads as torch has); on an accelerator, or without numba, torch's operators take the batch.

    Args:
        crops (`torch.Tensor` of shape (..., H, W, 3), uint8):
            The views as they were cut.
        parameters (`torch.Tensor` of shape (..., 12), float32):
            A row for each view; the columns are those of `view_parameters`.
        mean, std (`Sequence[float]`):
            Normalisation of values in 0..1, for each channel.
        colored (`bool`, *optional*, defaults to `True`):
            `False` says that no view has jitter, gray or blur: what is left is one multiplication and subtraction.

    Returns:
        `torch.Tensor` of shape (..., 3, H, W), float32, on the device of the crops.

    Raises:
        ValueError: crops of another type or shape, or another number of rows.
    """
    if crops.dtype != torch.uint8 or crops.dim() < 3 or crops.shape[-1] != 3:
        raise ValueError(
            f"Crops are uint8 of shape (..., H, W, 3), but these are {crops.dtype} of shape {tuple(crops.shape)}."
        )
    leading = crops.shape[:-3]
    if parameters.shape[:-1] != leading:
        raise ValueError(
            f"Each view needs a row of parameters, but the crops are {tuple(leading)} views and the rows "
            f"{tuple(parameters.shape[:-1])}."
        )
    crops, parameters = crops.flatten(0, -4) if leading else crops[None], parameters.reshape(-1, parameters.shape[-1])
    if len(crops) == 0:
        finished = torch.empty(0, 3, *crops.shape[1:3], device=crops.device)
    elif not colored:
        finished = _normalize(crops, parameters, *_scales(tuple(mean), tuple(std), 255, crops.device))
    else:
        scales = _scales(tuple(mean), tuple(std), 1, crops.device)
        if crops.device.type == "cpu" and has_numba():
            from . import numba_augmentation as augmentation
        else:
            augmentation = torch_augmentation
        with torch.autocast(crops.device.type, enabled=False):  # a blur in bf16 would be another one
            finished = augmentation.finish_views(crops, parameters, *scales)
    return finished.view(*leading, *finished.shape[1:])


@cache
def has_numba() -> bool:
    """Whether numba is installed. Where it is not, the log says so once."""
    if find_spec("numba") is not None:
        return True
    logger.warning(
        "numba is not installed: colour and blur of the views run on torch's operators, several times slower on a "
        "CPU. `pip install numba` makes them fast."
    )
    return False


@cache
def _scales(
    mean: tuple[float, ...], std: tuple[float, ...], highest: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    std = torch.tensor(std)
    return (1 / (highest * std)).to(device), (torch.tensor(mean) / std).to(device)


def _normalize(
    crops: torch.Tensor, parameters: torch.Tensor, multiplier: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    flipped = parameters[:, FLIP].bool().view(-1, 1, 1, 1)
    if crops.device.type != "cpu" or flipped.any():  # elsewhere looking would wait for the device
        crops = torch.where(flipped, crops.flip(-2), crops)
    views = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return views.mul_(multiplier.view(1, 3, 1, 1)).sub_(offset.view(1, 3, 1, 1))
