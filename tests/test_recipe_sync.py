"""Fields of training with little communication: homes, methods that know them, and the callback that they make."""

import pytest
import yaml

from hf_msn import CodistillationCallback, SlowMoCallback, parse_recipe
from hf_msn.cli.recipe_sync import METHODS, SyncArguments

TINY = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --projection_hidden_dim 16 "
    "--projection_dim 8 --num_prototypes 8 --image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 --use_cpu "
    "--report_to none"
).split()


def test_a_recipe_file_makes_the_callback_with_its_settings(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"sync": "slowmo", "sync_every": 4, "slow_momentum": 0.6, "slow_shard_state": True})
    )
    given = ["--config", str(path), "--output_dir", str(tmp_path / "run"), *TINY, "--sync_every", "6"]
    trainer = parse_recipe([*given, "--sync_base_buffers", "average"]).build_trainer()
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SlowMoCallback)]
    sync = callback.make_sync(trainer.model, trainer.create_optimizer())
    assert (sync.sync_every, sync.slow_momentum, sync.slow_lr) == (6, 0.6, 1.0)
    assert sync.base_buffers == "average" and sync.shard_state is True


def test_without_sync_there_is_no_callback(tmp_path):
    trainer = parse_recipe(["--output_dir", str(tmp_path), *TINY]).build_trainer()
    assert not [c for c in trainer.callback_handler.callbacks if "Sync" in type(c).__mro__[1].__name__]
    assert not hasattr(trainer.evaluate, "__wrapped__")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sync": "all_reduce"}, "`sync` must be one of local_sgd, slowmo, .*, but is 'all_reduce'"),
        ({"sync_every": 4}, "`sync_every` .* but `sync` is not given"),
        ({"sync": "local_sgd", "slow_lr": 1.0}, "`slow_lr` is of `sync` slowmo, but `sync` is local_sgd"),
        ({"sync": "slowmo", "push_sum": True}, "`push_sum` is of `sync` gossip, .* slowmo without `sync_base`"),
        ({"sync": "slowmo", "sync_base": "local_sgd"}, "`sync_base` must be one of gossip, overlap_gossip"),
        ({"sync": "slowmo", "sync_base_buffers": "keep"}, "`sync_base_buffers` .* but is 'keep'"),
        ({"sync": "slowmo", "slow_momentum": 1.5}, r"`slow_momentum` .* \[0, 1\), but is 1.5"),
        ({"sync": "codistillation", "codistillation_alpha": -1.0}, "`codistillation_alpha` .* >= 0, but is -1.0"),
        ({"sync": "codistillation", "codistillation_top_k": 0}, "`codistillation_top_k` .* but is 0"),
        (
            {"sync": "codistillation", "codistillation_copies_device": "disk"},
            "`codistillation_copies_device` .* 'disk'",
        ),
        ({"sync": "codistillation", "sync_every": 4}, "`sync_every` is of `sync` local_sgd .* is codistillation"),
        ({"sync": "slowmo", "codistillation_publish": "best"}, "`codistillation_publish` is of `sync` codistillation"),
        ({"sync": "local_sgd", "sync_every": 0}, "`sync_every` .* >= 1, but is 0"),
        ({"sync": "local_sgd", "sync_timeout_seconds": 0.0}, "`sync_timeout_seconds` .* > 0"),
        ({"sync": "slowmo", "slow_shard_state": True, "slow_average": False}, "`slow_shard_state=True`"),
    ],
)
def test_a_field_that_the_method_does_not_know_or_a_wrong_value_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        SyncArguments(**fields)


def test_codistillation_has_its_fields(tmp_path):
    given = "--sync codistillation --codistillation_exchange checkpoints --codistillation_exchange_every 20".split()
    given += "--codistillation_alpha 0.5 --codistillation_falling_weight_decay --final_weight_decay none".split()
    trainer = parse_recipe(["--output_dir", str(tmp_path), *TINY, *given]).build_trainer()
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, CodistillationCallback)]
    assert callback.settings["exchange"] == "checkpoints" and callback.settings["exchange_every"] == 20
    assert callback.settings["alpha"] == 0.5 and callback.falling_weight_decay and not callback.same_batch
    given = "--sync codistillation --codistillation_top_k 3 --codistillation_check_every 10".split()
    given += "--codistillation_copies_device cpu --codistillation_same_batch false".split()
    trainer = parse_recipe(["--output_dir", str(tmp_path), *TINY, *given]).build_trainer()
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, CodistillationCallback)]
    named = {name: callback.settings[name] for name in ("top_k", "check_every", "copies_device")}
    assert named == {"top_k": 3, "check_every": 10, "copies_device": "cpu"} and callback.same_batch is False


def test_an_average_of_predictions_is_refused_for_a_pretraining(tmp_path):
    given = "--sync codistillation --codistillation_publish average".split()
    with pytest.raises(ValueError, match=r"`codistillation_publish='average'` .* by MSNForPreTraining ends"):
        parse_recipe(["--output_dir", str(tmp_path), *TINY, *given]).build_trainer()


def test_each_field_is_known_by_a_method():
    known = {name for _, fields in METHODS.values() for name in fields}
    assert known == set(SyncArguments.__dataclass_fields__) - {"sync"}


def test_a_field_reaches_the_check_of_its_method():
    bad = {
        "gossip": {"consensus_target": 0.0},
        "overlap_gossip": {"staleness_bound": -1},
        "async_gossip": {"async_seed": -1},
    }
    for method, fields in bad.items():
        SyncArguments(sync=method)
        with pytest.raises(ValueError, match=f"`{next(iter(fields))}`.*but is {next(iter(fields.values()))}"):
            SyncArguments(sync=method, **fields)
