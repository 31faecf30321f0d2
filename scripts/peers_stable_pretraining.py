"""The training step and the views of MSN by stable-pretraining."""

import io
import os

os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # it logs to stdout, where the table is printed

import timm.models.vision_transformer
import torch
from peer_sides import MOMENTUM, Shape, Side, UnsupportedViewsError
from peer_views import Views
from PIL import Image
from stable_pretraining.backbone import TeacherStudentWrapper
from stable_pretraining.data import transforms
from stable_pretraining.methods.msn import MSN

from hf_msn import MultiViewTransform


def side(shape: Shape, device: torch.device) -> Side:
    """Its method `MSN` on timm's VisionTransformer, without Lightning's loop."""
    if shape.anchor_views != 1 or shape.focal_views:
        raise UnsupportedViewsError("its MSN takes one anchor view and no focal views")
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        depth=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads,
        embed_dim=shape.hidden_size,
        num_classes=0,
    )
    model = MSN(
        vit,
        n_prototypes=shape.num_prototypes,
        mask_ratio=shape.mask_ratio,
        image_size=shape.image_size,
        ema_decay_start=MOMENTUM,
    )
    model = model.to(device).train()
    averages = [module for module in model.modules() if isinstance(module, TeacherStudentWrapper)]

    def update_target() -> None:
        for average in averages:
            average.update_teacher()

    return Side(
        name="stable-pretraining",
        model=model,
        loss=lambda views: model(view1=views["anchor_pixel_values"][:, 0], view2=views["pixel_values"]).loss,
        update_target=update_target,
        optimizer=torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad]),
        first_blocks=[model.backbone.student.blocks[0], model.backbone.teacher.blocks[0]],
        prototypes=model.projector.student[-1].weight,
        differs=[
            "no focal views and one anchor alone: position embeddings are not interpolated",
            "drops nothing: a mask token takes the place of a masked patch, at the cost of all tokens",
            "no batch normalisation in the head; prototypes are not normalised and the target has its own average",
            "computes all tokens in the last block, though the loss reads the [CLS] alone",
            "the patch embedding of the first image is computed once more, to count the patches",
            "its Lightning loop is left out, and torch's default AdamW taken, without groups and clipping",
        ],
        other_tokens=True,
    )


def views(shape: Shape) -> Views:
    """Its transforms on Pillow images, in the order and with the strengths of the paper."""

    def view(size: int, scale: tuple[float, float]) -> transforms.Compose:
        return transforms.Compose(
            transforms.RGB(),
            transforms.RandomResizedCrop((size, size), scale=scale),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.PILGaussianBlur(sigma=(0.1, 2.0), p=0.5),
            transforms.ToImage(mean=MultiViewTransform.image_mean, std=MultiViewTransform.image_std),
        )

    large = view(shape.image_size, (0.3, 1.0))
    small = view(shape.focal_size, (0.05, 0.3))
    transform = transforms.MultiViewTransform([large] * (1 + shape.anchor_views) + [small] * shape.focal_views)

    def make(jpeg: bytes) -> list[torch.Tensor]:
        return [view["image"] for view in transform({"image": Image.open(io.BytesIO(jpeg))})["views"]]

    return Views(
        "stable-pretraining",
        make,
        [
            "it has no recipe for MSN's views: its general transforms, put together with the paper's values",
            "an image's EXIF orientation is not applied, transparency not composited",
        ],
    )


SIDES = [side]
VIEWS = [views]
