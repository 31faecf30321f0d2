"""Settings of a run without a recipe: they follow from the images, the labels and the processor."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from hf_msn import load_images
from hf_msn.cli.defaults import ImageSummary, default_fields, summarize_images
from hf_msn.cli.main import main
from hf_msn.cli.methods import METHODS
from hf_msn.cli.pretrain import Recipe, _UpdateTimer, make_recipe, read_recipe, recipe_of_run
from hf_msn.data.map_style import image_dataset
from hf_msn.trainers.pretraining_trainer import PretrainingTrainer

TINY = (
    "--hidden_size 16 --num_hidden_layers 1 --projection_hidden_dim 16 --projection_dim 8 --use_cpu true "
    "--report_to none --disable_tqdm true --per_device_train_batch_size 8"
).split()


def noise(side, channels=3):
    return np.random.default_rng(side).integers(0, 256, (side, side + 5, channels)).astype(np.uint8)


def test_what_images_are_is_seen():
    icon = noise(20)
    icon[:, 5:] = (200, 30, 30)
    photographs = image_dataset([noise(side) for side in (30, 40, 50)])
    for images, *seen in (
        (load_images("digits"), 1437, 8, True, True),
        (photographs, 3, 40, False, False),
        (photographs.to_iterable_dataset(), None, 40, False, False),
        (image_dataset([noise(20, 1).repeat(3, axis=2)]), 1, 20, True, False),
        (image_dataset([icon]), 1, 20, False, True),
    ):
        summary = summarize_images(images)
        assert [summary.num_images, summary.side, summary.is_gray, summary.is_drawn] == seen
    np.testing.assert_allclose(summary.mean, (icon / 255).mean(axis=(0, 1)), atol=1e-3)
    np.testing.assert_allclose(summary.std, (icon / 255).std(axis=(0, 1)), atol=1e-3)


def test_broken_images_are_left_out(tmp_path):
    for index in range(3):
        Image.fromarray(noise(24)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    assert summarize_images(load_images(tmp_path)).side == 24


@pytest.mark.parametrize("has_accelerator", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_any_images_make_a_run(tmp_path, method, has_accelerator):
    labels = {"labelled_images_per_class": 1} if METHODS[method].has_labels else {}
    for side in (8, 28, 31, 32, 48, 50, 64, 97, 128, 224, 500):
        for num_images, is_gray, is_drawn in ((None, True, True), (3, False, True), (5000, False, False)):
            given = {"method": method, "output_dir": str(tmp_path / "run"), **labels}
            summary = ImageSummary(num_images, side, is_gray, is_drawn)
            counts = np.array([1, 0, 7, 40]) if labels else None
            fields = default_fields(method, summary, given, has_accelerator=has_accelerator, labels_per_class=counts)
            recipe = make_recipe({**given, **fields})
            config = METHODS[method].config(**recipe.config_fields)
            assert config.image_size % config.patch_size == 0
            assert recipe.views.focal_size % config.patch_size == 0
            assert config.image_size <= side + config.patch_size // 2


def test_what_is_given_stays_and_decides_the_rest():
    images = ImageSummary(4000, 28, is_gray=True, is_drawn=True)

    def fields(**given):
        return default_fields("msn", images, given, has_accelerator=False)

    assert (fields()["image_size"], fields()["horizontal_flip"], fields()["grayscale"]) == (28, 0, 0)
    assert fields(patch_size=5)["image_size"] == 30 and "patch_size" not in fields(patch_size=5)
    assert 30 % fields(image_size=30)["patch_size"] == 0
    wide = fields(hidden_size=200)
    assert 200 % wide["num_attention_heads"] == 0 and wide["initializer_range"] == pytest.approx(200**-0.5, abs=1e-3)
    assert "num_train_epochs" in fields() and "num_train_epochs" not in fields(max_steps=5)
    assert not {"patch_size", "hidden_size"} & fields(timm_model="resnet18").keys()
    assert "learning_rate" not in fields(use_lars=True)


def test_images_like_those_of_the_papers_have_their_settings():
    imagenet = ImageSummary(1_281_167, 400)
    assert default_fields("msn", imagenet, {}, has_accelerator=True) == {}
    assert default_fields("msn", imagenet, {}, has_accelerator=False)["image_size"] == 64


def test_the_support_follows_from_the_labels():
    images = ImageSummary(1000, 64)

    def support(*counts):
        fields = default_fields("paws", images, {}, has_accelerator=False, labels_per_class=np.array(counts))
        return fields["global_support_classes"], fields["global_support_images_per_class"]

    assert support(5, 5, 0, 5) == (3, 5)
    assert support(1, 1) == (2, 1)
    assert support(*[500] * 10) == (10, 16)
    classes, per_class = support(*[3] * 1000)
    assert classes * per_class <= 160


def test_a_run_without_a_recipe_writes_the_one_that_repeats_it(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    main(["pretrain", "--output_dir", str(first), "--dataset", "digits", "--max_steps", "3", *TINY])
    written = read_recipe(first / "recipe.yaml")
    assert f"image_size: {written['image_size']}" in capsys.readouterr().out and written["image_size"] == 8
    main(["pretrain", "--config", str(first / "recipe.yaml"), "--output_dir", str(second)])
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert all(weights[1][name].equal(value) for name, value in weights[0].items())
    arguments = ["--output_dir", str(first), "--resume_from_checkpoint", "true", "--max_minutes", "9"]
    resumed = recipe_of_run(arguments)
    assert resumed.training.max_steps == 3 and resumed.max_minutes is None
    assert resumed.config_fields == recipe_of_run(["--config", str(first / "recipe.yaml"), *arguments]).config_fields
    text = (first / "recipe.yaml").read_text()
    (first / "recipe.yaml").write_text(text.replace("max_steps: 3\n", ""))  # of a run that began with epochs
    assert recipe_of_run(arguments).max_minutes == 9


def test_minutes_are_shared_by_the_stages_of_a_compression(tmp_path, monkeypatch):
    schedule = tmp_path / "schedule.json"
    schedule.write_text('[{"progress": 0, "dropout": 0.5}, {"progress": 0.25, "patch_size": 4}, {"progress": 0.75}]')
    arguments = ["--output_dir", str(tmp_path / "run"), "--dataset", "digits", "--max_minutes", "0.01", *TINY]
    recipe = recipe_of_run([*arguments, "--compression", str(schedule)])
    stages = []

    def measure(trainer):
        trainer.state.max_steps = trainer.args.max_steps
        trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)
        stages.append(trainer.model.compression)
        [timer] = [c for c in trainer.callback_handler.callbacks if isinstance(c, _UpdateTimer)]
        assert timer.max_seconds == pytest.approx(0.006)
        timer.ends = [0.0, 0.0, 0.0, 0.5 ** len(stages)]

    monkeypatch.setattr(PretrainingTrainer, "train", measure)
    assert recipe.measure_update(0.01) == 0.25 * 0.5 + 0.5 * 0.25 + 0.25 * 0.125
    views = [stage.views["global"] for stage in stages]
    assert [(view.dropout, view.patch_size) for view in views] == [(0.5, None), (0.0, 4), (0.0, None)]


def test_minutes_become_updates(tmp_path, monkeypatch):
    arguments = ["--dataset", "digits", "--max_minutes", "0.01", *TINY]
    recipe = recipe_of_run(["--output_dir", str(tmp_path / "run"), *arguments])
    seconds = recipe.measure_update(0.01)
    assert 0 < seconds < 5
    monkeypatch.setattr(Recipe, "measure_update", lambda self, max_minutes: 0.07)
    assert recipe.build_trainer().args.max_steps == 8
    assert recipe.given["max_steps"] == 8
    least = recipe_of_run(["--output_dir", str(tmp_path / "run"), "--max_steps", "5", *arguments])
    assert least.build_trainer().args.max_steps == 5
    with pytest.raises(ValueError, match=r"`max_minutes` .*-1"):
        recipe_of_run(["--output_dir", str(tmp_path / "other"), *arguments, "--max_minutes", "-1"])
