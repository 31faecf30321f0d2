"""The mean of several models' probabilities, against the mean in float64."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_msn import PredictionAverage


def model(seed: int, **fields) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=fields.pop("num_labels", 3), **fields)
    return ViTForImageClassification(config)


def test_the_mean_of_probabilities_of_models_in_a_list_of_folders(tmp_path):
    models = [model(seed, hidden_dropout_prob=0.5).eval() for seed in range(3)]
    for place, one in enumerate(models):
        one.save_pretrained(tmp_path / str(place))
    folders = [tmp_path / str(place) for place in range(3)]
    pixels = torch.randn(5, 3, 8, 8)
    expected = sum(one(pixel_values=pixels).logits.double().softmax(-1) for one in models) / 3
    for average in (
        PredictionAverage.from_pretrained(folders),
        PredictionAverage.from_pretrained(folders, model_class=AutoModelForImageClassification),
        PredictionAverage(models),
    ):
        average.train()  # without dropout nevertheless
        output = average(pixel_values=pixels)
        assert output.loss is None and average.config.num_labels == 3
        torch.testing.assert_close(output.logits.double().softmax(-1), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(output.logits.double(), expected.log(), rtol=1e-5, atol=1e-6)


class Says(nn.Module):
    def __init__(self, *logits, dtype=torch.float32):
        super().__init__()
        self.logits = torch.tensor([logits], dtype=dtype)

    def forward(self, labels=None):
        return ImageClassifierOutput(logits=self.logits)


def test_sure_models_that_disagree_stay_finite_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        average = PredictionAverage([Says(200.0, 0.0, 0.0, dtype=dtype), Says(0.0, 200.0, 0.0, dtype=dtype)])
        output = average(labels=torch.tensor([1]))
        assert torch.isfinite(output.logits).all()
        torch.testing.assert_close(output.logits.softmax(-1), torch.tensor([[0.5, 0.5, 0.0]]))
        assert output.loss.item() == pytest.approx(0.6931472, rel=1e-6)


def test_labels_that_are_not_of_the_predictions_give_no_loss():
    assert PredictionAverage([Says(1.0, 0.0)])(labels=torch.rand(1, 2)).loss is None


def test_what_is_no_average_is_named(tmp_path):
    with pytest.raises(ValueError, match="one model or more to average, but there are 0"):
        PredictionAverage([])
    with pytest.raises(ValueError, match=r"must have the same classes, but .* of model 1"):
        PredictionAverage([model(0), model(1, num_labels=4)])
    with pytest.raises(ValueError, match=r"must hold a 'codistillation.json' .* has none. Give the `output_dir`"):
        PredictionAverage.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"must be a folder, or a repository .* but from '.*/missing' there is none"):
        PredictionAverage.from_pretrained(tmp_path / "missing")
    (tmp_path / "codistillation.json").write_text(json.dumps({"replicas": 2, "published": 1}))
    with pytest.raises(ValueError, match="has published replica 1 alone"):
        PredictionAverage.from_pretrained(tmp_path)
    (tmp_path / "codistillation.json").write_text(json.dumps({"published": "average", "folders": ["replica_0"]}))
    (tmp_path / "replica_0").mkdir()
    (tmp_path / "replica_0" / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["Mine"]}))
    with pytest.raises(ValueError, match=r"names Mine, which is no model of transformers. Give `model_class`"):
        PredictionAverage.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "folders",
    [
        ["../replica_0", "replica_1"],
        ["/etc", "replica_1"],
        ["replica_0/../..", "replica_1"],
        ["replica_0\n", "replica_1"],
        ["replica_\N{ARABIC-INDIC DIGIT ONE}", "replica_1"],
        ["replica_00", "replica_1"],
        ["replica_0", "replica_0"],
        ["", "replica_1"],
        [["replica_0"], "replica_1"],
        {"replica_0": 1, "replica_1": 1},
        "replica_0",
        [],
        None,
    ],
)
def test_folders_of_a_stranger_are_plain_names_of_replicas(tmp_path, folders):
    for name in ("run", "run/replica_0", "run/replica_1", "replica_0"):
        model(0).save_pretrained(tmp_path / name)
    said = {"published": "average", "replicas": 2, "folders": folders}
    (tmp_path / "run" / "codistillation.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"`folders` of .*must be the names of the replicas' folders"):
        PredictionAverage.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not parse as JSON"),
        ("[]", "must be a JSON object that says what is `published`"),
        ("{}", "must be a JSON object that says what is `published`"),
        ('{"published": 1}', "has published replica 1 alone"),
        ('{"published": "average", "replicas": 3, "folders": ["replica_0"]}', "are 1 of 3"),
    ],
)
def test_a_file_that_is_no_record_of_an_average_is_named(tmp_path, text, message):
    (tmp_path / "codistillation.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        PredictionAverage.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pipeline", "os", "PreTrainedConfig", None])
def test_the_class_of_a_model_is_one_of_transformers(tmp_path, name):
    model(0).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "architectures": [name]}))
    with pytest.raises(ValueError, match=f"names {name}, which is no model of transformers"):
        PredictionAverage.from_pretrained([tmp_path])
