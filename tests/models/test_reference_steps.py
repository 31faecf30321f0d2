"""Steps of MSNTrainer against the losses of the authors' code, and against a plain loop in float64."""

import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch import nn
from transformers import ViTMSNModel

from hf_msn import MSNConfig, MSNForPreTraining, MSNTrainer, MSNTrainingArguments

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trajectory.json").read_text())

STEPS, WARMUP_STEPS, IMAGES = 10, 3, 4
STRETCH = 1.25
FIELDS = {"mask_ratio": 0.0, "me_max_weight": 2.0, "entropy_weight": 0.3}


# So strong that forgetting any of it moves the losses by far more than the tolerance; float32 would drift apart.
SETTINGS = {
    "start_learning_rate": 2e-3,
    "learning_rate": 1e-2,
    "final_learning_rate": 1e-4,
    "weight_decay": 0.5,
    "final_weight_decay": 5.0,
    "ema_momentum": 0.5,
    "final_ema_momentum": 1.0,
    "max_grad_norm": 0.5,
}


class Reference:
    """One side of MSN, online or target: the plain encoder of transformers and a head of plain layers, in float64."""

    def __init__(self, model, prefix: str):
        width, hidden = model.config.hidden_size, model.config.projection_hidden_dim
        self.encoder = ViTMSNModel(model.config.to_vit_msn_config())
        self.encoder.load_state_dict(getattr(model, f"{prefix}encoder").state_dict())
        self.head = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, model.config.projection_dim),
        )
        weights = getattr(model, f"{prefix}projection_head").state_dict()
        names = {"0": "fc1", "1": "bn1", "3": "fc2", "4": "bn2", "6": "fc3"}
        self.head.load_state_dict({name: weights[f"{names[name[0]]}{name[1:]}"] for name in self.head.state_dict()})
        self.encoder.double().train()
        self.head.double().train()

    def parameters(self) -> list[torch.Tensor]:
        return [*self.encoder.parameters(), *self.head.parameters()]

    def project(self, resolutions: list[list[torch.Tensor]]) -> torch.Tensor:
        """Take the views of each size; the batch statistics of the head are those of one size."""
        images = [torch.cat(views) for views in resolutions]
        features = [self.encoder(view, interpolate_pos_encoding=True).last_hidden_state[:, 0] for view in images]
        return torch.cat([self.head(rows) for rows in features])


def reference_loss(anchors, targets, prototypes, use_sinkhorn):
    def assign(z):
        z, q = z / z.norm(dim=1, keepdim=True), prototypes / prototypes.norm(dim=1, keepdim=True)
        return torch.softmax(z @ q.T / 0.1, dim=1)

    with torch.no_grad():
        sharp = assign(targets) ** (1 / 0.25)
        sharp = sharp / sharp.sum(dim=1, keepdim=True)
        for _ in range(3 if use_sinkhorn else 0):
            sharp = sharp / sharp.sum(dim=0)
            sharp = sharp / sharp.sum(dim=1, keepdim=True)
    p = assign(anchors)
    mean = p.mean(dim=0)
    views = len(anchors) // len(targets)
    cross_entropy = -(sharp.repeat(views, 1) * p.log()).sum(dim=1).mean()
    me_max = math.log(len(prototypes)) + (mean * mean.log()).sum()
    return cross_entropy + 2.0 * me_max - 0.3 * (p * p.log()).sum(dim=1).mean()


def half_cosine(progress: float, start: float, final: float) -> float:
    return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2


def reference_losses(model, batches: list[dict], accumulation: int, use_sinkhorn: bool) -> list[float]:
    online, target = Reference(model, ""), Reference(model, "target_")
    prototypes = model.prototypes.detach().double().clone().requires_grad_()
    parameters = [*online.parameters(), prototypes]
    first, second = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    start, peak, final, *decays, start_momentum, final_momentum, max_norm = SETTINGS.values()
    losses = []
    for update in range(STEPS):
        for batch in batches[update * accumulation : (update + 1) * accumulation]:
            batch = {name: views.double() for name, views in batch.items()}
            views = [[batch["anchor_pixel_values"][:, 0]], batch["focal_pixel_values"].unbind(1)]
            with torch.no_grad():
                targets = target.project([[batch["pixel_values"]]])
            loss = reference_loss(online.project(views), targets, prototypes, use_sinkhorn) / accumulation
            loss.backward()
            losses.append(loss.item())

        horizon, done = int(STRETCH * STEPS), update + 1  # whole steps
        if done < WARMUP_STEPS:
            rate = start + (peak - start) * done / WARMUP_STEPS
        else:
            progress = (done - WARMUP_STEPS) / (horizon - WARMUP_STEPS)
            rate = half_cosine(progress, peak, final)
        decay = half_cosine(done / horizon, *decays)
        momentum = start_momentum + (final_momentum - start_momentum) * update / (STRETCH * STEPS)

        with torch.no_grad():
            norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in online.parameters()))
            assert norm > max_norm, "the clip must be at work"
            for parameter in online.parameters():
                parameter.grad *= max_norm / norm
            for parameter, m, v in zip(parameters, first, second):
                if parameter.ndim > 1 and parameter is not prototypes:
                    parameter -= rate * decay * parameter
                m.copy_(0.9 * m + 0.1 * parameter.grad)
                v.copy_(0.999 * v + 0.001 * parameter.grad**2)
                parameter -= rate * (m / (1 - 0.9**done)) / ((v / (1 - 0.999**done)).sqrt() + 1e-8)
                parameter.grad = None
            for theta_bar, theta in zip(target.parameters(), online.parameters()):
                theta_bar.copy_(momentum * theta_bar + (1 - momentum) * theta)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("use_sinkhorn", "accumulation"), [(False, 2), (True, 1)])
def test_ten_steps_give_the_losses_of_the_plain_loop(tmp_path, use_sinkhorn, accumulation):
    model = tiny_model(use_sinkhorn=use_sinkhorn, **FIELDS)
    batches = [tiny_batch(IMAGES, seed=number) for number in range(STEPS * accumulation)]
    expected = reference_losses(copy.deepcopy(model), batches, accumulation, use_sinkhorn)

    trainer = MSNTrainer(
        model.double(),
        MSNTrainingArguments(
            str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=IMAGES,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            warmup_epochs=WARMUP_STEPS / STEPS,
            schedule_stretch=STRETCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **SETTINGS,
        ),
        train_dataset=[
            {name: views[row].double() for name, views in batch.items()} for batch in batches for row in range(IMAGES)
        ],
    )
    step, losses = trainer.training_step, []

    def watched(*args, **kwargs):
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = watched
    trainer.train()
    assert losses == pytest.approx(expected, rel=1e-6)
    assert max(expected) / min(expected) > 1.2  # the steps change something


def philox(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Return normal numbers, rounded to float32."""
    return torch.from_numpy(scale * np.random.Generator(np.random.Philox(seed)).standard_normal(shape)).float()


@torch.no_grad()
def golden_model() -> MSNForPreTraining:
    vit = {"image_size": 32, "patch_size": 8, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    head = {"projection_hidden_dim": 64, "projection_dim": 32, "num_prototypes": 16}
    loss = {"mask_ratio": 0.0, "use_sinkhorn": False, "me_max_weight": GOLDEN["options"]["memax"]}
    model = MSNForPreTraining(MSNConfig(**vit, **head, **loss, intermediate_size=768, layer_norm_eps=1e-6)).double()
    for name, tensor in model.named_parameters():
        if not name.startswith("target_"):
            values = philox(zlib.crc32(name.encode()), *tensor.shape, scale=0.05)
            is_scale = name.endswith("weight") and ("norm" in name or ".bn" in name)
            tensor.copy_(values + 1 if is_scale else values)
    model.update_target(0.0)
    return model


def golden_views(step: int) -> dict[str, torch.Tensor]:
    batch, focal = GOLDEN["options"]["batch"], range(GOLDEN["options"]["focal"])
    target, anchor = (philox(5000 + 20 * step + view, batch, 3, 32, 32).double() for view in (0, 1))
    small = [philox(5010 + 20 * step + view, batch, 3, 16, 16).double() for view in focal]
    return {
        "pixel_values": target,
        "anchor_pixel_values": anchor[:, None],
        "focal_pixel_values": torch.stack(small, dim=1),
    }


@pytest.mark.slow
def test_twelve_steps_have_the_losses_of_the_authors_code(tmp_path):
    steps, batch = GOLDEN["options"]["steps"], GOLDEN["options"]["batch"]
    views = [golden_views(step) for step in range(steps)]
    trainer = MSNTrainer(
        golden_model(),
        MSNTrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=batch,
            train_sampling_strategy="sequential",
            warmup_steps=GOLDEN["options"]["ipe"] * GOLDEN["options"]["warmup"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{name: v[row] for name, v in step.items()} for step in views for row in range(batch)],
    )
    losses = []  # the log has them in float32
    trainer.model.register_forward_hook(
        lambda module, args, output: losses.append([output.cross_entropy, output.me_max, output.entropy])
    )
    trainer.train()
    torch.testing.assert_close(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(GOLDEN["losses"], dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(GOLDEN["learning_rate"], rel=1e-9)
    assert [entry["grad_norm"] for entry in logs] == pytest.approx(GOLDEN["gradient_norm"], rel=1e-8)
    trained = [*trainer.model.encoder.parameters(), *trainer.model.projection_head.parameters()]
    norm = math.sqrt(sum(parameter.square().sum().item() for parameter in trained))
    assert norm == pytest.approx(GOLDEN["encoder_norm_after"], rel=1e-10)
