"""Stack the views of single images into a batch."""

from collections.abc import Mapping

import torch


class MultiViewCollator:
    """Stack the views of B images into the batch that the model takes."""

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` (B, C, H, W), `anchor_pixel_values` (B, V, C, H, W) and, with focal views,
        `focal_pixel_values` (B, F, C, h, w). Crops are (B, ..., H, W, 3), with `view_parameters` (B, 1 + V + F, 12).

        Raises:
            ValueError: If the items are not dicts of views, or have different names.
        """
        if not isinstance(items[0], Mapping) or "pixel_values" not in items[0]:
            found = sorted(items[0]) if isinstance(items[0], Mapping) else type(items[0]).__name__
            raise ValueError(
                f"Each item of the data set must be a dict of views with `pixel_values`, but one is {found}. Wrap the "
                "images: `MultiViewDataset(images, transform)`."
            )
        for item in items:
            if item.keys() != items[0].keys():
                raise ValueError(
                    f"All images of a batch must have the same views, but one has {sorted(item)} and another "
                    f"{sorted(items[0])}. Use one transform."
                )
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}
