"""scripts/pretrain.py with MSN: a folder of colour images, and misuse."""

import pytest
from pretrain_runs import VIT, pretrain, write_color_images
from transformers import AutoImageProcessor

from hf_msn import BrokenImageError, MSNForPreTraining

VIEWS = "--image_size 32 --focal_size 16 --focal_views 2 --num_prototypes 8".split()


@pytest.mark.slow
def test_a_folder_of_colour_images_with_a_broken_one(tmp_path, capsys):
    write_color_images(tmp_path / "images")
    broken = tmp_path / "images" / "train" / "red" / "red_train_3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    settings = [*VIT, *VIEWS, "--dataset", tmp_path / "images", "--num_train_epochs", 2, "--save_strategy", "epoch"]
    settings += ["--low_shot_every_epochs", 2, "--low_shot_images_per_class", 1, 2, "--low_shot_test_split", "test"]
    logged = pretrain(tmp_path / "run", *settings)
    assert "red_train_3.png" in capsys.readouterr().err
    (top1,) = logged["eval_low_shot/2_per_class/top1"]
    assert 0 <= top1 <= 100
    assert MSNForPreTraining.from_pretrained(tmp_path / "run").config.image_size == 32
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").crop_size["height"] == 32
    with pytest.raises(BrokenImageError, match=r"red_train_3\.png"):
        pretrain(tmp_path / "fatal", *settings, "--on_broken_image", "raise")
