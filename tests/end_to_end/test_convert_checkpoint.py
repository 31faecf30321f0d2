"""`hf-msn convert`."""

from functools import partial

import pytest
import torch
from original_reference import msn_checkpoint, vit_weights
from transformers import AutoModel

from hf_msn import MSNForPreTraining


@pytest.fixture
def run(command):
    return partial(command, "convert")


def test_there_and_back_and_the_plain_export(run, tmp_path):
    original, model, trunk = (tmp_path / name for name in ("msn.pth.tar", "model", "trunk"))
    torch.save(msn_checkpoint(), original)
    printed = run("--input", original, "--output", model, "--num_attention_heads", 4, "--export_backbone", trunk)
    assert printed == f"Wrote {model}\n"
    loaded = MSNForPreTraining.from_pretrained(model)
    weight = loaded.target_encoder.layers[0].mlp.fc1.weight
    assert torch.equal(weight, vit_weights(1)["blocks.0.mlp.fc1.weight"])
    assert torch.equal(AutoModel.from_pretrained(trunk).layers[0].mlp.fc1.weight, weight)
    run("--to_original", "--input", model, "--output", tmp_path / "back.pth.tar")
    run("--to_original", "--input", model, "--output", tmp_path / "bare.pth.tar", "--module_prefix", "false")
    first, back, bare = (torch.load(tmp_path / f"{name}.pth.tar") for name in ("msn", "back", "bare"))
    assert back["encoder"].keys() == first["encoder"].keys()
    assert "module.norm.weight" in back["encoder"] and "norm.weight" in bare["encoder"]


def test_arguments_of_the_other_way_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="`method` must not be given"):
        run("--to_original", "--input", tmp_path, "--output", tmp_path / "a", "--method", "msn")
    with pytest.raises(ValueError, match="`target_only` must be given only"):
        run("--input", tmp_path, "--output", tmp_path / "a", "--target_only", "true")
    with pytest.raises(ValueError, match="`output` is missing"):
        run("--to_original", "--input", tmp_path)
    with pytest.raises(ValueError, match="`output` and"):
        run("--input", tmp_path / "a")
