"""From the views of single images to a batch."""

import torch


class MultiViewCollator:
    """Stacks the views of B images into the batch the model takes.

    Example:

    ```python
    >>> batch = MultiViewCollator()([dataset[0], dataset[1]])
    >>> batch["pixel_values"].shape, batch["anchor_pixel_values"].shape
    (torch.Size([2, 3, 224, 224]), torch.Size([2, 1, 3, 224, 224]))
    ```
    """

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """
        Args:
            items (`list[dict[str, torch.Tensor]]`):
                What [`~hf_msn.data.MultiViewTransform`] gives for each image.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` (B, C, H, W), `anchor_pixel_values` (B, V, C, H, W) and, with
            focal views, `focal_pixel_values` (B, F, C, h, w). Of crops, (B, ..., H, W, 3) in uint8, and
            `view_parameters` (B, 1 + V + F, 12): [`~hf_msn.data.MultiViewTransform.finish`] makes views of them.

        Raises:
            ValueError: no items, or items with different names or shapes.
        """
        if not items:
            raise ValueError("A batch needs at least one image, but the list of items is empty.")
        names = set(items[0])
        for position, item in enumerate(items):
            if set(item) != names:
                raise ValueError(
                    f"Item {position} of the batch holds {sorted(item)}, but item 0 holds {sorted(names)}; "
                    "all images of a batch need the same views: use one transform."
                )
            for name, views in item.items():
                if views.shape != items[0][name].shape:
                    raise ValueError(
                        f"`{name}` of item {position} has shape {tuple(views.shape)}, but that of item 0 has "
                        f"{tuple(items[0][name].shape)}; all images of a batch need the same views: use one transform."
                    )
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}
