import json

import numpy as np
import pytest
import torch
from finetuning_runs import PROCESSOR, VIEWS, digits, paws_config

from hf_msn import (
    ClassifierFinetuningArguments,
    PAWSForPreTraining,
    SuNCEtFinetuningArguments,
    SupportDataset,
    parse_finetuning_recipe,
)
from hf_msn.cli.recipe_files import RECIPES

NAMES = sorted(path.stem for path in RECIPES.glob("finetune_*.yaml"))


@pytest.fixture(scope="module")
def paws_folder(tmp_path_factory):
    """A checkpoint of PAWS as its trainer leaves it."""
    folder = tmp_path_factory.mktemp("paws")
    torch.manual_seed(0)
    PAWSForPreTraining(paws_config()).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    dataset, rows = digits()
    support = SupportDataset(dataset, rows, VIEWS)
    labels = {"rows": support.rows.tolist(), "labels": support.labels.tolist(), "class_names": support.class_names}
    (folder / "labelled_images.json").write_text(json.dumps(labels))
    return folder


def parse(output_dir, *arguments):
    return parse_finetuning_recipe(["--output_dir", str(output_dir), "--use_cpu", "true", *map(str, arguments)])


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_read(name, tmp_path):
    recipe = parse(tmp_path, "--config", name, "--bf16", "false")
    assert recipe.training.final_learning_rate < recipe.training.learning_rate
    assert recipe.training.optim == "sgd" and recipe.training.weight_decay == 0 and recipe.training.refit


def test_the_papers_settings(tmp_path):
    for percent in (1, 10):
        name = f"finetune_paws_rn50_imagenet_{percent}percent"
        training = parse(tmp_path, "--config", name, "--bf16", "false").training
        assert isinstance(training, ClassifierFinetuningArguments)
        assert (training.num_train_epochs, training.learning_rate, training.momentum) == (50, 0.02, 0.9)
        assert training.zero_init_head and not training.freeze_encoder and training.final_learning_rate == 0
    suncet = parse(tmp_path, "--config", "finetune_suncet_cifar10")
    training = suncet.training
    assert isinstance(training, SuNCEtFinetuningArguments) and training.use_lars
    assert (training.global_support_classes, training.global_support_images_per_class) == (10, 64)
    assert (training.support_views_per_image, training.num_train_epochs) == (2, 30)
    assert (training.learning_rate, training.final_learning_rate, training.warmup_steps) == (0.1, 0.01, 0)
    assert (suncet.config_fields["temperature"], suncet.config_fields["label_smoothing"]) == (0.1, 0.0)


def test_views_are_a_crop_and_a_flip_by_default(tmp_path):
    (tmp_path / "r.yaml").write_text("global_scale: [0.5, 1]\nlearning_rate: 1e-3\n")
    recipe = parse(tmp_path / "run", "--config", tmp_path / "r.yaml", "--learning_rate", "5e-2")
    assert recipe.views.global_scale == (0.5, 1.0) and recipe.training.learning_rate == 0.05
    views = parse(tmp_path / "run").views
    assert (views.color_jitter, views.grayscale, views.blur_probability, views.focal_views) == (0, 0, 0, 0)
    assert views.global_scale == (0.08, 1.0) and views.horizontal_flip == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "`learning_rat`.*'learning_rate'"),
        (["--support_views_per_image", "2"], "`support_views_per_image`.*`--head suncet`"),
        (["--head", "cosine"], "`head` .*'cosine'"),
        (["--seed", "-1"], "`seed` .*-1"),
        (["--batch_size", "8"], "`global_batch_size`"),
        (["--start_layer", "fc1", "--model", "timm:test_resnet"], "`start_layer`"),
        (["--max_steps", "-5"], "`num_train_epochs`"),
        (["--model", "timm:test_resnet", "--hidden_size", "8"], "`hidden_size`"),
        (["--model", "/no/such"], "'/no/such'"),
        (["--model", "timm:nonsense"], "'timm:nonsense'"),
        (["--model", "timm:resnet18.nonsense"], "'resnet18.nonsense'"),
        (["--model", "timm:paws_wide_resnet"], "'paws_wide_resnet'"),
        (["--patch_size", "5"], "`image_size` must be a multiple of `patch_size`"),
    ],
)
def test_wrong_use_is_named_before_any_data_is_read(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *arguments)


def test_a_missing_test_split_is_an_error_before_training(paws_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_msn.finetuning.tuning.FinetuningTrainer", None)
    recipe = parse(tmp_path, "--model", paws_folder, "--labelled_images_per_class", 2, "--test_split", "tset")
    with pytest.raises(ValueError, match=r"'tset'"):
        recipe.finetune()


def test_a_released_network_of_timm_gets_the_images_that_it_was_trained_on(tmp_path):
    views = parse(tmp_path, "--model", "timm:vit_base_patch16_224.augreg_in21k").views
    assert (views.image_size, views.image_mean, views.image_std) == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert views.interpolation == "bicubic"
    smaller = parse(tmp_path, "--model", "timm:test_resnet", "--image_size", 32)
    assert smaller.views.image_size == 32 and smaller.image_processor.crop_size["height"] == 32


def test_labelled_images_and_evaluation_come_with_the_checkpoint(paws_folder, tmp_path):
    recipe = parse(tmp_path, "--model", paws_folder)
    dataset, rows = recipe.load_labelled()
    assert rows.tolist() == digits()[1].tolist() and len(dataset) == len(digits()[0])
    assert recipe.image_processor.to_dict() == PROCESSOR.to_dict()
    assert recipe.views.image_size == 8 and recipe.views.image_mean == (0.5, 0.5, 0.5)
    assert recipe.config_fields == {"image_size": 8}

    other = parse(tmp_path, "--model", paws_folder, "--image_size", 16, "--crop_fraction", 1.0)
    assert other.views.image_mean == (0.5, 0.5, 0.5) and other.image_processor.crop_size["height"] == 16


def test_another_label_source_replaces_that_of_the_checkpoint_or_conflicts(paws_folder, tmp_path):
    by_number = ["--model", paws_folder, "--labelled_images_per_class", 2]
    assert len(parse(tmp_path, *by_number).load_labelled()[1]) == 20
    with pytest.raises(ValueError, match=r"both `labelled_from_checkpoint` and labelled_images_per_class are given"):
        parse(tmp_path, *by_number, "--labelled_from_checkpoint").load_labelled()
    with pytest.raises(ValueError, match=r"none is given"):
        parse(tmp_path, "--model", paws_folder, "--labelled_from_checkpoint", "false").load_labelled()
    with pytest.raises(ValueError, match=r"needs a `labelled_images\.json`"):
        parse(tmp_path, "--labelled_from_checkpoint").load_labelled()


def test_labels_of_a_checkpoint_are_compared_with_the_data(paws_folder, tmp_path, monkeypatch):
    recipe = parse(tmp_path, "--model", paws_folder)
    dataset = digits()[0]
    for other, fault in (
        (dataset.select(range(100)), "has fewer rows"),
        (dataset.select(np.roll(np.arange(len(dataset)), 1)), "has other labels in these rows"),
    ):
        monkeypatch.setattr(recipe.data, "load", lambda other=other: other)
        with pytest.raises(ValueError, match=f"50 labelled rows of another data set: `dataset` {fault}"):
            recipe.load_labelled()
