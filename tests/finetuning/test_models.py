import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from finetuning_runs import paws_config, states_are_equal, suncet_config
from tiny import tiny_model
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetModel,
    TimmWrapperForImageClassification,
    ViTMSNForImageClassification,
    ViTMSNModel,
)

from hf_msn import PAWSForPreTraining, SuNCEtConfig
from hf_msn.finetuning.models import linear_head, load_for_classification, load_for_suncet
from hf_msn.models.modeling_head_classifier import HeadForImageClassification

CLASSES, NAMES = np.array([1, 4, 5]), ["a", "b", "c", "d", "e", "f"]


def paws_model(**fields) -> PAWSForPreTraining:
    torch.manual_seed(0)
    return PAWSForPreTraining(paws_config(**fields)).eval()


def plain_model() -> ViTMSNModel:
    torch.manual_seed(0)
    return ViTMSNModel(suncet_config().to_vit_msn_config()).eval()


def convnet_model() -> PAWSForPreTraining:
    return paws_model(timm_model="test_resnet", timm_options={"drop_path_rate": 0.1}, image_size=32)


SOURCES = {"paws": paws_model, "plain": plain_model, "msn": lambda: tiny_model().eval(), "convnet": convnet_model}


def pixels_and_features(source) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and their features by the evaluated encoder in float64: the normalised [CLS], or pooled."""
    side = source.config.image_size
    pixels = torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = getattr(source, "evaluation_encoder", source)(pixels)
    return pixels, (features if torch.is_tensor(features) else features.last_hidden_state[:, 0]).double()


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("from_folder", [True, False])
def test_a_classifier_reads_the_features_of_the_evaluated_encoder(kind, from_folder, tmp_path):
    source = SOURCES[kind]()
    if from_folder:
        source.save_pretrained(tmp_path)
    model = load_for_classification(
        tmp_path if from_folder else source, CLASSES, NAMES, 0, zero_init_head=False
    ).eval()
    assert type(model) is (TimmWrapperForImageClassification if kind == "convnet" else ViTMSNForImageClassification)
    assert model.config.id2label == {0: "b", 1: "e", 2: "f"} and model.config.label2id == {"b": 0, "e": 1, "f": 2}
    pixels, features = pixels_and_features(source)
    with torch.no_grad():
        logits = model(pixels).logits
    head = linear_head(model)
    expected = features @ head.weight.double().T + head.bias.double()
    assert expected.abs().max() > 0.01 and torch.allclose(logits.double(), expected, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"timm_model": "test_vit"}])
def test_a_zero_head_gives_every_class_the_same_probability(fields):
    model = load_for_classification(suncet_config(**{**fields, "image_size": 160}), CLASSES, None, 0).eval()
    with torch.no_grad():
        probabilities = model(torch.randn(4, 3, 160, 160)).logits.softmax(dim=1)
    assert torch.equal(probabilities, torch.full((4, 3), 1 / 3))
    assert model.config.id2label == {0: "1", 1: "4", 2: "5"}


@pytest.mark.parametrize(
    "fields",
    [
        {"timm_model": "resnet18", "small_image_stem": True},
        {"timm_model": "paws_wide_resnet"},
        {"timm_model": "deit_tiny_distilled_patch16_224"},
    ],
    ids=["small stem", "not of timm", "two heads"],
)
def test_a_network_that_plain_transformers_cannot_build_is_refused_with_the_other_head_as_remedy(fields):
    with pytest.raises(ValueError, match=rf"'{fields['timm_model']}' has .*`head` suncet"):
        load_for_classification(SuNCEtConfig(**fields), CLASSES, NAMES, 0)


def test_released_weights_of_timm(monkeypatch):
    torch.manual_seed(0)
    released = timm.create_model("test_resnet", num_classes=0)
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kw: released if pretrained else create(name, **kw)
    )
    model = load_for_classification("timm:test_resnet", CLASSES, NAMES, 0)
    loaded = model.timm_model.state_dict()
    assert all(loaded[name].equal(value) for name, value in released.state_dict().items())


def test_the_projection_head_of_paws_is_carried_over_and_its_smoothing_is_not(tmp_path):
    source = paws_model(label_smoothing=0.1, temperature=0.2)
    source.save_pretrained(tmp_path)
    for start in (source, tmp_path):
        model = load_for_suncet(start, 0)
        head = model.projection_head.state_dict()
        assert all(head[name].equal(value) for name, value in source.projection_head.state_dict().items())
        assert (model.config.label_smoothing, model.config.temperature) == (0.0, 0.1)
        assert load_for_suncet(start, 0, label_smoothing=0.05).config.label_smoothing == 0.05
        assert model.prediction_head is None
    fresh = load_for_suncet(source, 0, projection_dim=8)
    assert fresh.projection_head.fc3.out_features == 8
    assert all(fresh.encoder.state_dict()[name].equal(value) for name, value in source.encoder.state_dict().items())


def test_the_prediction_head_of_paws_is_carried_over_unless_it_is_switched_off():
    source = paws_model(prediction_head=True, prediction_hidden_dim=6)
    with torch.no_grad():
        source.prediction_head.bn2.running_mean.uniform_(-1, 1)
    model = load_for_suncet(source, 0).eval()
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.predict(pixels), source.predict(pixels))
    assert load_for_suncet(source, 0, prediction_head=False).prediction_head is None
    assert load_for_suncet(paws_model(), 0, prediction_head=True).prediction_head is not None
    assert load_for_suncet(tiny_model(prediction_head=True), 0).prediction_head is None  # MSN's heads are not kept
    assert SuNCEtConfig.from_dict(model.config.to_dict()).prediction_head


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    resnet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'resnet'"):
        load_for_suncet(tmp_path, 0)
    with pytest.raises(ValueError, match="typo' cannot be loaded"):
        load_for_suncet(tmp_path / "typo", 0)
    with pytest.raises(ValueError, match="is a ResNetModel, but must be a pretraining model"):
        load_for_suncet(resnet, 0)


@pytest.mark.parametrize("kind", ["paws", "convnet", "msn"])
def test_a_classifier_on_the_head_computes_its_first_layer_from_folder_and_model(kind, tmp_path):
    source = SOURCES[kind]()
    head = getattr(source, "target_projection_head", None) or source.projection_head
    with torch.no_grad():
        head.bn1.running_mean.uniform_(-1, 1)
        head.bn1.running_var.uniform_(0.5, 2)
    source.save_pretrained(tmp_path / "source")
    pixels, features = pixels_and_features(source)
    for start in (source, tmp_path / "source"):
        arguments = (start, CLASSES, NAMES, 0, False, "fc1")
        model = load_for_classification(*arguments).eval()
        assert type(model) is HeadForImageClassification and model.config.id2label == {0: "b", 1: "e", 2: "f"}
        with torch.no_grad():
            hidden = features @ head.fc1.weight.double().T + head.fc1.bias.double()
            hidden = (hidden - head.bn1.running_mean) / (head.bn1.running_var.double() + 1e-5).sqrt()
            hidden = hidden * head.bn1.weight.double() + head.bn1.bias.double()
            hidden = hidden.clamp(min=0) if isinstance(head.activation, torch.nn.ReLU) else F.gelu(hidden)
            expected = hidden @ model.classifier.weight.double().T + model.classifier.bias.double()
            logits = model(pixels).logits
        assert expected.abs().max() > 0.01 and torch.allclose(logits.double(), expected, atol=1e-4)
        loss = model(pixels, labels=torch.tensor([0, 1, 2, 1, 0])).loss
        reference = [-expected[row].log_softmax(0)[label] for row, label in enumerate([0, 1, 2, 1, 0])]
        assert loss.item() == pytest.approx(float(sum(reference)) / 5, abs=1e-5)
        model.save_pretrained(tmp_path / "tuned")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
        assert states_are_equal(again, model) and torch.allclose(again(pixels).logits, logits, atol=1e-5)
    zero = load_for_classification(source, CLASSES, NAMES, 0, True, "fc1")
    assert not zero.classifier.weight.any() and not zero.classifier.bias.any()


@pytest.mark.parametrize("start", [suncet_config, plain_model])
def test_a_start_without_a_projection_head_is_refused(start):
    with pytest.raises(ValueError, match=r"`start_layer` 'fc1'.*'backbone'"):
        load_for_classification(start(), CLASSES, NAMES, 0, start_layer="fc1")


@pytest.mark.parametrize(
    ("field", "value"),
    [("projection_batch_norm", False), ("projection_hidden_dim", 64), ("projection_hiden_dim", 32)],
)
def test_a_field_that_does_not_fit_the_first_layer_of_the_head_is_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        load_for_classification(paws_model(), CLASSES, NAMES, 0, start_layer="fc1", **{field: value})
