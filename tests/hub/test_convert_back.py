"""Models in the form of the authors' code: there and back is exact, bit for bit, from both sides."""

import pytest
import torch
from original_reference import msn_checkpoint, vit_weights
from tiny import tiny_model

from hf_msn import (
    MSNForPreTraining,
    PAWSConfig,
    PAWSForPreTraining,
    SuNCEtConfig,
    SuNCEtForPreTraining,
    convert_checkpoint,
    convert_to_original,
)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert value == other[name]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "content",
    [
        msn_checkpoint(),
        msn_checkpoint(full=False, prefix=""),
        msn_checkpoint(qkv_bias=False, bn=False),
        msn_checkpoint(full=False, pred=6),
        {"encoder": vit_weights(3, pred=6), "epoch": 3, "lr": 0.1},
    ],
    ids=["full", "released", "without bn and qkv bias", "released prediction head", "paws vit"],
)
def test_a_converted_file_comes_back_bit_for_bit(tmp_path, content):
    torch.save(content, tmp_path / "original.pth.tar")
    convert_checkpoint(tmp_path / "original.pth.tar", tmp_path / "model", 4)
    convert_to_original(tmp_path / "model", tmp_path / "back.pth.tar")
    kept = ("encoder", "target_encoder", "prototypes", "epoch")
    assert_same(load(tmp_path / "back.pth.tar"), {name: content[name] for name in kept if name in content})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("released", [False, True])
def test_a_model_made_here_goes_there_and_back_bit_for_bit(tmp_path, prefix, released):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1)
        if released:
            model.update_target(0.0)
    options = {"module_prefix": bool(prefix), "target_only": released}
    assert convert_to_original(model, tmp_path / "msn.pth.tar", **options) == tmp_path / "msn.pth.tar"
    written = load(tmp_path / "msn.pth.tar")
    assert set(written) == {"target_encoder", "prototypes"} | (set() if released else {"encoder"})
    assert written["target_encoder"][f"{prefix}blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert all(name.startswith(prefix) for name in written["target_encoder"])
    trunk = [
        name.removeprefix(prefix) for name in written["target_encoder"] if "fc." not in name.replace("mlp.fc", "")
    ]
    # optimizer states of the authors' code index parameters in this order
    assert trunk[:3] + trunk[-2:] == ["cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "norm.bias"]
    convert_checkpoint(tmp_path / "msn.pth.tar", tmp_path / "model", 2)
    loaded = MSNForPreTraining.from_pretrained(tmp_path / "model")
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert loaded.config.to_vit_msn_config().to_diff_dict() == model.config.to_vit_msn_config().to_diff_dict()


def test_paws_with_a_small_stem_goes_there_and_back(tmp_path):
    options = {"channels": [8, 8, 8, 8], "drop_path_rate": 0.1}
    model = paws(timm_model="resnet18", timm_options=options, small_image_stem=True, prediction_head=True)
    convert_to_original(model, tmp_path / "paws.pth.tar")
    convert_checkpoint(tmp_path / "paws.pth.tar", tmp_path / "model")
    loaded = PAWSForPreTraining.from_pretrained(tmp_path / "model")
    assert loaded.config.small_image_stem
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_the_written_file_shares_no_memory_with_the_model(tmp_path):
    model = tiny_model()
    convert_to_original(model, tmp_path / "msn.pth.tar")
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert (tmp_path / "msn.pth.tar").stat().st_size < 4 * numbers + 100_000


HEADS = {"projection_hidden_dim": 8, "projection_dim": 8}


def paws(**fields) -> PAWSForPreTraining:
    return PAWSForPreTraining(PAWSConfig(**HEADS, **fields))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: paws(timm_model="test_vit"), "test_vit"),
        (lambda: paws(timm_model="resnet18", timm_options={"avg_down": True}), "avg_down"),
        (lambda: tiny_model(hidden_act="relu"), "`hidden_act`.*'relu'"),
        (lambda: tiny_model(layer_norm_eps=1e-5), "`layer_norm_eps`.*1e-05"),
        (lambda: SuNCEtForPreTraining(SuNCEtConfig(timm_model="test_resnet", **HEADS)), "SuNCEtForPreTraining"),
    ],
)
def test_a_model_that_the_authors_code_lacks_is_refused(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        convert_to_original(model(), tmp_path / "original.pth.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_or_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "mine.pth").write_text("mine")
    with pytest.raises(ValueError, match=r"`output_path`.*mine.pth"):
        convert_to_original(tiny_model(), tmp_path / "mine.pth")
    assert (tmp_path / "mine.pth").read_text() == "mine"
    with pytest.raises(ValueError, match=r"`model`.*nowhere"):
        convert_to_original(tmp_path / "nowhere", tmp_path / "new.pth")
    with pytest.raises(ValueError, match="`target_only`"):
        convert_to_original(paws(timm_model="resnet18"), tmp_path / "new.pth", target_only=True)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.pth"]
