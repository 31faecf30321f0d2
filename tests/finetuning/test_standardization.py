import copy

import numpy as np
import pytest
import torch
from finetuning_runs import PROCESSOR, VIEWS, classifier_arguments, digits, images_and_labels, suncet_config
from tiny_semi_supervised import RESNETV2
from torch import nn

from hf_msn import SuNCEtForPreTraining, finetune_classifier
from hf_msn.finetuning.evaluation import feature_extractor, head_inputs
from hf_msn.finetuning.models import linear_head, load_for_classification
from hf_msn.finetuning.standardization import Standardization

PREACTIVATED = {**RESNETV2, "small_image_stem": False}


@pytest.mark.parametrize(
    "fields", [{}, {"timm_model": "test_resnet"}, PREACTIVATED], ids=["vit", "convnet", "convolution as head"]
)
def test_the_head_sees_features_of_mean_0_and_spread_1_and_folds_into_a_plain_one(fields, tmp_path):
    dataset, rows = digits()
    model = load_for_classification(
        suncet_config(**fields), np.arange(10), None, 0, zero_init_head=False, image_size=8
    ).eval()
    names = list(model.state_dict())
    pixels, _ = images_and_labels(dataset, rows)
    seen = []
    handle = linear_head(model).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].double().flatten(1))
    )
    with torch.no_grad():
        model(pixels)
    handle.remove()
    features, head = seen[0], linear_head(model)
    weight, bias = head.weight.detach().double().flatten(1), head.bias.detach().double()

    extract = feature_extractor(PROCESSOR, classifier_arguments(tmp_path), "skip")
    standardization = Standardization(model, head_inputs(model, head, dataset, rows, extract))
    assert list(model.state_dict()) == names
    mean = features.mean(dim=0)
    scale = torch.stack([(row - mean).square().mean() for row in features]).mean().sqrt()
    expected = (features - mean) / scale @ weight.T + bias
    with torch.no_grad():
        assert torch.allclose(model(pixels).logits.double(), expected, atol=1e-4)
        standardization.fold(model)
        assert isinstance(head, (nn.Linear, nn.Conv2d)) and list(model.state_dict()) == names
        assert torch.allclose(model(pixels).logits.double(), expected, atol=1e-3)


@pytest.mark.slow
def test_a_frozen_encoder_with_a_large_common_mean_is_learnt_from(tmp_path):
    """As pretrained ViTs have it: without standardising, the mean drowns what tells digits apart."""
    torch.manual_seed(0)
    start = SuNCEtForPreTraining(suncet_config())
    with torch.no_grad():
        start.encoder.layernorm.weight.mul_(0.1)
        start.encoder.layernorm.bias.add_(1.0)
    dataset, rows = digits(8)
    before = copy.deepcopy(start.encoder.state_dict())
    scores = {}
    for standardize in (None, False):
        settings = {"freeze_encoder": True, "num_train_epochs": 10, "validation_fraction": 0.5}
        args = classifier_arguments(tmp_path, standardize_features=standardize, **settings)
        result = finetune_classifier(start, dataset, rows, VIEWS, args, image_processor=PROCESSOR)
        after = result.model.vit.state_dict()
        assert all(after[name].equal(value) for name, value in before.items())
        assert type(result.model.classifier) is nn.Linear
        # what was measured before the head was folded holds for the plain one
        pixels, labels = images_and_labels(dataset, result.held_out_rows)
        with torch.no_grad():
            predicted = result.model(pixels).logits.argmax(dim=1).numpy()
        scores[standardize] = 100 * np.mean(predicted == labels)
        assert scores[standardize] == pytest.approx(result.validation_accuracy)
    assert scores[None] > scores[False] + 10
