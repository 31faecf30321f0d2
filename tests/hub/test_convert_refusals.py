"""What is no original checkpoint, or not a whole one, is refused with the reason, and nothing is left behind."""

import re

import pytest
import timm
import torch
from original_reference import msn_checkpoint, prefixed, resnet_weights, vit_weights

from hf_msn import convert_checkpoint


@pytest.fixture
def refuse(tmp_path):
    """Converts `content`, or a file, and holds that it fails with `message` and leaves nothing."""

    def refuse(content, message, heads=4, **options):
        file = content
        if isinstance(content, dict):
            file = tmp_path / "original.pth.tar"
            torch.save(content, file)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=message) as caught:
            convert_checkpoint(file, tmp_path / "new" / "model", heads, **options)
        assert sorted(tmp_path.iterdir()) == before
        return str(caught.value)

    return refuse


def changed(section: str = "target_encoder", remove=(), **tensors) -> dict:
    """A full checkpoint whose section has other tensors; double underscores stand for dots."""
    content = msn_checkpoint(prefix="")
    weights = content[section]
    weights.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})
    content[section] = {name: tensor for name, tensor in weights.items() if name not in remove}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": {}, "teacher": {}}, "seems to be a checkpoint of DINO"),
        ({"teacher": vit_weights(head=False) | {"head.last_layer.weight_v": torch.ones(2)}}, "DINO"),
        (vit_weights(head=False) | {"head.last_layer.weight_v": torch.ones(2)}, "DINO"),
        ({"encoder": vit_weights(head=False) | {"head.mlp.0.weight": torch.ones(2)}}, "DINO"),
        ({"state_dict": prefixed(resnet_weights(), "module.encoder_q.")}, "MoCo"),
        ({"state_dict": prefixed(vit_weights(), "module.base_encoder.")}, "MoCo"),
        ({"model": vit_weights(head=False) | {"decoder_embed.weight": torch.ones(2, 2)}}, "masked autoencoder"),
        (
            {"model": vit_weights(head=False) | {"head.weight": torch.ones(9, 64)}},
            "'head.weight' .*trained with labels",
        ),
        ({"encoder": resnet_weights() | {"fc.weight": torch.ones(9, 128)}}, "'fc.weight' .*linear classifier"),
        (vit_weights(head=False) | {"dist_token": torch.ones(1, 1, 64)}, "trained with labels"),
        (vit_weights(head=False) | {"blocks.0.ls1.gamma": torch.ones(64)}, "DINOv2"),
        ({"vit.embeddings.cls_token": torch.ones(1, 1, 64)}, "in the form of transformers. Load it with"),
        ({"target_encoder": {"embeddings.cls_token": torch.ones(1, 1, 64)}}, "in the form of transformers"),
        ({"weights": torch.ones(3)}, "neither 'encoder' nor 'target_encoder'"),
        ({"epoch": 3}, "neither 'encoder' nor 'target_encoder'"),
        ({"state_dict": {}}, "'state_dict' must hold .* but is empty"),
        ({"state_dict": {"model": {"state_dict": {"encoder": vit_weights()}}}}, "neither 'encoder' nor"),
        ({"encoder": {"module.conv.weight": torch.ones(3)}}, "'encoder' of .* is neither a ViT nor a ResNet"),
        ({"encoder": timm.create_model("convnext_atto").state_dict()}, "neither a ViT nor a ResNet"),
        ({"encoder": {}}, "'encoder' must hold named tensors"),
        ({"encoder": {"pos_embed": [1, 2]}}, "'pos_embed' is of type list"),
        ({"encoder": {3: torch.ones(3)}}, "has 3. It is no checkpoint"),
    ],
)
def test_another_method_is_named(refuse, content, message):
    refuse(content, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            changed(fc__fc1__weight=torch.ones(40, 32)),
            r"'fc.fc1.weight' has \(40, 32\), but beside the others it must have \(40, 64\)",
        ),
        (changed(fc__fc2__weight=torch.ones(40, 41)), r"'fc.fc2.weight' has \(40, 41\)"),
        (
            changed("encoder", fc__fc3__weight=torch.ones(23, 40)),
            r"shapes in 'encoder'.*'fc.fc3.weight' has \(23, 40\)",
        ),
        (changed(norm__weight=torch.ones(63)), r"'norm.weight' has \(63,\)"),
        (changed(cls_token=torch.ones(1, 1, 32)), r"'cls_token' has \(1, 1, 32\)"),
        (changed(pos_embed=torch.ones(1, 16, 64)), "'pos_embed' must be .* a square grid .* 16 positions: 15 is no"),
        (changed(pos_embed=torch.ones(1, 1, 64)), "1 positions: 0 is no square number"),
        (
            changed(pos_embed=torch.ones(17, 64)),
            r"'pos_embed' must have 3 dimensions, none empty, but has .*\(17, 64\)",
        ),
        (changed(patch_embed__proj__weight=torch.ones(64, 3, 4, 5)), r"square patches of RGB .*\(64, 3, 4, 5\)"),
        (changed(patch_embed__proj__weight=torch.ones(64, 1, 4, 4)), r"square patches of RGB .*\(64, 1, 4, 4\)"),
        (changed(remove=["norm.bias"]), r"'target_encoder' .* 1 tensors are missing \(norm.bias\)"),
        (changed("encoder", remove=["blocks.1.attn.qkv.bias"]), r"'encoder' .* missing \(blocks.1.attn.qkv.bias\)"),
        (changed(remove=["pos_embed", "patch_embed.proj.weight"]), "neither a ViT nor a ResNet"),
        (changed(remove=["patch_embed.proj.weight"]), "'patch_embed.proj.weight' is missing, which shows"),
        (changed(blocks__5__norm1__weight=torch.ones(64)), r"missing \(blocks.2.norm1.weight, .* and \d+ more\)"),
        (changed(blocks__999999999__norm1__weight=torch.ones(64)), "here are 1000000000 blocks"),
        (changed(extra__weight=torch.ones(3)), r"1 tensors are unexpected \(extra.weight\)"),
        (changed(fc__bn1__running_mean=torch.ones(41)), r"'fc.bn1.running_mean' has \(41,\)"),
        (changed(remove=["fc.bn1.weight"]), r"missing \(fc.bn1.weight\)"),
        (
            changed(norm__weight=torch.ones(64, dtype=torch.int8)),
            "must be floating-point .* 'norm.weight' is of .*int8",
        ),
        (
            changed(norm__weight=torch.full((64,), float("nan"))),
            "'target_encoder.norm.weight' has NaN or Inf in 64 of",
        ),
        (changed("encoder", norm__bias=torch.full((64,), float("inf"))), "'encoder.norm.bias' has NaN or Inf"),
        (changed(norm__weight=torch.ones(64).to_sparse()), "'target_encoder.norm.weight' must be a dense tensor"),
        (changed(norm__weight=torch.ones(64, dtype=torch.complex64)), "must be a dense tensor of real numbers"),
        (changed(**{"module.norm.weight": torch.ones(64)}), "'target_encoder' has 'norm.weight' twice"),
        (
            {**prefixed(vit_weights(), "encoder."), "module.encoder.norm.weight": torch.ones(64)},
            "'encoder' has 'norm.weight' twice",
        ),
        (msn_checkpoint() | {"prototypes": torch.ones(6, 25)}, "prototypes have dimension 25, but .* 24"),
        (msn_checkpoint() | {"prototypes": torch.ones(6)}, r"one tensor of shape \(K, D\), but .*\(6,\)"),
        (msn_checkpoint() | {"prototypes": torch.ones(6, 24, dtype=torch.int8)}, "'prototypes' must be .*torch.int8"),
        (msn_checkpoint() | {"prototypes": torch.ones(6, 24).bool()}, "'prototypes' must be .*torch.bool"),
        (msn_checkpoint() | {"target_encoder": [1]}, "'target_encoder' must hold named tensors, but is of type list"),
        (msn_checkpoint() | {"encoder": "vit"}, "'encoder' must hold named tensors, but is of type str"),
        (msn_checkpoint() | {"prototypes": [1]}, r"one tensor of shape \(K, D\), but .*list"),
        (msn_checkpoint() | {"prototypes": torch.full((6, 24), float("nan"))}, "'prototypes' has NaN or Inf"),
        (msn_checkpoint() | {"prototypes": None}, "has no 'prototypes'.*--export_backbone"),
        ({"target_encoder": vit_weights()}, "has no 'prototypes'"),
        ({"target_encoder": vit_weights(pred=4), "prototypes": torch.ones(6, 24)}, "prediction head 'pred'"),
        (
            {"target_encoder": vit_weights(head=False), "prototypes": torch.ones(6, 24)},
            "trunk without projection head",
        ),
        (vit_weights(head=False), "trunk without projection head 'fc'.*--export_backbone"),
        ({"target_encoder": resnet_weights(), "prototypes": torch.ones(6, 24)}, "MSN here has a ViT"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(refuse, content, message):
    refuse(content, message)


def wide_resnet() -> dict:
    return resnet_weights() | {"conv1.weight": torch.ones(16, 3, 3, 3), "layer1.0.shortcut.0.weight": torch.ones(3)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (wide_resnet(), "WideResNet as PAWS has for CIFAR-10, but this package has no such encoder"),
        (resnet_weights() | {"conv1.weight": torch.ones(128, 3, 7, 7)}, "'conv1.weight' has 128 channels .*widened"),
        ({k: t for k, t in resnet_weights().items() if "layer4" not in k}, r"four stages.*\[1, 1, 1, 0\]"),
        (
            resnet_weights() | {"layer2.0.conv2.weight": torch.ones(16, 4, 3, 3)},
            r"'layer2.0.conv2.weight' has \(16, 4",
        ),
        (resnet_weights() | {"layer1.0.se.fc1.weight": torch.ones(4, 32)}, "unexpected .layer1.0.se.fc1.weight"),
        (resnet_weights() | {"fc.fc1.weight": torch.ones(40, 127)}, r"'fc.fc1.weight' has \(40, 127\)"),
        ({k: t for k, t in resnet_weights(pred=6).items() if not k.startswith("pred.bn")}, "one has batch norm"),
    ],
)
def test_a_resnet_that_timm_has_not_is_refused(refuse, weights, message):
    refuse({"encoder": weights}, message, heads=None)


@pytest.mark.parametrize("heads", [0, -4, 5, True, 4.0, "4"])
def test_a_number_of_heads_that_does_not_divide_the_width_is_refused(refuse, heads):
    message = refuse(msn_checkpoint(), "`num_attention_heads` must be a whole number that divides the width 64", heads)
    assert repr(heads) in message and "it is 1" in message


def test_a_width_that_is_no_multiple_of_64_asks_for_the_number_of_heads(refuse):
    refuse(msn_checkpoint(width=48), r"width of the ViT is 48.*`--num_attention_heads`", None)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"encoder": resnet_weights()}, {}, "`num_attention_heads` is about ViTs"),
        (msn_checkpoint(), {"method": "paws"}, "`method` is 'paws', but .* which are MSN's"),
        (msn_checkpoint(), {"method": "dino"}, "`method` must be 'msn', 'paws' or left out, but is 'dino'"),
        (msn_checkpoint(), {"projection_activation": "relu"}, "`projection_activation` is about PAWS"),
        (msn_checkpoint(), {"projection_activation": "tanh"}, "must be 'relu' or 'gelu', but is 'tanh'"),
        (vit_weights(), {"method": "msn"}, "has no 'prototypes'"),
        (vit_weights(), {}, "one ViT with a projection head, which may be of MSN, .* or of PAWS.*--method paws"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(refuse, content, options, message):
    refuse(content, message, **options)


def test_an_output_that_would_lose_something_is_refused(tmp_path):
    file = tmp_path / "original.pth.tar"
    torch.save(msn_checkpoint(), file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "closed").write_text("a file where a folder should be")
    (tmp_path / "linked").symlink_to(tmp_path / "closed")
    for places, message in {
        (file, None): "is the input",
        (tmp_path / "full", None): "`output_dir` must be new or empty",
        (tmp_path / "full" / "notes.txt", None): "must be a folder, new or empty",
        (tmp_path / "linked", None): "but '.*linked' is a link",
        (tmp_path / "closed" / "model", None): "`output_dir` must be writable",
        (None, None): "There is nothing to write",
        (tmp_path / "a", tmp_path / "full"): "`export_backbone_dir` must be new or empty",
        (tmp_path / "a", tmp_path / "a"): "must lie beside each other",
        (tmp_path / "a", tmp_path / "a" / "b"): "must lie beside each other",
    }.items():
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(file, places[0], 4, export_backbone_dir=places[1])
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "closed",
        "full",
        "linked",
        "notes.txt",
        "original.pth.tar",
    ]


@pytest.mark.parametrize("broken", ["save_pretrained", "export"])
def test_a_conversion_that_fails_while_writing_leaves_nothing(tmp_path, monkeypatch, broken):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    file = tmp_path / "original.pth.tar"
    torch.save(msn_checkpoint(), file)
    name = "MSNForPreTraining.save_pretrained" if broken == "save_pretrained" else "ViTMSNModel.save_pretrained"
    monkeypatch.setattr(f"transformers.{name}" if "ViT" in name else f"hf_msn.{name}", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(file, tmp_path / "model", 4, export_backbone_dir=tmp_path / "trunk")
    assert list(tmp_path.iterdir()) == [file]


def test_a_message_names_a_few_of_many_tensors(refuse):
    content = changed(remove=[name for name in vit_weights() if name.startswith("blocks.0.")][:11])
    message = refuse(content, "11 tensors are missing|'blocks.0.mlp.fc1.weight' is missing")
    assert len(re.findall(r"blocks\.0\.", message)) <= 9
