"""Original checkpoints of MSN and PAWS to models, against the original networks written plainly in float64."""

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from original_reference import (
    doubled,
    msn_checkpoint,
    predict,
    prefixed,
    project,
    resnet_forward,
    resnet_weights,
    vit_forward,
    vit_weights,
)
from transformers import AutoImageProcessor, AutoModel, ViTMSNModel

from hf_msn import MSNForPreTraining, PAWSForPreTraining, SuNCEtForPreTraining, convert_checkpoint, load_vision_model

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def save(tmp_path):
    def save(content, name="original.pth.tar", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_vit_computes_the_same(encoder, project_with, weights, heads, sizes, activation=F.gelu):
    for size in sizes:
        pixels = images(size)
        before, after = vit_forward(doubled(weights), pixels.double(), heads)
        output = encoder(pixels, output_hidden_states=True)
        torch.testing.assert_close(output.hidden_states[-1][:, 0].double(), before, **TOLERANCE)
        torch.testing.assert_close(output.last_hidden_state[:, 0].double(), after, **TOLERANCE)
        projections = project(doubled(weights), after, activation)
        torch.testing.assert_close(project_with(pixels).double(), projections, **TOLERANCE)


@pytest.mark.parametrize(
    ("heads", "shape"),
    [
        (4, {}),
        (2, {"width": 48, "depth": 3, "side": 5, "bn": False}),
        (None, {"width": 128, "depth": 1, "qkv_bias": False, "patch": 2}),
    ],
)
def test_msn_computes_what_the_original_network_does(save, tmp_path, heads, shape):
    content = msn_checkpoint(**shape)
    assert convert_checkpoint(save(content), tmp_path / "msn", heads) == tmp_path / "msn"
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn").eval()
    assert (model.config.layer_norm_eps, model.config.hidden_act) == (1e-6, "gelu")  # no feature shows this eps
    patch, side, heads = model.config.patch_size, shape.get("side", 4), heads or 2
    assert model.config.num_attention_heads == heads
    assert (model.config.image_size, patch) == (side * shape.get("patch", 4), shape.get("patch", 4))
    assert model.config.projection_batch_norm is shape.get("bn", True)
    sizes = [patch * grid for grid in (side, side - 1, side // 2, side + 3)]
    target = vit_weights(1, **shape)
    assert_vit_computes_the_same(model.target_encoder, model.project, target, heads, sizes)
    online = vit_weights(2, **shape)
    assert_vit_computes_the_same(
        model.encoder,
        lambda pixels: model.projection_head(model.encoder(pixels).last_hidden_state[:, 0]),
        online,
        heads,
        sizes,
    )
    assert torch.equal(model.prototypes, content["prototypes"])
    assert not any(p.requires_grad for p in model.target_encoder.parameters())
    assert all(p.requires_grad for p in model.encoder.parameters())


def test_a_real_vit_s16_computes_the_same_at_224_and_96_pixels(save, tmp_path):
    shape = {"width": 384, "depth": 12, "mlp": 1536, "patch": 16, "side": 14, "hidden": 2048, "dim": 256}
    content = msn_checkpoint(full=False, prototypes=1024, **shape)
    convert_checkpoint(save(content), tmp_path / "msn", export_backbone_dir=tmp_path / "trunk")
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn").eval()
    assert_vit_computes_the_same(model.target_encoder, model.project, vit_weights(1, **shape), 6, (224, 96))
    record = json.loads((tmp_path / "msn" / "conversion.json").read_text())
    assert (record["architecture"], record["num_attention_heads"], record["heads_assumed"]) == ("ViT-S/16", 6, True)
    exported = AutoModel.from_pretrained(tmp_path / "trunk").eval()
    assert type(exported) is ViTMSNModel
    with torch.no_grad():
        before, _ = vit_forward(doubled(vit_weights(1, **shape)), images(224).double(), 6)
        hidden = exported(images(224), output_hidden_states=True).hidden_states[-1][:, 0]
    torch.testing.assert_close(hidden.double(), before, **TOLERANCE)
    for folder in ("msn", "trunk"):
        processor = AutoImageProcessor.from_pretrained(tmp_path / folder)
        assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (256, 224)
        assert list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_a_released_file_starts_the_online_encoder_as_a_copy_and_says_so(save, tmp_path):
    convert_checkpoint(save(msn_checkpoint(full=False, prefix="")), tmp_path / "msn")
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn")
    target, online = model.target_encoder.state_dict(), model.encoder.state_dict()
    assert all(torch.equal(online[name], tensor) for name, tensor in target.items())
    heads = model.projection_head.state_dict(), model.target_projection_head.state_dict()
    assert all(torch.equal(heads[0][name], tensor) for name, tensor in heads[1].items())
    record = json.loads((tmp_path / "msn" / "conversion.json").read_text())
    assert record["made_up"] == ["encoder: starts as a copy of target_encoder"]
    assert record["kept"] == ["target_encoder", "prototypes"] and record["target_only"]


def test_a_file_without_a_target_starts_it_as_a_copy_and_says_so(save, tmp_path):
    content = msn_checkpoint()
    content |= {"target_encoder": None, "prototypes_lr": 0.1}
    convert_checkpoint(save(content), tmp_path / "msn", 4)
    weights = MSNForPreTraining.from_pretrained(tmp_path / "msn").target_encoder.state_dict()
    assert torch.equal(weights["layernorm.weight"], vit_weights(2)["norm.weight"])
    record = json.loads((tmp_path / "msn" / "conversion.json").read_text())
    assert record["made_up"] == ["target_encoder: starts as a copy of encoder"]
    assert record["kept"] == ["encoder", "prototypes"] and not record["target_only"]


def test_a_model_of_one_patch_is_not_masked(save, tmp_path):
    convert_checkpoint(save(msn_checkpoint(side=1)), tmp_path / "msn", 4)
    assert MSNForPreTraining.from_pretrained(tmp_path / "msn").config.mask_ratio == 0.0


def test_the_record_says_what_came_from_where(save, tmp_path):
    file = save(msn_checkpoint())
    convert_checkpoint(file, tmp_path / "msn", 4)
    assert json.loads((tmp_path / "msn" / "conversion.json").read_text()) == {
        "source": {"file": "original.pth.tar", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "method": "msn",
        "architecture": "ViT-64x2/4",
        "heads_assumed": False,
        "num_attention_heads": 4,
        "epoch": 7,
        "kept": ["encoder", "target_encoder", "prototypes"],
        "left_out": ["opt", "scaler", "loss", "batch_size", "world_size", "lr"],
        "made_up": [],
        "assumed": [],
        "module_prefix": True,
        "target_only": False,
    }
    processor = AutoImageProcessor.from_pretrained(tmp_path / "msn")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (18, 16)


def test_a_converted_model_trains_and_moves_its_target(save, tmp_path, msn_batch):
    convert_checkpoint(save(msn_checkpoint()), tmp_path / "msn", 4)
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn").train()
    before = model.target_encoder.embeddings.cls_token.clone()
    model(**msn_batch).loss.backward()
    assert torch.isfinite(model.prototypes.grad).all() and model.prototypes.grad.abs().sum() > 0
    model.update_target(0.5)
    assert not torch.equal(before, model.target_encoder.embeddings.cls_token)


def test_a_run_starts_from_a_converted_trunk_at_another_size(save, tmp_path):
    convert_checkpoint(save(msn_checkpoint()), tmp_path / "msn", 4)
    converted = MSNForPreTraining.from_pretrained(tmp_path / "msn")
    for model_class in (MSNForPreTraining, PAWSForPreTraining):
        model = model_class.from_backbone(tmp_path / "msn", image_size=8, projection_dim=12)
        weight = converted.target_encoder.layers[1].mlp.fc1.weight
        assert torch.equal(model.encoder.layers[1].mlp.fc1.weight, weight)
        assert model.encoder.embeddings.position_embeddings.shape == (1, 5, 64)
    assert load_vision_model(str(tmp_path / "msn")).config.hidden_size == 64


@pytest.mark.parametrize(
    ("shape", "name", "options"),
    [
        ({"pred": 6}, "resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}),
        (
            {"bottleneck": False, "blocks": (2, 2, 2, 2), "channels": (64, 8, 8, 8)},
            "resnet18",
            {"channels": [64, 8, 8, 8]},
        ),
        ({"blocks": (3, 4, 6, 3), "channels": (64, 128, 256, 512), "pred": 6}, "resnet50", None),
        ({"blocks": (3, 4, 6, 3), "bottleneck": False, "channels": (64, 128, 256, 512)}, "resnet34", None),
    ],
)
def test_paws_on_a_resnet_computes_what_the_original_network_does(save, tmp_path, shape, name, options):
    weights = resnet_weights(**shape)
    content = {"encoder": prefixed(weights), "opt": {}, "epoch": 12, "temperature": 0.1, "amp": {"scale": 65536.0}}
    convert_checkpoint(save(content), tmp_path / "paws")
    model = PAWSForPreTraining.from_pretrained(tmp_path / "paws").eval()
    assert (model.config.timm_model, model.config.timm_options) == (name, options)
    for size in (64, 96):
        pixels = images(size)
        features = resnet_forward(doubled(weights), pixels.double())
        projections = project(doubled(weights), features, F.relu)
        with torch.no_grad():
            torch.testing.assert_close(model.encoder(pixels).double(), features, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.project(pixels).double(), projections, **TOLERANCE)
            if "pred" in shape:
                predictions = model.prediction_head(model.project(pixels)).double()
                torch.testing.assert_close(predictions, predict(doubled(weights), projections), **TOLERANCE)
    assert (model.prediction_head is not None) is ("pred" in shape)
    assert AutoImageProcessor.from_pretrained(tmp_path / "paws").crop_size["height"] == 224
    assert SuNCEtForPreTraining.from_backbone(tmp_path / "paws").config.timm_model == name


@pytest.mark.parametrize(("given", "activation"), [(None, F.relu), ("gelu", F.gelu)])
def test_paws_on_a_vit_computes_what_the_original_network_does(save, tmp_path, given, activation):
    weights = vit_weights(1, pred=5)
    convert_checkpoint(save({"encoder": weights}), tmp_path / "paws", 4, projection_activation=given)
    convert_checkpoint(save(weights), tmp_path / "bare", 4, projection_activation=given, method="paws")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("paws", "bare")]
    assert files[0] == files[1]
    model = PAWSForPreTraining.from_pretrained(tmp_path / "paws").eval()
    assert model.config.prediction_width == 5
    assert_vit_computes_the_same(model.encoder, model.project, weights, 4, (16, 8), activation)
    record = json.loads((tmp_path / "paws" / "conversion.json").read_text())
    assert record["assumed"] == ([] if given else ["projection_activation: relu"])


def form(kind: str) -> dict:
    """The same released checkpoint in another form."""
    target, prototypes = vit_weights(1), msn_checkpoint()["prototypes"]
    return {
        "wrapped": {"state_dict": {"target_encoder": target, "prototypes": prototypes, "epoch": 7}, "epoch": None},
        "compiled": {"target_encoder": prefixed(target, "module._orig_mod."), "prototypes": prototypes},
        "some prefixes": {
            "target_encoder": {("module." if "blocks" in name else "") + name: t for name, t in target.items()},
            "prototypes": prototypes,
        },
        "parameters": {
            "target_encoder": {
                name: torch.nn.Parameter(t) if t.is_floating_point() else t for name, t in target.items()
            },
            "prototypes": torch.nn.Parameter(prototypes),
        },
        "layer of prototypes": {"target_encoder": target, "prototypes": {"module.weight": prototypes}},
        "named weight": {"target_encoder": target, "prototypes.weight": prototypes},
        "inside": {"target_encoder": {**target, "prototypes": prototypes}},
        "flat": {**prefixed(target, "module.target_encoder."), "prototypes": prototypes, "epoch": 7},
        "bare": {**prefixed(target), "module.prototypes": prototypes},
        "epoch as a tensor": {"target_encoder": target, "prototypes": prototypes, "epoch": torch.tensor(7)},
        "no counters": {
            "target_encoder": {name: t for name, t in target.items() if not name.endswith("tracked")},
            "prototypes": prototypes,
        },
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "wrapped",
        "compiled",
        "some prefixes",
        "parameters",
        "layer of prototypes",
        "named weight",
        "inside",
        "flat",
        "bare",
        "epoch as a tensor",
        "no counters",
    ],
)
def test_other_forms_of_the_same_checkpoint_give_the_same_model(save, tmp_path, kind):
    convert_checkpoint(save(msn_checkpoint(full=False), "usual.pth"), tmp_path / "usual", 4)
    convert_checkpoint(save(form(kind)), tmp_path / "msn", 4)
    usual = MSNForPreTraining.from_pretrained(tmp_path / "usual").state_dict()
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn").state_dict()
    for name, tensor in usual.items():
        if not (kind == "no counters" and name.endswith("num_batches_tracked")):
            assert torch.equal(model[name], tensor), name
    record = json.loads((tmp_path / "msn" / "conversion.json").read_text())
    assert record["epoch"] == (7 if kind in ("wrapped", "flat", "epoch as a tensor") else None)
    if kind == "no counters":
        assert "target_encoder.fc.bn1.num_batches_tracked: 0" in record["made_up"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_that_is_said(save, tmp_path, dtype):
    content = msn_checkpoint(full=False)
    network = content["target_encoder"]
    content["target_encoder"] = {k: t.to(dtype) if t.is_floating_point() else t for k, t in network.items()}
    content["prototypes"] = content["prototypes"].to(dtype)
    convert_checkpoint(save(content), tmp_path / "msn", 4)
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn")
    assert model.dtype == torch.float32
    expected = content["target_encoder"]["module.norm.weight"].float()
    assert torch.equal(model.target_encoder.layernorm.weight, expected)
    said = json.loads((tmp_path / "msn" / "conversion.json").read_text())["made_up"]
    assert f"float32 weights, of {str(dtype).removeprefix('torch.')} in the file" in said


def test_a_trunk_alone_becomes_a_plain_export_without_a_pretraining_model(save, tmp_path):
    weights = vit_weights(1, head=False)
    for name, content in {"nested": {"target_encoder": weights}, "bare": prefixed(weights)}.items():
        file = save(content, name)
        assert convert_checkpoint(file, None, 4, export_backbone_dir=tmp_path / f"{name}_trunk").is_dir()
        exported = AutoModel.from_pretrained(tmp_path / f"{name}_trunk").eval()
        with torch.no_grad():
            after = exported(images(16)).last_hidden_state[:, 0]
        torch.testing.assert_close(
            after.double(), vit_forward(doubled(weights), images(16).double(), 4)[1], **TOLERANCE
        )


def test_the_global_generator_and_the_input_are_left_as_they_were(save, tmp_path):
    file = save(msn_checkpoint())
    before = file.read_bytes(), torch.get_rng_state()
    convert_checkpoint(file, tmp_path / "msn", 4)
    assert file.read_bytes() == before[0] and torch.equal(torch.get_rng_state(), before[1])
