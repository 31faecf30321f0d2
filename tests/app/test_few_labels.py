"""The classifier of a few labelled images, without the page around it."""

import base64
import io
import math
import os
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from html_page import Page
from PIL import Image
from tiny import tiny_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTModel

from hf_msn import LogisticProbe, MSNForPreTraining, evaluation_image_processor, extract_features, load_images
from hf_msn.app import few_labels as module
from hf_msn.app import views
from hf_msn.app.few_labels import FewLabels, Images, open_upload
from hf_msn.data.splits import low_shot_indices

ENCODER = Path(__file__).parents[2] / "spaces" / "low_shot" / "digits_encoder"


@pytest.fixture(scope="module")
def app():
    return FewLabels(str(ENCODER))


@pytest.fixture(scope="module")
def example(app):
    return app.digits()


def png(path: Path, color=(200, 30, 30), size=(20, 16)) -> Path:
    Image.new("RGB", size, color).save(path)
    return path


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_zeros(side: int) -> bytes:
    """Return a PNG file of `side` x `side` black pixels: a gigapixel would take a megabyte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_uploads_have_the_features_that_evaluation_extracts(app, tmp_path):
    random, images, paths = np.random.RandomState(0), [], []
    for number, suffix in enumerate(("png", "jpg", "webp", "gif", "bmp", "tif")):
        image = Image.fromarray(random.randint(0, 256, (40, 30 + number, 3), dtype=np.uint8))
        paths.append(tmp_path / f"{number}.{suffix}")
        image.save(paths[-1])
        images.append(Image.open(paths[-1]).convert("RGB"))
    read, problems = app.read(paths, "  some \n thing ")
    expected = extract_features(app.model, images, app.image_processor).features
    assert problems == [] and read.classes == ("some thing",) * 6
    assert read.names == tuple(path.name for path in paths)
    np.testing.assert_allclose(read.features, expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_image_is_left_out_with_a_message_that_names_it(app, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 8)
    whole = png(tmp_path / "whole.png").read_bytes()
    noise = np.random.RandomState(0).randint(0, 256, (90, 90, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    contents = {
        "text.png": b"no image",
        "empty.png": b"",
        "truncated.png": file.getvalue()[:9000],
        "program.eps": postscript,
        "bomb.png": png_of_zeros(8000),
        "large_bomb.png": png_of_zeros(20000),
        "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "whole.png": whole,
        "one_too_many.png": whole,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    read, problems = app.read([tmp_path / name for name in contents])
    assert read.names == ("whole.png",) and read.classes == (None,)
    left_out = [name for name in contents if "whole" not in name and "many" not in name]
    assert len(problems) == len(left_out) + 1
    for name, message in zip(left_out, problems):
        assert f"'{name}'" in message and message.endswith(".")
    assert all("50 megapixels" in message for message in problems[4:6]) and "8 of 9" in problems[-1]
    assert len(app.read([tmp_path / "text.png"])[0]) == 0


def test_no_more_of_a_file_is_read_than_the_limit(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(2**36)  # 64 GiB that take no space
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"'huge.png' .* 10 MB"):
        open_upload(path)
    assert tracemalloc.get_traced_memory()[1] < 15e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "known", "message"), [(" ", 0, "has 0"), ("x" * 101, 0, "101"), ("cat", 999, "1001")]
)
def test_class_names_and_the_number_of_labelled_images_are_limited(app, tmp_path, name, known, message):
    paths = [png(tmp_path / f"{n}.png") for n in range(2)]
    with pytest.raises(ValueError, match=message):
        app.read(paths, name, known)


def test_answers_have_the_probabilities_and_neighbours_of_loops(app, example):
    labelled, unknown = example
    names = labelled.class_names
    labels = [names.index(name) for name in labelled.classes]
    weights = LogisticProbe().fit(labelled.features, np.array(labels)).coef_
    for row, answer in enumerate(app.classify(labelled, unknown)):
        vector = unknown.features[row].astype(np.float64)
        x = vector - vector.mean()
        x /= math.sqrt(sum(v * v for v in x))
        exponentials = [math.exp(sum(w * v for w, v in zip(of_class, x))) for of_class in weights]
        expected = {name: e / sum(exponentials) for name, e in zip(names, exponentials)}
        assert dict(answer.classes) == pytest.approx(expected, rel=1e-5)
        assert [p for _, p in answer.classes] == sorted([p for _, p in answer.classes], reverse=True)
        similarities = []
        for other in labelled.features.astype(np.float64):
            similarities.append(float(vector @ other / math.sqrt((vector @ vector) * (other @ other))))
        assert [near.similarity for near in answer.neighbours] == pytest.approx(sorted(similarities)[:-4:-1], rel=1e-5)
        nearest = int(np.argmax(similarities))
        assert answer.neighbours[0][:3] == (
            labelled.names[nearest],
            labelled.pictures[nearest],
            labelled.classes[nearest],
        )


def test_accuracy_is_that_of_a_loop_over_draws(app, example):
    labelled, _ = example
    names = labelled.class_names
    labels = np.array([names.index(name) for name in labelled.classes])
    measured = app.measure(labelled, num_splits=3)
    assert [point.images_per_class for point in measured] == [1, 2, 3, 4]
    for point in measured:
        accuracies = []
        for seed in range(3):
            learnt = low_shot_indices(labels, images_per_class=point.images_per_class, seed=seed).tolist()
            others = [row for row in range(len(labels)) if row not in learnt]
            probe = LogisticProbe().fit(labelled.features[learnt], labels[learnt])
            right = sum(int(probe.predict(labelled.features[[row]])[0] == labels[row]) for row in others)
            accuracies.append(100 * right / len(others))
        mean = sum(accuracies) / 3
        assert point.mean == pytest.approx(mean)
        assert point.std == pytest.approx(math.sqrt(sum((a - mean) ** 2 for a in accuracies) / 2))


def test_too_few_classes_or_images_are_refused(app, example):
    labelled, unknown = example
    one = labelled
    for name in labelled.class_names[1:]:
        one = one.without(name)
    assert one.classes == ("0",) * 5 and len(one.features) == 5
    for act in (lambda: app.classify(one, unknown), lambda: app.measure(one), lambda: app.export(one, "nowhere")):
        with pytest.raises(ValueError, match="at least 2 classes, but there are 1"):
            act()
    single = Images(("x.png",), labelled.pictures[:1], ("odd",), labelled.features[:1])
    with pytest.raises(ValueError, match="'odd' has 1"):
        app.measure(labelled + single)
    assert len(app.classify(labelled + single, unknown)) == 20


@pytest.fixture(scope="module")
def msn_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("msn")
    tiny_model(initializer_range=0.12).save_pretrained(folder)
    evaluation_image_processor(16, crop_fraction=1.0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["plain", "pretraining"])
def test_the_exported_classifier_answers_as_the_app_without_hf_msn(kind, app, msn_folder, tmp_path):
    app = app if kind == "plain" else FewLabels(str(msn_folder))
    assert kind == "plain" or isinstance(app.model, MSNForPreTraining)
    labelled, unknown = app.digits(images_per_class=3)
    archive = app.export(labelled, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["classifier.zip"]
    zipfile.ZipFile(archive).extractall(tmp_path / "classifier")
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "classifier")
    assert classifier.config.id2label == dict(enumerate(map(str, range(10))))
    images = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in unknown.pictures]
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
    with torch.no_grad():
        probabilities = classifier(**pixels).logits.softmax(-1)
    for row, answer in enumerate(app.classify(labelled, unknown)):
        for name, probability in answer.classes:
            assert probabilities[row, int(name)].item() == pytest.approx(probability, abs=1e-3)


def test_another_model_classifies_but_is_not_exported(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    app = FewLabels(str(tmp_path / "vit"), image_size=16)
    labelled, unknown = app.digits(images_per_class=1, num_unknown=2)
    assert len(app.classify(labelled, unknown)) == 2 and not app.can_export
    with pytest.raises(ValueError, match="ViTModel"):
        app.export(labelled, tmp_path)
    assert os.listdir(tmp_path) == ["vit"]


def test_the_encoder_of_the_space_classifies_the_test_digits(app):
    labelled, unknown = app.digits(num_unknown=360)
    truth = [str(label) for label in load_images("digits", split="test")["label"]]
    answers = [answer.classes[0][0] for answer in app.classify(labelled, unknown)]
    assert np.mean([answer == label for answer, label in zip(answers, truth)]) > 0.85


def test_names_of_classes_and_files_are_shown_as_text(app, example):
    labelled, unknown = example
    bad = "<img src=x onerror=alert(1)>&'\""
    named = Images(
        tuple(bad for _ in labelled.names),
        labelled.pictures,
        tuple(bad + name for name in labelled.classes),
        labelled.features,
    )
    pages = [
        views.show_labelled(named),
        views.show_answers(app.classify(named, unknown), named.class_names),
        views.show_map(named, unknown),
        views.show_messages([bad]),
    ]
    for page in map(Page, pages):
        assert bad in page.text and page.tags.isdisjoint({"script"})
        assert all(source.startswith("data:image/") for source in page.links)
    measured = app.measure(labelled, num_splits=2)
    chart = Page(views.show_accuracy(measured, 2))
    for point in measured:
        assert f"{point.mean:.1f} ± {point.std:.1f} with {point.images_per_class}" in chart.described[0]
    assert views.show_map(Images(), Images()) == "" and "No labelled images" in views.show_labelled(Images())
