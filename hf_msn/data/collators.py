"""Stack the views of single images into a batch."""

import torch


class MultiViewCollator:
    """Stack the views of B images into the batch that the model takes.

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
                The views of each image, from [`~hf_msn.data.transforms.MultiViewTransform`].

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` (B, C, H, W), `anchor_pixel_values` (B, V, C, H, W) and, with
            focal views, `focal_pixel_values` (B, F, C, h, w). For crops, (B, ..., H, W, 3) in uint8, and
            `view_parameters` (B, 1 + V + F, 12).

        Raises:
            ValueError: If the items have different names.
        """
        for item in items:
            if item.keys() != items[0].keys():
                raise ValueError(
                    f"All images of a batch must have the same views, but one has {sorted(item)} and another "
                    f"{sorted(items[0])}. Use one transform."
                )
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}
