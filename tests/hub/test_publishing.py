"""What is published of a checkpoint, and that it loads; over HTTP, with the client of huggingface_hub."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from hub_state import TOKEN
from huggingface_hub import ModelCard
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, ViTMSNConfig, ViTMSNForImageClassification

from hf_msn import (
    MSNForPreTraining,
    PAWSConfig,
    PAWSForPreTraining,
    PublishingError,
    evaluation_image_processor,
    publish_checkpoint,
)

NAME = "alice/tiny"
BACKBONE = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]

LOAD_WITHOUT_HF_MSN = """
import sys

sys.modules["hf_msn"] = None
import torch
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("alice/tiny")
assert AutoImageProcessor.from_pretrained("alice/tiny").size
torch.save((type(model).__name__, model.state_dict()), sys.argv[1])
"""


def publish(run, repo_id=NAME, without_results=True, **settings):
    return publish_checkpoint(run, repo_id, without_results=without_results, **settings)


def test_exactly_the_listed_files_go_up_in_one_commit(hub, run):
    before = sorted(str(path) for path in run.rglob("*"))
    done = publish(run)
    assert sorted(hub.files(NAME)) == BACKBONE == [file.path for file in done.files]
    assert hub.repos[NAME].messages == ["initial commit", "Publish with hf_msn"]
    assert {file.path: file.size for file in done.files} == {k: len(v) for k, v in hub.files(NAME).items()}
    assert [file.path for file in done.files if file.is_lfs] == ["model.safetensors"]
    assert done.url == f"{hub.url}/{NAME}/commit/{hub.repos[NAME].branches['main']}"
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_what_was_published_loads_where_hf_msn_is_not_installed_with_equal_weights(hub, run, tmp_path):
    publish(run)
    script = [sys.executable, "-c", LOAD_WITHOUT_HF_MSN, tmp_path / "loaded.pt"]
    environment = {**os.environ, **hub.environment(tmp_path / "other", token=None)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kind, weights = torch.load(tmp_path / "loaded.pt")
    assert kind == "ViTMSNModel"
    expected = MSNForPreTraining.from_pretrained(run).target_encoder.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_pretraining_checkpoint_goes_up_whole_where_that_is_asked_for(hub, run):
    publish(run, what="pretraining", private=True)
    assert sorted(hub.files(NAME)) == BACKBONE
    assert hub.repos[NAME].private
    loaded = MSNForPreTraining.from_pretrained(NAME)
    expected = load_file(run / "model.safetensors")
    assert hub.files(NAME)["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert torch.equal(loaded.prototypes, expected["prototypes"])
    assert AutoImageProcessor.from_pretrained(NAME).crop_size["height"] == 16


def test_a_classifier_goes_up_as_it_is(hub, tmp_path):
    config = ViTMSNConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = ViTMSNForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "tuned")
    for what in (None, "classifier"):
        publish(tmp_path / "tuned", what=what)
        assert sorted(hub.files(NAME)) == ["README.md", "config.json", "model.safetensors"]
    loaded = ViTMSNForImageClassification.from_pretrained(NAME)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    for what, remedy in (("pretraining", "Give the folder of the pretraining run"), ("backbone", "leave out `what`")):
        with pytest.raises(ValueError, match=f"`what` is '{what}', but .* holds a classifier model. .*{remedy}"):
            publish(tmp_path / "tuned", what=what)


def test_a_network_of_timm_goes_up_as_timm_and_transformers_load_it(hub, tmp_path):
    fields = {"timm_model": "test_resnet", "projection_hidden_dim": 8, "projection_dim": 8, "image_size": 32}
    model = PAWSForPreTraining(PAWSConfig(**fields)).eval()
    model.save_pretrained(tmp_path / "paws")
    evaluation_image_processor(32).save_pretrained(tmp_path / "paws")
    publish(tmp_path / "paws")
    assert sorted(hub.files(NAME)) == BACKBONE
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"hf-hub:{NAME}", pretrained=True, num_classes=0, cache_dir=tmp_path / "cache").eval()
    torch.testing.assert_close(loaded(images), model.encoder(images))


def test_shards_go_up_with_their_index_and_replace_a_single_file(hub, run, save_run, tmp_path):
    publish(run, what="pretraining")
    sharded = save_run(tmp_path / "sharded", shards=True)
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    publish(sharded, what="pretraining", update=True)
    expected = ["README.md", "config.json", *shards, "model.safetensors.index.json", "preprocessor_config.json"]
    assert sorted(hub.files(NAME)) == sorted(expected)  # else from_pretrained would load the old single file
    assert MSNForPreTraining.from_pretrained(NAME).config.num_prototypes == 8


def test_a_new_revision_is_made_and_main_stays_as_it_was(hub, run):
    publish(run)
    main = hub.files(NAME)
    publish(run, what="pretraining", revision="v2")
    assert hub.files(NAME) == main
    assert AutoConfig.from_pretrained(NAME, revision="v2").model_type == "msn"
    assert AutoModel.from_pretrained(NAME).config.model_type == "vit_msn"
    hub.repos[NAME].tags["release"] = hub.repos[NAME].branches["main"]
    with pytest.raises(PublishingError, match="`revision` must be a branch, but 'release' is a tag"):
        publish(run, revision="release")


def test_a_dry_run_lists_all_and_asks_neither_token_nor_hub(hub, run, monkeypatch, tmp_path):
    hub.use_in_this_process(monkeypatch, tmp_path, token=None)
    listed = publish(run, dry_run=True)
    assert hub.requests == [] and hub.repos == {} and listed.url is None
    assert [file.path for file in listed.files] == BACKBONE
    lines = listed.table().splitlines()
    assert len(lines) == 6 and lines[-1].startswith("4 files, ") and lines[-1].endswith(f"for {NAME} (main)")
    weights = next(line for line in lines if line.startswith("model.safetensors"))
    assert "LFS" in weights and "export_backbone" in weights
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert {f.path: f.size for f in publish(run).files} == {f.path: f.size for f in listed.files}


def test_figures_of_the_card_go_up_with_it(hub, run, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "accuracy.png")
    publish(run, figures=[tmp_path / "accuracy.png"], license="apache-2.0", tags=["tiny"])
    files = hub.files(NAME)
    assert sorted(files) == sorted([*BACKBONE, "figures/accuracy.png"])
    assert files["figures/accuracy.png"] == (tmp_path / "accuracy.png").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert "figures/accuracy.png" in card.text and "tiny" in card.data.tags and card.data.license == "apache-2.0"


def test_tokens_paths_and_user_names_do_not_reach_the_hub(hub, run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    monkeypatch.setenv("USER", "alice_smith")
    monkeypatch.setenv("LOGNAME", "alice_smith")
    for name, value in (
        ("config.json", {"_name_or_path": "alice_smith/start"}),
        (
            "run.json",
            {
                "format": "hf_msn run 1",
                "note": f"{run}/images of mine",
                "command": ["--data=/mnt/alice/x/images", "~/x/y.txt"],
            },
        ),
        ("conversion.json", {"source": {"file": "C:\\Users\\alice_smith\\msn.pth.tar"}, "url": "https://a.org/b/c"}),
    ):
        file = run / name
        file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **value}))
    publish(run, what="pretraining")
    files = hub.files(NAME)
    assert "_name_or_path" not in json.loads(files["config.json"])
    run_json = {"format": "hf_msn run 1", "note": "images of mine", "command": ["images", "y.txt"]}
    assert json.loads(files["run.json"]) == run_json
    assert json.loads(files["conversion.json"]) == {"source": {"file": "msn.pth.tar"}, "url": "https://a.org/b/c"}
    sent = hub.sent_bytes()
    for secret in (TOKEN, str(run.parent), str(run), "alice_smith", "/mnt/alice", os.getcwd()):
        assert secret.encode() not in sent, secret
    assert "alice_smith" in (run / "config.json").read_text()  # the checkpoint itself is left alone


def test_a_token_in_a_file_is_refused_and_not_repeated(hub, run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    for secret in (TOKEN, "hf_" + "x" * 34, "0123456789abcdef0123"):
        (run / "conversion.json").write_text(json.dumps({"command": f"train --key {secret}"}))
        with pytest.raises(ValueError, match=r"'conversion.json' .* token or password") as error:
            publish(run)
        assert secret not in str(error.value)
    assert hub.repos == {}


def test_private_data_beside_the_tensors_and_in_figures_is_refused(hub, run, tmp_path):
    weights = load_file(run / "model.safetensors")
    save_file(weights, run / "model.safetensors", metadata={"format": "pt", "from": "/home/alice/secret/run"})
    with pytest.raises(ValueError, match=r"'model.safetensors' .* has a path of this machine"):
        publish(run, what="pretraining")
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "made in /home/alice/plots")
    Image.new("RGB", (4, 4)).save(tmp_path / "figure.png", pnginfo=text)
    with pytest.raises(ValueError, match=r"'figures/figure.png' .* has a path of this machine"):
        publish(run, figures=[tmp_path / "figure.png"])
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "preprocessor_config.json"])
def test_a_link_out_of_the_folder_is_refused(hub, run, tmp_path, name):
    outside = tmp_path / "outside"
    (run / name).rename(outside) if (run / name).exists() else outside.write_text("{}")
    (run / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"'{name}' of .* is a link that leads out of the folder"):
        publish(run)
    assert hub.repos == {}


def test_a_checkpoint_that_is_not_whole_is_refused_before_the_hub_is_asked(hub, run, tmp_path):
    def refused(message, folder=run):
        with pytest.raises(ValueError, match=message):
            publish(folder)
        assert hub.requests == []

    refused("there is no folder", tmp_path / "absent")
    (tmp_path / "outer" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "outer" / "checkpoint-10").mkdir()
    refused("has no 'config.json'.* Did you mean '.*checkpoint-10'?", tmp_path / "outer")
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[:5000])
    refused("'model.safetensors' of .* is damaged")
    (run / "model.safetensors").unlink()
    refused("has no 'model.safetensors'. Weights are published as safetensors")
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secrets.safetensors"}}))
    refused("names '../../secrets.safetensors', which is no file of weights")
    (run / "config.json").write_text("{")
    refused("'config.json' of .* does not parse as JSON")


@pytest.mark.parametrize(
    "repo_id", ["tiny", "a/b/c", "alice/--x", "alice/a b", "alice/x.git", "", "datasets/a/b", "/x"]
)
def test_a_repo_id_that_cannot_be_one_is_refused(hub, run, repo_id):
    with pytest.raises(ValueError, match="`repo_id` must be 'user/name', but is"):
        publish(run, repo_id, dry_run=True)


@pytest.mark.parametrize("revision", ["", "a b", "../x", "-x", "v1.", "a//b", "x.lock", "a\nb"])
def test_a_revision_that_cannot_be_a_branch_is_refused(hub, run, revision):
    with pytest.raises(ValueError, match="`revision` must be the name of a branch"):
        publish(run, revision=revision, dry_run=True)


def test_a_card_without_results_must_be_asked_for(hub, run):
    with pytest.raises(ValueError, match="--without_results"):
        publish(run, without_results=False)
    assert hub.repos == {}
