"""Exports, published models and fine-tuned classifiers load where hf_msn is not installed, all in one process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from card_runs import msn
from hub_server import HubServer
from PIL import Image
from tiny_semi_supervised import RESNET18, TIMM_VIT, VIT, tiny_paws
from transformers import AutoModelForImageClassification

from hf_msn import (
    LogisticProbe,
    evaluation_image_processor,
    export_backbone,
    export_classifier,
    extract_features,
    load_images,
    publish_checkpoint,
)
from hf_msn.data.decoding import decode_image

pytestmark = pytest.mark.slow

ENCODERS = {"vit": VIT, "resnet": RESNET18, "timm vit": TIMM_VIT}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PUBLISHED = "alice/tiny"
SCRIPT = """
import sys

sys.modules["hf_msn"] = None
sys.path[:] = [path for path in sys.path if path not in ("", ".")]
import json
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

encoders, classifiers = map(json.loads, sys.argv[1:])
image, found = Image.open("image.png"), {}
with torch.no_grad():
    for name in encoders:
        model, processor = AutoModel.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        by_timm = None
        if type(model).__name__ == "TimmWrapperModel":
            features = model(pixels).pooler_output
            by_timm = timm.create_model("local-dir:" + name, pretrained=True).eval()(pixels)
        else:
            features = model(pixels, output_hidden_states=True).hidden_states[-1]
        found[name] = type(model).__name__, pixels, features, by_timm
for name in classifiers:
    classify = pipeline("image-classification", name, device="cpu")
    found[name] = [classify(Image.open(f"{digit}.png").convert("RGB"), top_k=10) for digit in range(10)]
torch.save(found, "out.pt")
"""


@pytest.fixture(scope="module")
def models():
    """Float32, with running statistics that differ from a fresh network's."""
    made = {name: tiny_paws(**encoder).float() for name, encoder in ENCODERS.items()}
    for name, model in made.items():
        with torch.no_grad():
            model.train().project(torch.randn(8, 3, 16 if name == "vit" else 32, 16 if name == "vit" else 32) + 0.5)
        model.eval()
    return made


@pytest.fixture(scope="module")
def digits():
    test = load_images("digits", split="test[:10]")
    return [decode_image(image) for image in test["image"]]


@pytest.fixture(scope="module")
def processors():
    settings = {"image_mean": (0.1, 0.2, 0.3), "interpolation": "bicubic"}
    return {name: evaluation_image_processor(16 if name == "vit" else 32, **settings) for name in ENCODERS}


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 72, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def loaded(models, processors, image, digits, made, tuned, tmp_path_factory):
    """Return the outputs of a process without hf_msn for each folder, and the folder that holds them."""
    folder = tmp_path_factory.mktemp("plain")
    image.save(folder / "image.png")
    for row, digit in enumerate(digits):
        digit.save(folder / f"{row}.png")
    (folder / "tuned").symlink_to(tuned)
    train = load_images("digits", split="train[:200]")
    for name, model in models.items():
        export_backbone(model, folder / name, image_processor=processors[name])
        features = extract_features(model, train, processors[name])
        probe = LogisticProbe().fit(features.features, features.labels)
        settings = {"class_names": NAMES, "image_processor": processors[name]}
        if name != "timm vit":
            export_classifier(model, probe, features, folder / f"{name} classifier", **settings)
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        hub.use_in_this_process(patch, folder)
        publish_checkpoint(made["checkpoint"], PUBLISHED, without_results=True)
        environment = {**os.environ, **hub.environment(folder / "home", token=None), "PYTHONPATH": ""}
        lists = [*ENCODERS, PUBLISHED], ["vit classifier", "resnet classifier", "tuned"]
        command = [sys.executable, "-c", SCRIPT, *map(json.dumps, lists)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt"), folder


@pytest.mark.parametrize("name", ENCODERS)
def test_an_export_has_the_features_of_the_model(name, loaded, models, processors, image):
    kind, pixels, features, by_timm = loaded[0][name]
    encoder = models[name].encoder
    assert torch.equal(pixels, processors[name](image, return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        if name == "vit":
            expected = encoder(pixels, output_hidden_states=True).hidden_states[-1]
        else:
            expected = encoder(pixels)
            torch.testing.assert_close(by_timm, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert kind == ("ViTMSNModel" if name == "vit" else "TimmWrapperModel")


def test_a_published_checkpoint_has_the_features_of_the_model(loaded):
    kind, pixels, features, _ = loaded[0][PUBLISHED]
    with torch.no_grad():
        expected = msn().target_encoder(pixels, output_hidden_states=True).hidden_states[-1]
    assert kind == "ViTMSNModel"
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit classifier", "resnet classifier", "tuned"])
def test_the_pipeline_gives_the_probabilities_of_the_classifier(name, loaded, digits, processors, made):
    found, folder = loaded
    classifier = AutoModelForImageClassification.from_pretrained(folder / name).eval()
    names = list(map(str, range(10))) if name == "tuned" else NAMES
    for digit, answers in zip(digits, found[name]):
        processor = made["processor"] if name == "tuned" else processors[name.removesuffix(" classifier")]
        with torch.no_grad():
            logits = classifier(processor(digit, return_tensors="pt")["pixel_values"]).logits[0]
        expected = dict(zip(names, logits.softmax(dim=0).tolist()))
        assert {one["label"]: one["score"] for one in answers} == pytest.approx(expected, abs=1e-5)
