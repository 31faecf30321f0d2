"""One flat file and the command line: names, types, what wins, what is refused."""

from pathlib import Path

import pytest
import yaml

from hf_msn import parse_recipe, read_recipe
from hf_msn.recipes import make_recipe

RECIPES = sorted((Path(__file__).parents[1] / "scripts" / "recipes").glob("*.yaml"))


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
        (["--focal_views", "0", "--anchor_views", "0"], "at least one of them must be >= 1"),
    ],
)
def test_bad_values_are_refused_before_any_work(out, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--output_dir", out, *arguments])


def test_output_dir_is_asked_for_and_must_be_empty(tmp_path, out):
    with pytest.raises(ValueError, match="`output_dir` is missing"):
        parse_recipe([])
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
    for size in (recipe.views.image_size, recipe.views.focal_size):
        assert size % config.patch_size == 0 or recipe.views.focal_views == 0


def test_mask_ratios_of_the_paper():
    ratios = {"vits16": 0.15, "vitb16": 0.3, "vitl16": 0.5, "vitb8": 0.3, "vitb4": 0.7, "vitl7": 0.7}
    for path in RECIPES:
        if path.stem.startswith("msn_vit"):
            assert read_recipe(path)["mask_ratio"] == ratios[path.stem.split("_")[1]], path.stem
