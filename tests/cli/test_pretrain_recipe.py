"""Pretraining recipes: fields, their homes, the order of file and command line, labels, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import TINY_RUN

from hf_msn import parse_recipe, read_recipe
from hf_msn.cli.arguments import read_rows_file
from hf_msn.cli.pretrain import make_recipe
from hf_msn.cli.recipe_files import RECIPES
from hf_msn.models.modeling_paws import PAWSForPreTraining
from hf_msn.models.modeling_suncet import SuNCEtForPreTraining
from hf_msn.models.pretrained_encoders import build_encoder

PAWS = ["--method", "paws", "--labelled_images_per_class", "5"]
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("finetune_"))


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "run")


def write(tmp_path, **fields) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def test_each_field_goes_to_its_home(out):
    recipe = parse_recipe(
        f"--output_dir {out} --mask_ratio 0.5 --global_scale 0.2 0.9 --learning_rate 1e-4 --image_size 32 "
        "--patch_size 8 --use_sinkhorn false --streaming --dataset some/folder --low_shot_images_per_class 3 4 "
        "--use_cpu".split()
    )
    assert recipe.config_fields == {"mask_ratio": 0.5, "image_size": 32, "patch_size": 8, "use_sinkhorn": False}
    assert recipe.views.global_scale == (0.2, 0.9) and recipe.views.image_size == 32
    assert recipe.training.learning_rate == 1e-4 and recipe.training.use_cpu is True
    assert recipe.data.streaming is True and recipe.data.dataset == "some/folder"
    assert recipe.low_shot.low_shot_images_per_class == (3, 4)
    assert isinstance(recipe.low_shot.low_shot_images_per_class[0], int)


def test_the_command_line_overrides_the_file(tmp_path, out):
    path = write(tmp_path, mask_ratio=0.25, num_prototypes=32, learning_rate=0.01)
    recipe = parse_recipe(["--config", path, "--output_dir", out, "--mask_ratio", "0.5", "--report_to", "none"])
    assert recipe.config_fields["mask_ratio"] == 0.5 and recipe.training.report_to == []
    assert recipe.config_fields["num_prototypes"] == 32 and recipe.training.learning_rate == 0.01
    given = {"mask_ratio": 0.5, "num_prototypes": 32, "learning_rate": 0.01, "output_dir": out, "report_to": "none"}
    assert recipe.given == given
    with pytest.raises(ValueError, match="`config`"):
        parse_recipe(["--config", write(tmp_path, config="digits"), "--output_dir", out])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mask_ratio", "much"], "`mask_ratio` .*'much'"),
        (["--patch_size", "15"], "`image_size` .*`patch_size`"),
        (["--per_device_train_batch_size", "0"], "`per_device_train_batch_size` .*0"),
        (["--per_device_eval_batch_size", "0"], "`per_device_eval_batch_size` .*0"),
        (["--batch_size", "8"], "`per_device_train_batch_size`"),
        (["--low_shot_probe", "svm"], "`low_shot_probe` .*'svm'"),
        (["--low_shot_every_epochs", "-1"], "`low_shot_every_epochs` .*-1"),
        (["--low-shot-images-per-class", "0"], "`low_shot_images_per_class` .*0"),
        (["--max_steps", "-5"], "`max_steps` .*-5"),
        (["--max_steps", "0"], "`max_steps` .*0"),
        (["--save_steps", "0"], "`save_steps` .*0"),
        (["--hidden_size", "0"], "`hidden_size` .*0"),
        (["--num_hidden_layers", "0"], "`num_hidden_layers` .*0"),
        (["--num_attention_heads", "-2"], "`num_attention_heads` .*-2"),
        (["--intermediate_size", "0"], "`intermediate_size` .*0"),
        (["--num_channels", "1"], "`num_channels` .*1"),
        (["--hidden_act", "foo"], "`hidden_act` .*'foo'"),
        (["--hidden_act", "gelo"], "`hidden_act` .*'gelu'"),
        (["--method", "paw"], "`method` .*'paw'"),
        ([*PAWS, "--mask_ratio", "0.3"], "`mask_ratio`.* belongs to method msn"),
        (["--labelled_images_per_class", "5"], "belongs to method paws and suncet, .*Masked Siamese Networks"),
        (["--method", "suncet", "--me_max_weight", "1"], "belongs to method .*paws, .*SimCLR"),
        ([*PAWS, "--timm_model", "resnet18", "--hidden_size", "8"], "`hidden_size` .*`timm_model` is 'resnet18'"),
        (["--method", "paws"], "labelled images .*none is given.*labelled_list_file"),
        ([*PAWS, "--labelled_rows_file", "r.npy"], "labelled_rows_file, labelled_images_per_class are"),
        ([*PAWS, "--labelled_split", "few"], "`labelled_split` belongs to `labelled_dataset`"),
    ],
)
def test_bad_values_are_refused_before_any_work(out, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--output_dir", out, *arguments])


def test_output_dir_must_be_given_and_be_empty(tmp_path, out):
    with pytest.raises(ValueError, match=r"`output_dir` is missing"):
        parse_recipe([])
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"`output_dir` .*file' is a file"):
            parse_recipe(["--output_dir", str(place)])
    Path(out).mkdir()
    parse_recipe(["--output_dir", out])
    (Path(out) / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"`output_dir` .*--resume_from_checkpoint true"):
        parse_recipe(["--output_dir", out])
    with pytest.raises(ValueError, match=r"`output_dir`"):
        parse_recipe(["--output_dir", out, "--resume_from_checkpoint", "false"])
    resumed = parse_recipe(["--output_dir", out, "--resume_from_checkpoint", "true"])
    assert resumed.training.resume_from_checkpoint == "true"
    assert parse_recipe(["--output_dir", out, "--overwrite_output_dir"]).training.overwrite_output_dir is True


def test_help_all_shows_every_training_field(capsys):
    for flag, is_shown in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            parse_recipe([flag])
        printed = capsys.readouterr().out
        assert "--mask_ratio NUMBER" in printed and ("--hub_token" in printed) == is_shown


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_makes_a_run(name, out):
    values = read_recipe(name)
    values.pop("bf16", None)  # no accelerator here
    recipe = make_recipe({**values, "output_dir": out})
    config = recipe.method.config(**recipe.config_fields)
    if getattr(config, "timm_model", None) is not None:
        build_encoder(config)
        return
    for size in (recipe.views.image_size, recipe.views.focal_size):
        assert size % config.patch_size == 0 or recipe.views.focal_views == 0


def test_mask_ratios_of_the_paper():
    ratios = {"vits16": 0.15, "vitb16": 0.3, "vitl16": 0.5, "vitb8": 0.3, "vitb4": 0.7, "vitl7": 0.7}
    for name in NAMES:
        if name.startswith("msn_vit"):
            assert read_recipe(name)["mask_ratio"] == ratios[name.split("_")[1]], name


def test_the_method_of_the_command_line_overrides_that_of_the_file(tmp_path, out):
    path = write(tmp_path, method="paws", labelled_fraction=0.1, temperature=0.2)
    assert parse_recipe(["--config", path, "--output_dir", out]).method.model is PAWSForPreTraining
    recipe = parse_recipe(["--config", path, "--output_dir", out, "--method", "suncet"])
    assert recipe.method.model is SuNCEtForPreTraining and recipe.config_fields["temperature"] == 0.2
    with pytest.raises(ValueError, match=r"`labelled_fraction`, in '.*recipe.yaml'.* method paws"):
        parse_recipe(["--config", path, "--output_dir", out, "--method", "msn"])


def test_each_method_has_the_views_of_its_paper_by_default(out):
    paws = parse_recipe(["--output_dir", out, *PAWS]).views
    assert (paws.focal_views, paws.anchor_views) == (6, 1)
    assert (paws.global_scale, paws.focal_scale) == ((0.14, 1.0), (0.05, 0.14))
    suncet = parse_recipe(["--output_dir", out, *PAWS, "--method", "suncet"]).views
    assert suncet.focal_views == 0
    assert parse_recipe(["--output_dir", out, *PAWS, "--focal_views", "2"]).views.focal_views == 2
    assert parse_recipe(["--output_dir", out]).views.focal_views == 10


@pytest.mark.parametrize("method", ["msn", "paws", "suncet"])
def test_the_first_weights_depend_on_the_seed_alone(out, method):
    labels = [] if method == "msn" else ["--labelled_images_per_class", "5"]

    def weights(seed):
        torch.rand(seed + 3)  # whatever was drawn before
        arguments = ["--output_dir", out, "--method", method, "--seed", str(seed), *labels, *TINY_RUN]
        return parse_recipe(arguments).build_model().state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(other["projection_head.fc1.weight"], first["projection_head.fc1.weight"])


def test_a_label_source_on_the_command_line_replaces_that_of_the_file(tmp_path, out):
    in_file = write(tmp_path, method="paws", labelled_dataset="digits", labelled_split="train")
    assert parse_recipe(["--config", in_file, "--output_dir", out]).labels.labelled_split == "train"
    labels = parse_recipe(["--config", in_file, "--output_dir", out, "--labelled_fraction", "0.1"]).labels
    assert (labels.labelled_fraction, labels.labelled_dataset, labels.labelled_split) == (0.1, None, None)


def test_a_file_of_rows_holds_numbers_or_a_mask(tmp_path):
    def rows(values, name="rows.npy"):
        path = tmp_path / name
        np.save(path, values) if path.suffix == ".npy" else path.write_text(values)
        return read_rows_file(path, 4)

    for found in (rows([2, 0]), rows("2\n0\n", "rows.txt"), rows("2 0\n", "rows.txt")):
        assert found.tolist() == [2, 0]
    for found in (rows([0, 1, 1, 0]), rows(np.array([0, 1, 1, 0], bool)), rows("0\n1\n1\n0\n", "rows.txt")):
        assert found.dtype == bool and found.tolist() == [False, True, True, False]
    assert rows([0, 1]).tolist() == [0, 1]  # too few for a mask
    with pytest.raises(ValueError, match=r"`labelled_rows_file` .*rows.txt"):
        rows("first\nsecond\n", "rows.txt")
    with pytest.raises(ValueError, match=r"absent.npy"):
        read_rows_file(tmp_path / "absent.npy", 4)


SMALL_PAWS = [*TINY_RUN, "--method", "paws", "--global_support_images_per_class", "1"]


def test_low_shot_with_too_few_images_of_a_class_is_refused_before_training(out):
    arguments = ["--output_dir", out, *TINY_RUN, "--low_shot_every_epochs", "1"]
    with pytest.raises(ValueError, match=r"`low_shot_images_per_class` = 200 .* 142"):
        parse_recipe([*arguments, "--low_shot_images_per_class", "1", "200"]).build_trainer()


def test_evaluation_while_training_knows_the_labelled_rows_alone(tmp_path, out, monkeypatch):
    evaluated = {}

    def evaluator(labelled, test, **settings):
        evaluated.update(settings, labelled=labelled)
        return lambda model: {}

    monkeypatch.setattr("hf_msn.cli.pretrain.LowShotEvaluator", evaluator)
    rows = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    np.save(tmp_path / "rows.npy", rows)
    arguments = ["--output_dir", out, *SMALL_PAWS, "--labelled_rows_file", str(tmp_path / "rows.npy")]
    trainer = parse_recipe([*arguments, "--low_shot_every_epochs", "1"]).build_trainer()
    assert trainer.support_dataset.rows.tolist() == rows
    assert evaluated["images_per_class"] == () and list(evaluated["rows"]) == ["labelled"]
    assert evaluated["rows"]["labelled"].tolist() == rows
    with pytest.raises(ValueError, match=r"`low_shot_train_split` .*'test'"):
        parse_recipe([*arguments, "--low_shot_every_epochs", "1", "--low_shot_train_split", "test"]).build_trainer()


def test_a_stream_takes_its_labels_from_a_second_data_set(out):
    arguments = ["--output_dir", out, *SMALL_PAWS, "--streaming", "--warmup_steps", "1", "--max_steps", "2"]
    with pytest.raises(ValueError, match=r"stream.*`labelled_dataset`"):
        parse_recipe([*arguments, "--labelled_images_per_class", "1"]).build_datasets()
    arguments += ["--labelled_dataset", "digits", "--labelled_split", "test"]
    built = parse_recipe(arguments).build_datasets()
    assert built["support_dataset"].rows.tolist() == list(range(len(built["support_dataset"])))
