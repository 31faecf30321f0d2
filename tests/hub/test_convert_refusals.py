"""Files that are no whole checkpoint of MSN or PAWS are refused, run no code and leave nothing behind."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from original_reference import msn_checkpoint, prefixed, resnet_weights, vit_weights

from hf_msn import convert_checkpoint


@pytest.fixture
def refuse(tmp_path):
    """Converts `content`, or a file, and checks that it fails with `message` and leaves nothing."""

    def refuse(content, message, heads=4, **options):
        file = content
        if not isinstance(content, os.PathLike):
            file = tmp_path / "original.pth.tar"
            torch.save(content, file)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(file, tmp_path / "new" / "model", heads, **options)
        assert sorted(tmp_path.iterdir()) == before

    return refuse


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


PLACES = {
    "alone": lambda content, code: code,
    "in the optimizer": lambda content, code: content | {"opt": {"state": [1, (code,)]}},
    "as a weight": lambda content, code: content | {"target_encoder": {"norm.weight": code}},
    "as a key": lambda content, code: content | {code: 1},
}


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_with_code_runs_nothing_and_is_refused(tmp_path, refuse, how, place, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not change this load
    content, file = PLACES[place](msn_checkpoint(), Code(tmp_path / "code_was_run")), tmp_path / "evil.pth.tar"
    if how == "bare pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with torch.serialization.safe_globals([os.mkdir]):  # allowed elsewhere in the process
        refuse(file, "evil.pth.tar" if how == "bare pickle" else r"evil.pth.tar.*nothing.*executed.*mkdir")
    assert not (tmp_path / "code_was_run").exists()
    torch.load(file, weights_only=False) if how != "bare pickle" else pickle.loads(file.read_bytes())
    assert (tmp_path / "code_was_run").is_dir(), "the file contains no code"


@pytest.mark.parametrize("value", [np.ones(3), np.array(["text"])[0], np.datetime64(1, "D"), np.void(b"12345678")])
def test_other_objects_of_numpy_are_refused(refuse, value):
    refuse(msn_checkpoint() | {"epoch": value}, "original.pth.tar")


def test_damaged_files_are_refused(tmp_path, refuse):
    torch.save(msn_checkpoint(), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        at = data.index(archive.read(largest)[100:140])
    flipped = bytearray(data)
    flipped[at] ^= 1
    cuts = [data[:length] for length in (0, 3, 30, len(data) // 2, len(data) - 1)]
    for content in (*cuts, flipped, b"<html>404</html>", bytes(5000)):
        (tmp_path / "damaged").write_bytes(content)
        refuse(tmp_path / "damaged", "damaged")
    refuse(tmp_path, "`input_path`")
    refuse(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        3,
        torch.ones(2, 2),
        {},
        {"weights": torch.ones(3)},
        {"student": {}, "teacher": {"pos_embed": torch.ones(1, 17, 64)}},
        {"state_dict": prefixed(resnet_weights(), "module.encoder_q.")},
        {"encoder": {"pos_embed": [1, 2]}},
        {"target_encoder": {"embeddings.cls_token": torch.ones(1, 1, 64)}, "prototypes": torch.ones(6, 24)},
    ],
    ids=lambda content: type(content).__name__,
)
def test_other_contents_are_refused(refuse, content):
    refuse(content, "MSN|named tensors")


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
        (changed(fc__fc1__weight=torch.ones(40, 32)), "target_projection_head.fc1.weight"),
        (changed("encoder", fc__fc3__weight=torch.ones(23, 40)), " projection_head.fc3.weight"),
        (changed(pos_embed=torch.ones(1, 16, 64)), "position_embeddings"),  # no square grid
        (changed(pos_embed=torch.ones(17, 64)), r"'pos_embed'.*\(17, 64\)"),
        (changed(patch_embed__proj__weight=torch.ones(64, 3, 4, 5)), "patch_embeddings"),
        (changed("encoder", remove=["blocks.1.attn.qkv.bias"]), ' "encoder.layers.1.attention.q_proj.bias'),
        (changed(remove=["patch_embed.proj.weight"]), "'patch_embed.proj.weight'.*missing"),
        (changed(blocks__999999999__norm1__weight=torch.ones(64)), "blocks.999999999"),
        (changed(extra__weight=torch.ones(3)), "target_encoder.extra.weight"),
        (changed(norm__weight=torch.ones(64, dtype=torch.int8)), "layernorm.weight.*int8"),
        (changed("encoder", norm__bias=torch.full((64,), float("inf"))), "encoder.layernorm.bias.*Inf"),
        (changed(norm__weight=torch.ones(64).to_sparse()), "layernorm.weight.*sparse"),
        (msn_checkpoint() | {"prototypes": torch.ones(6, 25)}, "prototypes"),
        (msn_checkpoint() | {"prototypes": None}, "prototypes.*--export_backbone"),
        ({"target_encoder": vit_weights(head=False), "prototypes": torch.ones(6, 24)}, "'fc'.*--export_backbone"),
        ({"target_encoder": resnet_weights(), "prototypes": torch.ones(6, 24)}, "MSN has a ViT"),
    ],
)
def test_missing_unexpected_and_wrong_tensors_are_named(refuse, content, message):
    refuse(content, f"(?s){message}")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({k: t for k, t in resnet_weights().items() if "layer4" not in k}, "fc1"),
        (resnet_weights() | {"layer2.0.conv2.weight": torch.ones(16, 4, 3, 3)}, "layer2.0.conv2.weight"),
        ({k: t for k, t in resnet_weights(pred=6).items() if not k.startswith("pred.bn")}, "prediction_head.bn1"),
        (resnet_weights() | {"fc.weight": torch.ones(9, 128)}, "fc.weight"),
    ],
)
def test_other_resnets_are_refused(refuse, weights, message):
    refuse({"encoder": weights}, f"(?s){message}", heads=None)


@pytest.mark.parametrize("heads", [0, 5, True, "4"])
def test_a_number_of_heads_that_does_not_divide_the_width_is_refused(refuse, heads):
    refuse(msn_checkpoint(), f"`num_attention_heads`.*{heads}", heads)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (msn_checkpoint(width=48), {"heads": None}, "48.*`num_attention_heads`"),
        ({"encoder": resnet_weights()}, {}, "`num_attention_heads`"),
        (msn_checkpoint(), {"method": "paws"}, "`method`"),
        (msn_checkpoint(), {"method": "dino"}, "`method`.*'dino'"),
        (msn_checkpoint(), {"projection_activation": "relu"}, "`projection_activation`"),
        (msn_checkpoint(), {"projection_activation": "tanh"}, "`projection_activation`.*'tanh'"),
        (vit_weights(), {"method": "msn"}, "prototypes"),
        (vit_weights(), {}, "--method paws"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(refuse, content, options, message):
    refuse(content, message, **options)


def test_places_that_overlap_or_hold_files_are_refused(tmp_path):
    file = tmp_path / "original.pth.tar"
    torch.save(msn_checkpoint(), file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for places in {
        (file, None),
        (tmp_path / "full", None),
        (tmp_path / "full" / "notes.txt" / "model", None),
        (None, None),
        (tmp_path / "a", tmp_path / "full"),
        (tmp_path / "a", tmp_path / "a"),
        (tmp_path / "a", tmp_path / "a" / "b"),
    }:
        with pytest.raises(ValueError, match=r"output_dir|export_backbone_dir"):
            convert_checkpoint(file, places[0], 4, export_backbone_dir=places[1])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "notes.txt", "original.pth.tar"]


@pytest.mark.parametrize("broken", ["hf_msn.MSNForPreTraining", "transformers.ViTMSNModel"])
def test_a_conversion_that_fails_while_writing_leaves_nothing(tmp_path, monkeypatch, broken):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    file = tmp_path / "original.pth.tar"
    torch.save(msn_checkpoint(), file)
    monkeypatch.setattr(f"{broken}.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(file, tmp_path / "model", 4, export_backbone_dir=tmp_path / "trunk")
    assert list(tmp_path.iterdir()) == [file]
