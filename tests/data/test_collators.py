import pytest
import torch

from hf_msn.data.collators import MultiViewCollator
from hf_msn.data.transforms import MultiViewTransform


def test_views_are_stacked_batch_first(picture):
    transform = MultiViewTransform(image_size=8, focal_size=4, anchor_views=2, focal_views=3)
    items = [transform(picture(number)) for number in range(5)]
    batch = MultiViewCollator()(items)
    assert {name: tuple(views.shape) for name, views in batch.items()} == {
        "pixel_values": (5, 3, 8, 8),
        "anchor_pixel_values": (5, 2, 3, 8, 8),
        "focal_pixel_values": (5, 3, 3, 4, 4),
    }
    assert all(torch.equal(batch[name][position], items[position][name]) for name in batch for position in range(5))


def test_items_with_different_names_are_refused():
    with pytest.raises(ValueError, match="other"):
        MultiViewCollator()([{"pixel_values": torch.zeros(3, 8, 8)}, {"other": torch.zeros(3, 8, 8)}])
