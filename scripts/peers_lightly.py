"""The training step and the views of MSN made of lightly's components, as its documentation puts them together."""

import copy
import io

import timm.models.vision_transformer
import torch
import torchvision.models.vision_transformer
from lightly.loss import MSNLoss
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM, MaskedVisionTransformerTorchvision
from lightly.models.modules.heads import MSNProjectionHead
from lightly.transforms import MSNTransform
from peer_sides import MOMENTUM, Shape, Side
from peer_views import Views
from PIL import Image
from torch import nn

DIFFERS = [
    "the parts come without a loop: no schedules of weight decay and momentum, no groups without decay, no clipping; "
    "torch's default AdamW, as in its example",
    "its example trains no prototypes (it hands over `.data`); here they are trained",
    "its example masks focal views too; here, as in the paper, they keep all patches, so that the tokens are equal",
    "computes all tokens in the last block, though the loss reads the [CLS] alone",
    "anchors and focal views have batch statistics of their own in the head, as in its example; ours are joint",
    "the loss is the logarithm of a power of probabilities, not computed in log space",
]


def torchvision_side(shape: Shape, device: torch.device) -> Side:
    """With torchvision's VisionTransformer, as in its example of MSN."""
    vit = torchvision.models.vision_transformer.VisionTransformer(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_layers=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads,
        hidden_dim=shape.hidden_size,
        mlp_dim=4 * shape.hidden_size,
    )
    vit.heads = nn.Identity()  # 1,000 classes that nothing reads
    return _side("lightly (torchvision)", MaskedVisionTransformerTorchvision(vit=vit), shape, device)


def timm_side(shape: Shape, device: torch.device) -> Side:
    """With timm's VisionTransformer."""
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        depth=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads,
        embed_dim=shape.hidden_size,
        num_classes=0,
        dynamic_img_size=True,
    )
    return _side(
        "lightly (timm)", MaskedVisionTransformerTIMM(vit=vit, pos_embed_initialization="learn"), shape, device
    )


class Network(nn.Module):
    """The modules of the step: encoder and head of anchors and of targets, and the prototypes."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_prototypes: int):
        super().__init__()
        self.encoder, self.head = encoder, MSNProjectionHead(input_dim=hidden_size)
        self.target_encoder, self.target_head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        utils.deactivate_requires_grad(self.target_encoder)
        utils.deactivate_requires_grad(self.target_head)
        self.prototypes = nn.Parameter(nn.Linear(256, num_prototypes, bias=False).weight.detach())

    def update_target(self) -> None:
        utils.update_momentum(self.encoder, self.target_encoder, MOMENTUM)
        utils.update_momentum(self.head, self.target_head, MOMENTUM)


def _side(name: str, encoder: nn.Module, shape: Shape, device: torch.device) -> Side:
    network = Network(encoder, shape.hidden_size, shape.num_prototypes).to(device).train()
    criterion = MSNLoss()

    def loss(views: list[torch.Tensor]) -> torch.Tensor:
        target, anchors, focals = (
            views[0],
            torch.cat(views[1 : 1 + shape.anchor_views]),
            views[1 + shape.anchor_views :],
        )
        kept, _ = utils.random_token_mask(
            (len(anchors), network.encoder.sequence_length), mask_ratio=shape.mask_ratio, device=device
        )
        projected = [network.head(network.encoder(anchors, idx_keep=kept))]
        if focals:
            projected.append(network.head(network.encoder(torch.cat(focals))))
        with torch.no_grad():
            targets = network.target_head(network.target_encoder(target))
        return criterion(torch.cat(projected), targets, network.prototypes)

    def first_block(encoder: nn.Module) -> nn.Module:
        return encoder.vit.blocks[0] if hasattr(encoder.vit, "blocks") else encoder.vit.encoder.layers[0]

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return Side(
        name=name,
        model=network,
        loss=loss,
        update_target=network.update_target,
        optimizer=torch.optim.AdamW(trained, lr=1.5e-4),
        first_blocks=[first_block(network.encoder), first_block(network.target_encoder)],
        prototypes=network.prototypes,
        prepare=_as_list,
        differs=DIFFERS,
    )


def views(shape: Shape) -> Views:
    """`MSNTransform` on Pillow images, opened as its data set opens them."""
    transform = MSNTransform(
        random_size=shape.image_size,
        focal_size=shape.focal_size,
        random_views=1 + shape.anchor_views,
        focal_views=shape.focal_views,
        cj_strength=0.5,
    )
    return Views(
        "lightly",
        lambda jpeg: transform(Image.open(io.BytesIO(jpeg)).convert("RGB")),
        [
            "jitter at the paper's strength 0.5 (its default is 1.0)",
            "an image's EXIF orientation is not applied, transparency not composited",
        ],
    )


def _as_list(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A tensor for each view, as its data loader gives them."""
    views = [batch["pixel_values"], *batch["anchor_pixel_values"].unbind(1)]
    return [view.contiguous() for view in [*views, *batch.get("focal_pixel_values", torch.empty(1, 0)).unbind(1)]]


SIDES = [torchvision_side, timm_side]
VIEWS = [views]
