import datasets
import numpy as np
import pytest
import torch
from tiny_semi_supervised import VIT
from transformers import ViTMSNConfig, ViTMSNModel

from hf_msn.data.sources import load_images
from hf_msn.data.splits import low_shot_indices
from hf_msn.data.transforms import evaluation_image_processor
from hf_msn.models.configuration_paws import PAWSConfig
from hf_msn.models.modeling_paws import PAWSForPreTraining


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="session")
def digits():
    """(train, test) of the bundled digits."""
    return load_images("digits"), load_images("digits", split="test")


@pytest.fixture
def few(digits):
    """(train, test) with 12 and 4 images per class."""
    train, test = digits
    return [
        part.select(low_shot_indices(part["label"][:], images_per_class=k, seed=0))
        for part, k in ((train, 12), (test, 4))
    ]


@pytest.fixture(scope="session")
def processor():
    return evaluation_image_processor(8, crop_fraction=1.0)


@pytest.fixture
def tiny_vit():
    """An untrained ViTMSN with different blocks, norms and positions."""
    torch.manual_seed(0)
    sizes = {**VIT, "image_size": 8, "patch_size": 2, "num_hidden_layers": 3}
    model = ViTMSNModel(ViTMSNConfig(**sizes, hidden_dropout_prob=0.1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def around_timm():
    """An untrained PAWS of a timm net, in training mode, with running statistics that differ from a batch's."""
    torch.manual_seed(0)
    model = PAWSForPreTraining(
        PAWSConfig(timm_model="test_resnet", projection_hidden_dim=12, projection_dim=5, prediction_head=True)
    ).train()
    with torch.no_grad():
        model.project(torch.randn(8, 3, 32, 32))
    return model


@pytest.fixture
def with_broken():
    """Copy a dataset with unreadable bytes in some rows."""

    def make(dataset: datasets.Dataset, rows: tuple[int, ...]) -> datasets.Dataset:
        columns = dataset.to_dict()
        for row in rows:
            columns["image"][row] = {"bytes": b"no image", "path": f"broken_{row}.png"}
        return datasets.Dataset.from_dict(columns, features=dataset.features)

    return make


@pytest.fixture(scope="session")
def clusters():
    """Features and labels of three overlapping classes: (60, 6) and (60,)."""
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1, 2], 20)
    centres = random.normal(size=(3, 6))
    return centres[labels] + 0.8 * random.normal(size=(60, 6)), labels
