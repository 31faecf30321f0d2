"""The views of an image as the usual code makes them: torchvision's transforms on Pillow images, view by view."""

import io
import random

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from hf_msn import MultiViewTransform


class PillowBlur:
    """Gaussian blur of a Pillow image with a radius from a range."""

    def __init__(self, radius: tuple[float, float]):
        self.radius = radius

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.radius)))


class PlainPipeline:
    """Decodes an image and makes the views that a [`MultiViewTransform`] makes.

    Args:
        like ([`MultiViewTransform`]):
            Sizes, numbers of views, probabilities and strengths.
    """

    def __init__(self, like: MultiViewTransform):
        self.like = like
        self.make_global = self._transform(like.image_size, like.global_scale)
        self.make_focal = self._transform(like.focal_size, like.focal_scale)

    def _transform(self, size: int, scale: tuple[float, float]) -> transforms.Compose:
        like, strength = self.like, self.like.color_jitter
        jitter = transforms.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, ratio=like.aspect_ratio),
                transforms.RandomHorizontalFlip(like.horizontal_flip),
                transforms.RandomApply([jitter], p=like.color_jitter_probability),
                transforms.RandomGrayscale(p=like.grayscale),
                transforms.RandomApply([PillowBlur(like.blur_radius)], p=like.blur_probability),
                transforms.ToTensor(),
                transforms.Normalize(like.image_mean, like.image_std),
            ]
        )

    def __call__(self, encoded: bytes) -> dict[str, torch.Tensor]:
        """The views of one encoded image, by the names of ours."""
        with Image.open(io.BytesIO(encoded)) as file:
            image = file.convert("RGB")
        views = {
            "pixel_values": self.make_global(image),
            "anchor_pixel_values": torch.stack([self.make_global(image) for _ in range(self.like.anchor_views)]),
        }
        if self.like.focal_views:
            views["focal_pixel_values"] = torch.stack([self.make_focal(image) for _ in range(self.like.focal_views)])
        return views


class KorniaFinish:
    """Colour, gray, blur and normalisation of a batch of crops by kornia, with a draw of its own for each view.

    Raises:
        ImportError: kornia is not installed.
    """

    def __init__(self, like: MultiViewTransform):
        import kornia.augmentation as augmentation

        strength = like.color_jitter
        change = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        self.finish = augmentation.AugmentationSequential(
            augmentation.RandomHorizontalFlip(p=like.horizontal_flip),
            augmentation.ColorJitter(*change, p=like.color_jitter_probability),
            augmentation.RandomGrayscale(p=like.grayscale),
            augmentation.RandomGaussianBlur((17, 17), like.blur_radius, p=like.blur_probability),
            augmentation.Normalize(torch.tensor(like.image_mean), torch.tensor(like.image_std)),
        )

    @torch.no_grad()
    def __call__(self, crops: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Finishes crops of our loader's; their parameters are not used."""
        finished = {}
        for name, values in crops.items():
            if name != "view_parameters":
                flat = values.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
                finished[name] = self.finish(flat).view(*values.shape[:-3], *flat.shape[1:])
        return finished
