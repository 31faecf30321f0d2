"""What is published of a checkpoint, and that it loads; over HTTP, with the client of huggingface_hub."""

import json
import os
import socket
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from card_runs import save_run
from finetuning_runs import ENCODER, PROCESSOR
from hub_server import TOKEN
from huggingface_hub import ModelCard
from huggingface_hub.utils._http import close_session
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, ViTMSNConfig, ViTMSNForImageClassification

from hf_msn import (
    BYOLConfig,
    BYOLForPreTraining,
    MSNForPreTraining,
    PAWSConfig,
    PAWSForPreTraining,
    PublishingError,
    convert_to_original,
    evaluation_image_processor,
    export_backbone,
    load_vision_model,
    publish_checkpoint,
)
from hf_msn.evaluation.backbones import resolve_image_processor

NAME = "alice/tiny"
BACKBONE = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


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


def test_a_pretraining_checkpoint_is_published_with_its_heads_on_demand(hub, run):
    publish(run, what="pretraining", private=True)
    assert sorted(hub.files(NAME)) == BACKBONE
    assert hub.repos[NAME].private
    assert hub.files(NAME)["model.safetensors"] == (run / "model.safetensors").read_bytes()
    loaded = MSNForPreTraining.from_pretrained(NAME)
    assert torch.equal(loaded.prototypes, load_file(run / "model.safetensors")["prototypes"])
    assert AutoImageProcessor.from_pretrained(NAME).crop_size["height"] == 16


@pytest.mark.slow
def test_a_classifier_is_published_as_it_is(hub, tmp_path):
    config = ViTMSNConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = ViTMSNForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "tuned")
    publish(tmp_path / "tuned")
    publish(tmp_path / "tuned", what="classifier")
    assert sorted(hub.files(NAME)) == ["README.md", "config.json", "model.safetensors"]
    loaded = ViTMSNForImageClassification.from_pretrained(NAME)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    for what in ("pretraining", "backbone", "encoder"):
        with pytest.raises(ValueError, match=what):
            publish(tmp_path / "tuned", what=what)


def test_a_network_of_timm_is_published_in_the_form_of_timm(hub, tmp_path):
    fields = {"timm_model": "test_resnet", "projection_hidden_dim": 8, "projection_dim": 8, "image_size": 32}
    model = PAWSForPreTraining(PAWSConfig(**fields)).eval()
    model.save_pretrained(tmp_path / "paws")
    evaluation_image_processor(32).save_pretrained(tmp_path / "paws")
    publish(tmp_path / "paws")
    assert sorted(hub.files(NAME)) == BACKBONE
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"hf-hub:{NAME}", pretrained=True, num_classes=0, cache_dir=tmp_path / "cache").eval()
    torch.testing.assert_close(loaded(images), model.encoder(images))


def test_byol_is_published_by_its_online_encoder_and_on_demand_with_its_heads(hub, tmp_path):
    fields = {**ENCODER, "ema": True, "predictor": "direct_pred"}
    model = BYOLForPreTraining(BYOLConfig(**fields)).eval()
    torch.nn.init.ones_(model.target_encoder.layernorm.bias)
    model.save_pretrained(tmp_path / "byol")
    PROCESSOR.save_pretrained(tmp_path / "byol")
    publish(tmp_path / "byol")
    assert sorted(hub.files(NAME)) == BACKBONE
    loaded = AutoModel.from_pretrained(NAME)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name]), name
    target = AutoModel.from_pretrained(
        export_backbone(model, tmp_path / "target", "target", image_processor=PROCESSOR)
    )
    assert torch.equal(target.layernorm.bias, model.target_encoder.layernorm.bias)
    publish(tmp_path / "byol", "alice/whole", what="pretraining")
    card = hub.files("alice/whole")["README.md"].decode()
    for part in ("BYOL with DirectPred", "2006.07733", "2102.06810", "self-supervised"):
        assert part in card
    again = BYOLForPreTraining.from_pretrained("alice/whole")
    assert all(torch.equal(*pair) for pair in zip(again.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="BYOLForPreTraining"):
        convert_to_original(model, tmp_path / "original.pth.tar")


@pytest.mark.slow
def test_shards_replace_a_single_file(hub, run, tmp_path):
    publish(run, what="pretraining")
    sharded = save_run(tmp_path / "sharded", shards=True)
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    publish(sharded, what="pretraining", update=True)
    expected = ["README.md", "config.json", *shards, "model.safetensors.index.json", "preprocessor_config.json"]
    assert sorted(hub.files(NAME)) == sorted(expected)  # else from_pretrained would load the old single file
    assert MSNForPreTraining.from_pretrained(NAME).config.num_prototypes == 8


@pytest.mark.slow
def test_a_new_revision_is_made_and_evaluated_as_it_is_and_main_stays_as_it_was(hub, run):
    publish(run)
    main = hub.files(NAME)
    evaluation_image_processor(16, crop_fraction=1.0).save_pretrained(run)
    publish(run, what="pretraining", revision="v2", update=True)
    assert hub.files(NAME) == main
    for load, kind, edge in (
        (load_vision_model, "vit_msn", 18),
        (partial(load_vision_model, revision="v2"), "msn", 16),
        (partial(MSNForPreTraining.from_pretrained, revision="v2"), "msn", 16),
    ):
        loaded = load(NAME)
        assert (loaded.config.model_type, resolve_image_processor(loaded).size["shortest_edge"]) == (kind, edge)


def test_a_dry_run_needs_neither_token_nor_hub(hub, run, monkeypatch, tmp_path):
    hub.use_in_this_process(monkeypatch, tmp_path, token=None)
    listed = publish(run, dry_run=True)
    assert hub.requests == [] and hub.repos == {} and listed.url is None
    assert [file.path for file in listed.files] == BACKBONE
    lines = listed.table().splitlines()
    assert len(lines) == 6 and lines[-1].startswith("4 files, ") and lines[-1].endswith(f"for {NAME} (main)")
    assert "LFS" in next(line for line in lines if line.startswith("model.safetensors"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert {f.path: f.size for f in publish(run).files} == {f.path: f.size for f in listed.files}


@pytest.mark.parametrize("given", [str, Path, lambda path: [path]])
def test_one_file_of_results_needs_no_list(made, given):
    listed = publish_checkpoint(made["checkpoint"], NAME, results=given(made["results"]), dry_run=True)
    assert [file.origin for file in listed.files if file.path == "README.md"] == ["the card, from 1 result files"]


def test_figures_are_published_without_the_text_stored_beside_the_picture(hub, run, tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "/home/alice/plots")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "accuracy.png", pnginfo=text)
    publish(run, figures=[tmp_path / "accuracy.png"], license="apache-2.0", tags=["tiny"])
    files = hub.files(NAME)
    assert sorted(files) == sorted([*BACKBONE, "figures/accuracy.png"])
    Image.new("RGB", (4, 4), "red").save(tmp_path / "plain.png")
    assert files["figures/accuracy.png"] == (tmp_path / "plain.png").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert "figures/accuracy.png" in card.text and "tiny" in card.data.tags and card.data.license == "apache-2.0"


def test_only_known_fields_without_folders_are_published_of_the_records(hub, run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    secret = "hf_" + "x" * 34
    added = {
        "config.json": {"_name_or_path": f"{run.parent}/start"},
        "run.json": {
            "format": "hf_msn run 1",
            "note": f"{run}/images",
            "start": str(run.parent / "vit"),
            "data": {"name": "/mnt/alice/birds"},
            "recipe": {"hub_token": secret, "output_dir": str(run), "dataset": "/mnt/alice/birds", "mask_ratio": 0.5},
        },
        "conversion.json": {"source": {"file": "C:\\Users\\alice_smith\\msn.pth.tar"}, "command": f"--key {secret}"},
    }
    for name, value in added.items():
        file = run / name
        file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **value}))
    publish(run, what="pretraining")
    files = hub.files(NAME)
    assert "_name_or_path" not in json.loads(files["config.json"])
    record = {"format": "hf_msn run 1", "start": "vit", "data": {"name": "birds"}}
    assert json.loads(files["run.json"]) == {**record, "recipe": {"dataset": "birds", "mask_ratio": 0.5}}
    assert json.loads(files["conversion.json"]) == {"source": {"file": "msn.pth.tar"}}
    sent = hub.sent_bytes()
    for private in (TOKEN, secret, str(run.parent), "alice_smith", "/mnt/alice", os.getcwd()):
        assert private.encode() not in sent, private


def test_a_checkpoint_that_is_not_whole_is_refused_before_the_hub_is_asked(hub, run, tmp_path):
    def refused(match, folder=run):
        with pytest.raises(ValueError, match=match):
            publish(folder)
        assert hub.requests == []

    refused("absent", tmp_path / "absent")
    (tmp_path / "outer" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "outer" / "checkpoint-10").mkdir()
    refused("checkpoint-10", tmp_path / "outer")
    weights = load_file(run / "model.safetensors")
    save_file(weights, run / "model.safetensors", metadata={"format": "pt", "from": "/home/alice"})
    refused("'from'")
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:5000])
    refused("model.safetensors")
    (run / "model.safetensors").unlink()
    refused("model.safetensors")
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secrets.safetensors"}}))
    refused("'secrets.safetensors'")
    (run / "config.json").write_text("{")
    refused("config.json")


@pytest.mark.parametrize("repo_id", ["tiny", "a/b/c", "alice/--x", "alice/a b", "", "/x"])
def test_a_repo_id_that_cannot_be_one_is_refused(hub, run, repo_id):
    with pytest.raises(ValueError):
        publish(run, repo_id, dry_run=True)


# Failures


def refused(run, *parts, **settings) -> None:
    with pytest.raises(PublishingError) as error:
        publish(run, **{"what": "pretraining", **settings})
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert TOKEN not in message and "/lfs/" not in message
    assert error.value.__context__ is None or error.value.__suppress_context__  # its text has signed addresses


def test_a_missing_token_is_an_error_before_the_hub_is_asked(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(run, "HF_TOKEN")
    assert hub.requests == []
    publish(run, token=TOKEN)
    assert NAME in hub.repos


def test_a_wrong_token_and_a_namespace_of_others_are_errors(hub, run):
    refused(run, "401", token="hf_" + "unknown" * 5)
    refused(run, "403", "bob/tiny", repo_id="bob/tiny")
    assert hub.repos == {}


@pytest.mark.slow
def test_a_repo_with_another_model_is_replaced_only_by_update(hub, run, tmp_path):
    hub.add_repo(NAME, {"README.md": b"mine", "pytorch_model.bin": b"weights", ".eval_results/old.yaml": b"- 1"})
    refused(run, NAME, "pytorch_model.bin", "`update`")
    assert hub.files(NAME)["README.md"] == b"mine" and not hub.asked("PUT", "/lfs/")
    publish(run, update=True, what="pretraining")
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "pytorch_model.bin"]
    assert sorted(hub.files(NAME)) == names  # the numbers of the other model are gone, and other files stay
    publish(run, what="pretraining", license="mit")  # the same model with another card
    assert b"license: mit" in hub.files(NAME)["README.md"]
    other = save_run(tmp_path / "other")
    model = MSNForPreTraining.from_pretrained(other)
    model.prototypes.data += 1
    model.save_pretrained(other)
    refused(other, NAME)


@pytest.mark.slow
@pytest.mark.parametrize("is_private", [True, False])
def test_the_visibility_of_a_repo_is_never_changed(hub, run, is_private):
    hub.add_repo(NAME, {"README.md": b"made on the website"}, private=is_private)
    refused(run, f"`private` is {not is_private}", private=not is_private)
    publish(run)
    assert hub.repos[NAME].private is is_private and hub.files(NAME)["README.md"] != b"made on the website"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "part", "status"),
    [
        ("POST", "repos/create", 403),
        ("PUT", "/lfs/", 500),
        ("POST", "commit", 412),
        ("POST", "validate-yaml", 503),
    ],
)
def test_a_refusal_leaves_nothing_visible_and_the_same_call_completes_it(hub, run, method, part, status):
    hub.fail(method, part, status)
    refused(run, str(status), NAME)
    assert NAME not in hub.repos or hub.files(NAME) == {}
    hub.failures.clear()
    publish(run)
    assert "model.safetensors" in hub.files(NAME)


@pytest.mark.slow
def test_an_interrupted_upload_is_completed_without_sending_a_file_twice(hub, tmp_path):
    run = save_run(tmp_path / "run", shards=True)
    shards = len(list(run.glob("model-*.safetensors")))
    assert shards >= 3
    hub.fail("PUT", "/lfs/", 500, skip=2)
    refused(run, "500")
    arrived = set(hub.repos[NAME].lfs)
    assert len(arrived) == 2 and hub.files(NAME) == {}
    hub.failures.clear()
    hub.requests.clear()
    publish(run, what="pretraining")
    sent = {request.path.split("/")[-1] for request in hub.asked("PUT", "/lfs/")}
    assert len(sent) == shards - 2 and not sent & arrived
    assert hub.repos[NAME].messages == ["initial commit", "Publish with hf_msn"]
    before = hub.repos[NAME].branches["main"]
    assert publish(run, what="pretraining").url.endswith(before)  # nothing new, so no commit


def test_no_network_is_an_error(hub, run, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    refused(run, "ConnectError")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    refused(run, "HF_HUB_OFFLINE")
    close_session()
