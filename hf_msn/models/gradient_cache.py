"""Gradient cache (arXiv 2101.06983): batches larger than memory, with the gradients of the whole batch."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput, logging

from ..checks import check_integer
from ..distributed.batch_norm import track_statistics_once
from ..distributed.collectives import rank
from ..distributed.gradient_sync import find_wrapper

logger = logging.get_logger(__name__)


class GradientCache:
    """Runs the encoders of a pretraining model in chunks, so that memory holds the activations of one chunk.

    The features of all chunks are kept, without what led to them. Heads and loss see the whole batch: batch
    normalisation of the heads, mean-entropy maximisation, Sinkhorn, supports, all ranks. With u = dL/dfeatures the
    backward pass encodes each chunk again, with the same random numbers, and adds the gradient of <features, u>
    (arXiv 2101.06983, section 3.2). This costs one more forward pass of the encoder. Encoders without gradient, such
    as MSN's target, run in chunks once.

    Loss and gradients are those of the plain step to rounding. Dropout and drop path are drawn chunk by chunk: exact
    for these draws, which differ from those for the whole batch. Batch normalisation inside an encoder normalises
    each chunk by itself and updates its running statistics once per chunk, as gradient accumulation does; a warning
    says so once.

    ```python
    >>> with GradientCache(model, chunk_size=64) as cache:
    ...     for batch in loader:
    ...         outputs = cache.backward(batch)
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ```

    Inside the `with`, `model(**batch).loss` and any backward pass do the same, also under accelerate.
    `DistributedDataParallel` averages the gradients once per backward pass.

    Args:
        model (`nn.Module`): A pretraining model of this package, also in `DistributedDataParallel`.
        chunk_size (`int`): The most images (views) in one pass of an encoder, at least 1. A pass of more is cut into
            the fewest chunks, of sizes that differ by at most 1.

    Raises:
        ValueError: If `chunk_size` is not an integer >= 1, or the model is of another kind. In `backward`, if no pass
            of an encoder has had more than `chunk_size` images, or the first chunk has other features when it is
            encoded again.
    """

    def __init__(self, model: nn.Module, chunk_size: int):
        self.chunks = EncoderChunks(chunk_size)
        self.model = model
        self._replaced: list[EncoderChunks | None] = []
        self._unwrapped: Any = find_wrapper(model)[1]
        if not hasattr(self._unwrapped, "encoder_chunks"):
            raise ValueError(
                "`model` of a GradientCache must be a pretraining model of this package, which knows its encoders, "
                f"but is a {type(self._unwrapped).__name__}. Pass such a model."
            )

    def __enter__(self) -> "GradientCache":
        self._replaced.append(self._unwrapped.encoder_chunks)
        self._unwrapped.encoder_chunks = self.chunks
        return self

    def __exit__(self, *error) -> None:
        self._unwrapped.encoder_chunks = self._replaced.pop()

    def backward(self, batch: dict[str, Any]) -> ModelOutput:
        """Add the gradients of `model(**batch).loss` to those of the parameters, and return the outputs."""
        with self:
            outputs = self.model(**batch)
        self.chunks.check_effect()
        with torch.autocast(outputs.loss.device.type, enabled=False):
            outputs.loss.backward()
        return outputs


class EncoderChunks:
    """The encoding in chunks that a [`GradientCache`] puts into a model. It holds no model, which may be copied."""

    def __init__(self, chunk_size: int):
        remedy = "Memory holds the activations of one chunk."
        self.chunk_size = check_integer("chunk_size", chunk_size, meaning="counts images", remedy=remedy)
        self.largest_pass = 0
        self._warned = self._compared = False

    def check_effect(self) -> None:
        """Raise a `ValueError` if no training pass so far had more images than a chunk."""
        if self.largest_pass <= self.chunk_size:
            raise ValueError(
                f"`chunk_size` must be below the images in one pass of the encoder, of which the largest has "
                f"{self.largest_pass}, but is {self.chunk_size}: it would cost a second forward pass for nothing. "
                "Lower it, or leave it (`encoder_chunk_size`) out."
            )

    def encode(
        self, module: nn.Module, encode: Callable, parts: Sequence[torch.Tensor], kept_patches: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `encode(images, kept_patches)`, `(N, D)`. The images are the `parts` joined, the encoder `module`."""
        num_images = sum(map(len, parts))
        if torch.is_grad_enabled():
            self.largest_pass = max(self.largest_pass, num_images)
            self._prepare_batch_norm(module)

        def encode_rows(start: int, stop: int, kept: torch.Tensor | None, *parts: torch.Tensor) -> torch.Tensor:
            # Each chunk casts the weights anew: through a shared copy their gradients would add up in 16 bits.
            torch.clear_autocast_cache()
            return encode(rows_of(parts, start, stop), None if kept is None else kept[start:stop])

        num_chunks = max(1, -(-num_images // self.chunk_size))
        ends = [num_images * chunk // num_chunks for chunk in range(num_chunks + 1)]
        features = []
        for start, stop in pairwise(ends):
            is_compared = start == 0 and not self._compared
            run = self._compare_two_passes(module, encode_rows) if is_compared else encode_rows
            # The parts are not cut here: a copy of the images would be kept for the backward pass.
            arguments = (start, stop, kept_patches, *parts)
            features.append(checkpoint(run, *arguments, use_reentrant=False, early_stop=not is_compared))
        return torch.cat(features)

    def _compare_two_passes(self, module: nn.Module, encode_rows: Callable) -> Callable:
        """Return `encode_rows` with an error if its second call, in the backward pass, returns something else."""
        first: list[torch.Tensor] = []

        def encode_and_compare(*arguments) -> torch.Tensor:
            features = encode_rows(*arguments)
            if not first:
                first.append(features.detach())
                return features
            self._compared = True
            difference = (features.detach() - first[0]).float().norm() / first[0].float().norm()
            if difference > torch.finfo(features.dtype).eps ** 0.5:
                raise ValueError(
                    f"The forward pass of the encoder, a {type(module).__name__}, is not deterministic: its features "
                    f"of the first chunk differ by {difference:.1e} of their norm when they are computed again. A "
                    "gradient cache needs random numbers from torch's own generators and no state that changes from "
                    "one forward pass to the next. Change the encoder, or leave the gradient cache out."
                )
            return features

        return encode_and_compare

    def _prepare_batch_norm(self, module: nn.Module) -> None:
        if not any(isinstance(part, _BatchNorm) and part.training for part in module.modules()):
            return
        track_statistics_once(module)
        if not self._warned and rank() == 0:
            logger.warning(
                f"The encoder, a {type(module).__name__}, has batch normalisation. With a gradient cache it "
                f"normalises each chunk of {self.chunk_size} images by itself: loss and gradients differ from those "
                "of the whole batch, as with gradient accumulation. Networks with layer or group normalisation are "
                "exact."
            )
        self._warned = True


def rows_of(parts: Sequence[torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Return rows of the concatenated tensors, without a copy where they are rows of one tensor."""
    rows = []
    for part in parts:
        if start < len(part) and stop > 0:
            rows.append(part[max(start, 0) : stop])
        start, stop = start - len(part), stop - len(part)
    return concatenate(rows)


def concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the concatenated tensors, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
