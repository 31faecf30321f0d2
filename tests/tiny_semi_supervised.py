"""Tiny models of PAWS and SimCLR + SuNCEt with a batch, and the losses of their papers image by image."""

import torch

from hf_msn import PAWSConfig, PAWSForPreTraining, SuNCEtConfig, SuNCEtForPreTraining

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
ENCODERS = {"vit": VIT, "resnet18": RESNET18, "resnetv2": RESNETV2}
SUPPORT_LABELS = [99, 4, 17, 4, 99, 17]


def tiny_paws(seed: int = 0, **fields) -> PAWSForPreTraining:
    """A ViT unless `fields` name a network of timm; in float64 and training mode."""
    torch.manual_seed(seed)
    return _spread(PAWSForPreTraining(PAWSConfig(**{**_encoder(fields), **HEADS, **fields})))


def tiny_suncet(seed: int = 0, **fields) -> SuNCEtForPreTraining:
    torch.manual_seed(seed)
    return _spread(SuNCEtForPreTraining(SuNCEtConfig(**{**_encoder(fields), **HEADS, **fields})))


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


def smoothed_rows(labels: torch.Tensor, smoothing: float) -> dict[int, torch.Tensor]:
    """The row of each class that is in the support."""
    classes = sorted(set(labels.tolist()))
    rows = {}
    for column, number in enumerate(classes):
        rows[number] = torch.full((len(classes),), smoothing / len(classes), dtype=torch.float64)
        rows[number][column] += 1 - smoothing
    return rows


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first @ second) / (first.norm() * second.norm())


def prediction(projection, supports, labels, config) -> torch.Tensor:
    """d(z, S) of PAWS for one image: (C,)."""
    rows = smoothed_rows(labels, config.label_smoothing)
    weights = [torch.exp(cosine(projection, support) / config.temperature) for support in supports]
    voted = [weight * rows[int(label)] for weight, label in zip(weights, labels)]
    return sum(voted) / sum(weights)


def sharpened(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum()


def paws_by_hand(anchors, anchor_supports, targets, target_supports, labels, config) -> tuple[torch.Tensor, list]:
    """Equations 1 to 3 of PAWS.

    Args:
        anchors (list of (V, D)): All views of each image, the two global ones first.
        anchor_supports (S, D): The supports as the anchors see them.
        targets (list of (2, D)): The two global views of each image.
        target_supports (S, D): The supports as the targets see them.

    Returns:
        The loss, and for each image the predictions of its first and second view, sharpened.
    """
    cross_entropies, all_sharpened, predicted = [], [], []
    for views, own_targets in zip(anchors, targets):
        with torch.no_grad():
            sure = [
                sharpened(prediction(view, target_supports, labels, config), config.sharpen_temperature)
                for view in own_targets
            ]
        wanted = [sure[1], sure[0]] + [(sure[0] + sure[1]) / 2] * (len(views) - 2)
        predicted.append(sure)
        for view, target in zip(views, wanted):
            target = torch.where(target < 1e-4, 0.0, target)
            p = prediction(view, anchor_supports, labels, config)
            cross_entropies.append(-(target * p.log()).sum())
            all_sharpened.append(sharpened(p, config.sharpen_temperature))
    mean = sum(all_sharpened) / len(all_sharpened)
    entropy = -(mean * mean.log()).sum()
    return sum(cross_entropies) / len(cross_entropies) - config.me_max_weight * entropy, predicted


def nt_xent_by_hand(first, second, temperature: float, full_gradient: bool) -> torch.Tensor:
    """Equation 1 of SimCLR; in SuNCEt's code the views that one is compared with count as constants."""
    rows = [*first, *second]
    compared = rows if full_gradient else [row.detach() for row in rows]
    losses = []
    for i, row in enumerate(rows):
        pair = (i + len(first)) % len(rows)
        others = {j: torch.exp(cosine(row, compared[j]) / temperature) for j in range(len(rows)) if j != i}
        losses.append(-torch.log(others[pair] / sum(others.values())))
    return sum(losses) / len(losses)


def suncet_by_hand(supports, labels, config) -> torch.Tensor:
    """Equation 1 of SuNCEt; with smoothing the cross-entropy of the smoothed vote."""
    rows = smoothed_rows(labels, config.label_smoothing)
    losses = []
    for i, row in enumerate(supports):
        weights = {j: torch.exp(cosine(row, supports[j]) / config.temperature) for j in range(len(supports)) if j != i}
        p = sum(weight * rows[int(labels[j])] for j, weight in weights.items()) / sum(weights.values())
        losses.append(-(rows[int(labels[i])] * p.log()).sum())
    return sum(losses) / len(losses)


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
