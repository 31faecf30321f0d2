"""Tiny models of PAWS, SimCLR + SuNCEt and BYOL with a batch."""

import torch

from hf_msn import BYOLConfig, BYOLForPreTraining, PAWSConfig, PAWSForPreTraining, SuNCEtConfig, SuNCEtForPreTraining

HEADS = {"projection_hidden_dim": 16, "projection_dim": 8}
VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
RESNET18 = {"timm_model": "resnet18", "timm_options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}
# Its batch normalisations hold their activation, and it has a stem for small images.
RESNETV2 = {
    "timm_model": "resnetv2_18",
    "timm_options": {"layers": [1, 1, 1], "channels": [8, 16, 32], "stem_chs": 8},
    "small_image_stem": True,
}
TIMM_VIT = {
    "timm_model": "vit_tiny_patch16_224",
    "timm_options": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "qkv_bias": False},
}
ENCODERS = {"vit": VIT, "resnet18": RESNET18, "resnetv2": RESNETV2}
SUPPORT_LABELS = [99, 4, 17, 4, 99, 17]


def tiny_paws(seed: int = 0, **fields) -> PAWSForPreTraining:
    """A ViT unless `fields` name a network of timm; in float64 and training mode."""
    torch.manual_seed(seed)
    return _spread(PAWSForPreTraining(PAWSConfig(**{**_encoder(fields), **HEADS, **fields})))


def tiny_suncet(seed: int = 0, **fields) -> SuNCEtForPreTraining:
    torch.manual_seed(seed)
    return _spread(SuNCEtForPreTraining(SuNCEtConfig(**{**_encoder(fields), **HEADS, **fields})))


def tiny_byol(seed: int = 0, **fields) -> BYOLForPreTraining:
    torch.manual_seed(seed)
    return _spread(BYOLForPreTraining(BYOLConfig(**{**_encoder(fields), **HEADS, **fields})))


def _spread(model):
    # As they start, projections of different images are nearly the same, and so would be right and wrong losses.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().train()


def _encoder(fields: dict) -> dict:
    return {} if "timm_model" in fields else VIT


def semi_supervised_batch(batch_size: int = 3, small_crops: int = 2, seed: int = 1, labels=SUPPORT_LABELS) -> dict:
    """Global views of 16 pixels, small crops of 8, supports of the classes 4, 17 and 99, not in order."""
    generator = torch.Generator().manual_seed(seed)

    def images(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = {
        "pixel_values": images(batch_size, 3, 16, 16),
        "anchor_pixel_values": images(batch_size, 1, 3, 16, 16),
        "support_pixel_values": images(len(labels), 3, 16, 16),
        "support_labels": torch.tensor(labels),
    }
    if small_crops:
        batch["focal_pixel_values"] = images(batch_size, small_crops, 3, 8, 8)
    return batch


def features_of(model, images: torch.Tensor) -> torch.Tensor:
    """Of the encoder as transformers and timm call it."""
    if model.config.timm_model is not None:
        return model.encoder(images)
    return model.encoder(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def smoothed_rows(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The rows of the supports, with a column for each class that is among them."""
    one_hot = (labels[:, None] == labels.unique()).double()
    return one_hot * (1 - smoothing) + smoothing / one_hot.shape[1]


def gradients(loss: torch.Tensor, model) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-9) -> None:
    """Relative to the whole gradient: batch normalisation makes some of its parts cancel to noise."""
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert whole > 1e-4
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * whole, name


def take(model, batch):
    """Take a step without an update; return loss, gradients and buffers."""
    outputs = model(**batch)
    outputs.loss.backward()
    return result(model, outputs.loss)


def result(model, loss):
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_step(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert_same_gradients(found[1], expected[1], tolerance)
    torch.testing.assert_close(found[2], expected[2], rtol=tolerance, atol=tolerance)
