"""One flat file and the command line: names, types, what wins, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hf_msn import parse_recipe, read_recipe
from hf_msn.cli.recipe import make_recipe
from hf_msn.cli.recipe_arguments import LabelArguments, read_rows_file
from hf_msn.models.modeling_paws import PAWSForPreTraining
from hf_msn.models.modeling_suncet import SuNCEtForPreTraining
from hf_msn.models.trunks import build_encoder

RECIPES = sorted((Path(__file__).parents[1] / "scripts" / "recipes").glob("*.yaml"))
RECIPES = [path for path in RECIPES if not path.stem.startswith("finetune_")]  # those of scripts/finetune.py


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


def test_the_command_line_wins_over_the_file(tmp_path, out):
    path = write(tmp_path, mask_ratio=0.25, num_prototypes=32, learning_rate=0.01)
    recipe = parse_recipe(["--config", path, "--output_dir", out, "--mask_ratio", "0.5"])
    assert recipe.config_fields["mask_ratio"] == 0.5
    assert recipe.config_fields["num_prototypes"] == 32 and recipe.training.learning_rate == 0.01


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path, out):
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-3\nnum_train_epochs: 5\nrotation: 10\n")
    recipe = parse_recipe(["--config", str(tmp_path / "r.yaml"), "--output_dir", out])
    assert recipe.training.learning_rate == 0.001  # YAML reads 1e-3 as text
    assert recipe.training.num_train_epochs == 5.0 and recipe.views.rotation == 10.0


def test_none_is_no_value_but_a_reporter(out):
    recipe = parse_recipe(f"--output_dir {out} --report_to none --final_weight_decay none --image_column null".split())
    assert recipe.training.report_to == []
    assert recipe.training.final_weight_decay is None and recipe.data.image_column is None


@pytest.mark.parametrize(
    "name, nearest", [("mask_ration", "mask_ratio"), ("num_prototype", "num_prototypes"), ("epochs", "warmup_epochs")]
)
def test_an_unknown_field_names_the_nearest(tmp_path, out, name, nearest):
    with pytest.raises(ValueError, match=f"no field `{name}`, on the command line. Did you mean `{nearest}`"):
        parse_recipe(["--output_dir", out, f"--{name}", "1"])
    with pytest.raises(ValueError, match=rf"no field `{name}`, in '.*recipe.yaml'. Did you mean `{nearest}`"):
        parse_recipe(["--config", write(tmp_path, **{name: 1}), "--output_dir", out])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mask_ratio", "much"], "`mask_ratio` must be .*a number.*, but is 'much'"),
        (["--num_prototypes", "1.5"], "`num_prototypes` must be a whole number, but is '1.5'"),
        (["--use_sinkhorn", "maybe"], "`use_sinkhorn` must be true or false, but is 'maybe'"),
        (["--mask_ratio", "0.1", "0.2"], "`mask_ratio` takes one value, but got 2"),
        (["--mask_ratio", "1.0"], r"`mask_ratio` .* must be in \[0, 1\), but is 1.0"),
        (["--num_prototypes", "0"], "`num_prototypes` must be >= 1, but is 0"),
        (["--patch_size", "15"], "`image_size` must be a multiple of `patch_size`"),
        (["--temperature", "0"], "`temperature` must be > 0"),
        (
            ["--per_device_train_batch_size", "0"],
            "`per_device_train_batch_size` must be a whole number >= 1, but is 0",
        ),
        (["--gradient_accumulation_steps", "0"], "`gradient_accumulation_steps` must be .* >= 1, but is 0"),
        (["--dataloader_num_workers", "-1"], "`dataloader_num_workers` must be a whole number >= 0, but is -1"),
        (["--seed", "-1"], "`seed` must be a whole number >= 0, but is -1"),
        (["--num_train_epochs", "0"], "`num_train_epochs` must be > 0, or `max_steps` be given, but is 0.0"),
        (["--focal_views", "0", "--anchor_views", "0"], "at least one of them must be >= 1"),
    ],
)
def test_bad_values_are_refused_before_any_work(out, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--output_dir", out, *arguments])


def test_output_dir_is_asked_for_and_must_be_empty(tmp_path, out):
    with pytest.raises(ValueError, match="`output_dir` is missing"):
        parse_recipe([])
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"must be a folder, but '.*file' is a file"):
            parse_recipe(["--output_dir", str(place)])
    Path(out).mkdir()
    parse_recipe(["--output_dir", out])
    (Path(out) / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty\. .*--resume_from_checkpoint true"):
        parse_recipe(["--output_dir", out])
    assert (
        parse_recipe(["--output_dir", out, "--resume_from_checkpoint", "true"]).training.resume_from_checkpoint is True
    )
    assert parse_recipe(["--output_dir", out, "--overwrite_output_dir"]).training.overwrite_output_dir is True


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="There is no recipe"):
        read_recipe(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="holds a list"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_recipe(tmp_path / "broken.yaml")


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    short = capsys.readouterr().out
    assert "--mask_ratio NUMBER" in short and "[0.3]" in short and "--ema_momentum" in short
    assert "--hub_token" not in short
    with pytest.raises(SystemExit):
        parse_recipe(["--help_all"])
    assert "--hub_token" in capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_makes_a_run(path, out):
    values = read_recipe(path)
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
    for path in RECIPES:
        if path.stem.startswith("msn_vit"):
            assert read_recipe(path)["mask_ratio"] == ratios[path.stem.split("_")[1]], path.stem


PAWS = ["--method", "paws", "--labelled_images_per_class", "5"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*PAWS, "--mask_ratio", "0.3"], "no field `mask_ratio`, on the command line. It belongs to method msn, but"),
        ([*PAWS, "--supervised_epochs", "3"], "`supervised_epochs`, .* belongs to method suncet, .* one of PAWS"),
        (["--labelled_images_per_class", "5"], "belongs to method paws and suncet, but .* Masked Siamese Networks"),
        (["--method", "suncet", "--prediction_head"], "belongs to method paws, but the run is one of SimCLR"),
        (["--method", "paw"], "`method` must be one of msn, paws, suncet, but is 'paw'"),
        ([*PAWS, "--label_smoothin", "0.1"], "Did you mean `label_smoothing`"),
    ],
)
def test_fields_of_another_method_are_named_as_such(out, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--output_dir", out, *arguments])


def test_the_method_of_the_command_line_wins_over_that_of_the_file(tmp_path, out):
    path = write(tmp_path, method="paws", labelled_fraction=0.1, temperature=0.2)
    assert parse_recipe(["--config", path, "--output_dir", out]).method.model is PAWSForPreTraining
    recipe = parse_recipe(["--config", path, "--output_dir", out, "--method", "suncet"])
    assert recipe.method.model is SuNCEtForPreTraining and recipe.config_fields["temperature"] == 0.2
    with pytest.raises(
        ValueError, match=r"no field `labelled_fraction`, in '.*recipe.yaml'. It belongs to method paws"
    ):
        parse_recipe(["--config", path, "--output_dir", out, "--method", "msn"])
    without = write(tmp_path, labelled_fraction=0.1, prediction_head=True)
    recipe = parse_recipe(["--config", without, "--output_dir", out, "--method", "paws"])
    assert recipe.method.model is PAWSForPreTraining and recipe.config_fields["prediction_head"] is True
    with pytest.raises(ValueError, match=r"`prediction_head`, in .* belongs to method paws, but .* SimCLR"):
        parse_recipe(["--config", without, "--output_dir", out, "--method", "suncet"])


def test_each_method_has_the_views_of_its_paper_unless_told_otherwise(out):
    paws = parse_recipe(["--output_dir", out, *PAWS]).views
    assert (paws.focal_views, paws.anchor_views, paws.global_scale, paws.focal_scale) == (
        6,
        1,
        (0.14, 1.0),
        (0.05, 0.14),
    )
    suncet = parse_recipe(["--output_dir", out, *PAWS, "--method", "suncet"]).views
    assert suncet.focal_views == 0
    assert parse_recipe(["--output_dir", out, *PAWS, "--focal_views", "2"]).views.focal_views == 2
    assert parse_recipe(["--output_dir", out]).views.focal_views == 10


@pytest.mark.parametrize("method", ["msn", "paws", "suncet"])
def test_the_first_weights_depend_on_the_seed_alone(out, method):
    sizes = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16".split()
    sizes += ["--projection_hidden_dim", "8", "--projection_dim", "8"]
    labels = [] if method == "msn" else ["--labelled_images_per_class", "5"]

    def weights(seed):
        torch.rand(seed + 3)  # whatever was drawn before
        arguments = ["--output_dir", out, "--method", method, "--seed", str(seed), *labels, *sizes]
        return parse_recipe(arguments).build_model().state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(other["projection_head.fc1.weight"], first["projection_head.fc1.weight"])


def test_a_switch_that_may_be_left_open_needs_no_value(out):
    assert parse_recipe(["--output_dir", out]).training.activation_checkpointing is not True
    assert parse_recipe(["--output_dir", out, "--activation_checkpointing"]).training.activation_checkpointing is True
    off = parse_recipe(["--output_dir", out, "--activation_checkpointing", "false"])
    assert off.training.activation_checkpointing is False


def test_options_of_timm_are_json_or_a_mapping(tmp_path, out):
    options = {"layers": [1, 1, 1, 1], "drop_path_rate": 0.1}
    text = '{"layers": [1, 1, 1, 1], "drop_path_rate": 0.1}'
    given = parse_recipe(["--output_dir", out, *PAWS, "--timm_model", "resnet18", "--timm_options", text])
    assert given.config_fields["timm_options"] == options
    path = write(tmp_path, method="paws", labelled_fraction=0.1, timm_model="resnet18", timm_options=options)
    assert parse_recipe(["--config", path, "--output_dir", out]).config_fields["timm_options"] == options
    none = parse_recipe(["--config", path, "--output_dir", out, "--timm_options", "none"])
    assert none.config_fields["timm_options"] is None
    for wrong, message in (("{layers: 1}", "`timm_options` must be JSON such as"), ("[1]", "must be a JSON object")):
        with pytest.raises(ValueError, match=message):
            parse_recipe(["--output_dir", out, *PAWS, "--timm_model", "resnet18", "--timm_options", wrong])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "exactly one way, but none is given. Give one of labelled_list_file, labelled_rows_file"),
        (
            ["--labelled_fraction", "0.1", "--labelled_rows_file", "rows.npy"],
            "but labelled_rows_file, labelled_fraction are given",
        ),
        (["--labelled_fraction", "0.1", "--labelled_split", "few"], "`labelled_split` is of a second data set"),
    ],
)
def test_which_images_are_labelled_is_said_in_exactly_one_way(out, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--output_dir", out, "--method", "paws", *arguments])


def test_labels_named_on_the_command_line_replace_those_of_the_file(tmp_path, out):
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
    assert rows("1\n1\n1\n1\n", "rows.txt").tolist() == [True] * 4
    assert rows("0\n0\n0\n0\n", "rows.txt").tolist() == [False] * 4
    assert rows([0, 1]).tolist() == [0, 1]  # too few for a mask
    with pytest.raises(ValueError, match=r"must hold row numbers, or 0 or 1 .*, but cannot be read"):
        rows("first\nsecond\n", "rows.txt")
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows_file(tmp_path / "empty.npy", 4)
    with pytest.raises(ValueError, match=r"There is no file '.*absent.npy'"):
        read_rows_file(tmp_path / "absent.npy", 4)


SMALL_PAWS = (
    "--method paws --dataset digits --image_size 8 --patch_size 4 --focal_size 4 --focal_views 1 --hidden_size 16 "
    "--num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --projection_hidden_dim 8 "
    "--projection_dim 8 --use_cpu --report_to none --global_support_images_per_class 1"
).split()


def test_evaluation_while_training_knows_the_labelled_rows_alone(tmp_path, out, monkeypatch):
    evaluated = {}

    def evaluator(labelled, test, **settings):
        evaluated.update(settings, labelled=labelled)
        return lambda model: {}

    monkeypatch.setattr("hf_msn.cli.recipe.LowShotEvaluator", evaluator)
    rows = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    np.save(tmp_path / "rows.npy", rows)
    arguments = ["--output_dir", out, *SMALL_PAWS, "--labelled_rows_file", str(tmp_path / "rows.npy")]
    arguments += ["--low_shot_test_split", "test"]
    trainer = parse_recipe([*arguments, "--low_shot_every_epochs", "1"]).build_trainer()
    assert trainer.support_dataset.rows.tolist() == rows
    assert evaluated["images_per_class"] == () and list(evaluated["rows"]) == ["labelled"]
    assert evaluated["rows"]["labelled"].tolist() == rows
    with pytest.raises(ValueError, match="`low_shot_train_split` would read labels of images that"):
        parse_recipe([*arguments, "--low_shot_every_epochs", "1", "--low_shot_train_split", "test"]).build_trainer()


def test_a_stream_takes_its_labels_from_a_second_data_set(out):
    arguments = ["--output_dir", out, *SMALL_PAWS, "--streaming", "--warmup_steps", "1", "--max_steps", "2"]
    with pytest.raises(
        ValueError, match=r"has no numbered rows to pick the labelled ones from. Give .* `labelled_dataset`"
    ):
        parse_recipe([*arguments, "--labelled_images_per_class", "1"]).build_datasets()
    arguments += ["--labelled_dataset", "digits", "--labelled_split", "test"]
    built = parse_recipe(arguments).build_datasets()
    assert built["support_dataset"].rows.tolist() == list(range(len(built["support_dataset"])))


def test_help_of_paws_has_its_fields_and_says_what_is_global(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--method", "paws", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--labelled_rows_file" in text and "--timm_options" in text and "--mask_ratio" not in text
    assert "in each support set, over all ranks together" in text
    assert LabelArguments(labelled_fraction=0.1).support_views_per_image == 1
