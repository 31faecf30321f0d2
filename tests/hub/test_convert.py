"""Checkpoints of the authors' code to models, against the original networks written plainly in float64."""

import hashlib
import json
import pickle

import numpy as np
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
    wide_resnet_forward,
    wide_resnet_weights,
)
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, ViTMSNModel

from hf_msn import (
    MSNForPreTraining,
    PAWSConfig,
    PAWSForPreTraining,
    convert_checkpoint,
    convert_to_original,
    read_recipe,
)
from hf_msn.hub.key_maps import architecture_name, key_map, to_ours

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
        (4, {"pred": 6}),
    ],
)
def test_msn_computes_the_features_of_the_original_network(save, tmp_path, heads, shape):
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
    assert (model.prediction_head is not None) is ("pred" in shape)
    if "pred" in shape:
        projections = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
        for head, weights in ((model.prediction_head, online), (model.target_prediction_head, target)):
            expected = predict(doubled(weights), projections.double(), F.gelu)
            torch.testing.assert_close(head(projections).double(), expected, **TOLERANCE)
    assert not any(p.requires_grad for p in model.target_encoder.parameters())
    assert all(p.requires_grad for p in model.encoder.parameters())


@pytest.mark.slow
def test_a_real_vit_s16_computes_the_same_at_224_and_96_pixels(save, tmp_path):
    shape = {"width": 384, "depth": 12, "mlp": 1536, "patch": 16, "side": 14, "hidden": 64, "dim": 32}
    content = msn_checkpoint(full=False, prototypes=16, **shape)
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


@pytest.mark.parametrize(("missing", "present"), [("encoder", "target_encoder"), ("target_encoder", "encoder")])
def test_the_network_that_a_file_lacks_is_a_copy_of_the_other(save, tmp_path, missing, present):
    content = msn_checkpoint() | {missing: None, "prototypes_lr": 0.1}
    convert_checkpoint(save(content), tmp_path / "msn", 4)
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn")
    weight = content[present]["module.norm.weight"]
    assert torch.equal(model.encoder.layernorm.weight, weight)
    assert torch.equal(model.target_encoder.layernorm.weight, weight)
    heads = model.projection_head.state_dict(), model.target_projection_head.state_dict()
    assert all(torch.equal(heads[0][name], tensor) for name, tensor in heads[1].items())
    record = json.loads((tmp_path / "msn" / "conversion.json").read_text())
    assert record["made_up"] == [f"{missing}: starts as a copy of {present}"]
    assert record["kept"] == [present, "prototypes"] and record["target_only"] is (missing == "encoder")


def test_a_model_of_one_patch_is_not_masked(save, tmp_path):
    convert_checkpoint(save(msn_checkpoint(side=1)), tmp_path / "msn", 4)
    assert MSNForPreTraining.from_pretrained(tmp_path / "msn").config.mask_ratio == 0.0


def test_the_record_lists_source_and_parts(save, tmp_path):
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


WIDENED = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_channels": 12, "bottleneck": True}
WIDENED_2 = {"layers": [2, 2, 2, 2], "channels": [128, 16, 16, 16], "stem_channels": 128, "bottleneck": False}
WRN = {"layers": [4, 4, 4], "channels": [32, 64, 128], "stem_channels": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "name", "options", "architecture"),
    [
        (
            resnet_weights(pred=6),
            "resnet50",
            {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
            "ResNet-50 (layers 1-1-1-1, channels 8-16-24-32)",
        ),
        (resnet_weights(blocks=(3, 4, 6, 3), channels=(64, 128, 256, 512), pred=6), "resnet50", None, "ResNet-50"),
        (resnet_weights(pred=6, stem=12), "paws_resnet", WIDENED, None),
        (
            resnet_weights(bottleneck=False, blocks=(2, 2, 2, 2), channels=(128, 16, 16, 16), stem=128),
            "paws_resnet",
            WIDENED_2,
            "ResNet-18 (w2)",
        ),
        (
            wide_resnet_weights(blocks=4, channels=(32, 64, 128), stem=16, pred=6),
            "paws_wide_resnet",
            WRN,
            "WideResNet-28-2",
        ),
    ],
    ids=["bottlenecks", "ResNet-50", "widened", "widened basic", "WRN-28-2"],
)
def test_paws_on_a_resnet_computes_the_features_of_the_original_network(
    save, tmp_path, weights, name, options, architecture
):
    content = {"encoder": prefixed(weights), "opt": {}, "epoch": 12, "temperature": 0.1, "amp": {"scale": 65536.0}}
    convert_checkpoint(save(content), tmp_path / "paws")
    model = PAWSForPreTraining.from_pretrained(tmp_path / "paws").eval()
    assert (model.config.timm_model, model.config.timm_options) == (name, options)
    is_wide, has_pred = name == "paws_wide_resnet", "pred.fc1.weight" in weights
    for size in (32, 20) if is_wide else (64, 96):
        pixels = images(size)
        features = (wide_resnet_forward if is_wide else resnet_forward)(doubled(weights), pixels.double())
        projections = project(doubled(weights), features, F.relu)
        with torch.no_grad():
            torch.testing.assert_close(model.encoder(pixels).double(), features, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.project(pixels).double(), projections, **TOLERANCE)
            if has_pred:
                predictions = model.prediction_head(model.project(pixels)).double()
                torch.testing.assert_close(predictions, predict(doubled(weights), projections), **TOLERANCE)
    assert (model.prediction_head is not None) is has_pred
    record = json.loads((tmp_path / "paws" / "conversion.json").read_text())
    assert record["architecture"] == architecture or architecture is None
    assert AutoImageProcessor.from_pretrained(tmp_path / "paws").crop_size["height"] == (32 if is_wide else 224)
    convert_to_original(tmp_path / "paws", tmp_path / "back.pth.tar")
    back = torch.load(tmp_path / "back.pth.tar")["encoder"]
    assert back.keys() == content["encoder"].keys()
    assert all(torch.equal(tensor, content["encoder"][key]) for key, tensor in back.items())


def test_the_recipe_of_cifar10_trains_the_network_of_the_authors():
    recipe = read_recipe("paws_wrn28_2_cifar10_4000")
    fields = {name: recipe[name] for name in recipe.keys() & vars(PAWSConfig()).keys()}
    model = PAWSForPreTraining(PAWSConfig(**fields)).eval()
    weights = wide_resnet_weights(blocks=4, channels=(32, 64, 128), stem=16, hidden=128, dim=128)
    model.load_state_dict(to_ours(weights, key_map(model, "encoder")))
    assert architecture_name(model.config) == "WideResNet-28-2"
    pixels = images(recipe["focal_size"])
    features = wide_resnet_forward(doubled(weights), pixels.double())
    with torch.no_grad():
        torch.testing.assert_close(
            model.project(pixels).double(), project(doubled(weights), features, F.relu), **TOLERANCE
        )


@pytest.mark.parametrize(("given", "activation"), [(None, F.relu), ("gelu", F.gelu)])
def test_paws_on_a_vit_computes_the_features_of_the_original_network(save, tmp_path, given, activation):
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
        "compiled": {"target_encoder": prefixed(target, "module._orig_mod."), "prototypes": prototypes},
        "parameters": {
            "target_encoder": {
                name: torch.nn.Parameter(t) if t.is_floating_point() else t for name, t in target.items()
            },
            "prototypes": torch.nn.Parameter(prototypes),
        },
        "bare": {**prefixed(target), "module.prototypes": prototypes, "epoch": torch.tensor(7)},
        "no counters": {
            "target_encoder": {name: t for name, t in target.items() if not name.endswith("tracked")},
            "prototypes": prototypes,
        },
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compiled", "parameters", "bare", "no counters"])
def test_other_forms_of_the_same_checkpoint_give_the_same_model(save, tmp_path, kind):
    convert_checkpoint(save(msn_checkpoint(full=False), "usual.pth"), tmp_path / "usual", 4)
    convert_checkpoint(save(form(kind)), tmp_path / "msn", 4)
    usual, found = (load_file(tmp_path / name / "model.safetensors") for name in ("usual", "msn"))
    for name, tensor in usual.items():
        assert torch.equal(found[name], tensor) or (kind == "no counters" and name.endswith("num_batches_tracked"))
    record = json.loads((tmp_path / "msn" / "conversion.json").read_text())
    assert record["epoch"] == (7 if kind == "bare" else None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_are_recorded(save, tmp_path, dtype):
    content = msn_checkpoint(full=False)
    network = content["target_encoder"]
    content["target_encoder"] = {k: t.to(dtype) if t.is_floating_point() else t for k, t in network.items()}
    content["prototypes"] = content["prototypes"].to(dtype)
    convert_checkpoint(save(content), tmp_path / "msn", 4)
    model = MSNForPreTraining.from_pretrained(tmp_path / "msn")
    assert model.dtype == torch.float32
    expected = content["target_encoder"]["module.norm.weight"].float()
    assert torch.equal(model.target_encoder.layernorm.weight, expected)
    record = json.loads((tmp_path / "msn" / "conversion.json").read_text())
    assert any(str(dtype).removeprefix("torch.") in note for note in record["made_up"])


def test_an_encoder_without_heads_becomes_a_plain_export(save, tmp_path):
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


def test_the_global_generator_and_the_input_do_not_change(save, tmp_path):
    file = save(msn_checkpoint())
    before = file.read_bytes(), torch.get_rng_state()
    convert_checkpoint(file, tmp_path / "msn", 4)
    assert file.read_bytes() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_and_legacy_files_are_read(tmp_path, save, zipped):
    values = {"loss": np.float64(3.25), "lr": np.float32(0.1), "half": np.float16(0.5), "flag": np.bool_(True)}
    values |= {"byte": np.uint8(200), "big_endian": np.array([258], ">i4")[0], "epoch": np.int64(12)}
    file = save(msn_checkpoint() | values, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    convert_checkpoint(file, tmp_path / "msn", 4)
    assert set(torch.serialization.get_safe_globals()) == before
    assert json.loads((tmp_path / "msn" / "conversion.json").read_text())["epoch"] == 12
    convert_checkpoint(save(msn_checkpoint(), "plain"), tmp_path / "plain_msn", 4)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("msn", "plain_msn"))
    assert one == other
