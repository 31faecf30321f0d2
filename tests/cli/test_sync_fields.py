"""Fields of training with little communication: from the signatures, by method, to the callbacks."""

import pytest
import torch
from tiny import TINY_RUN

from hf_msn import CodistillationCallback, SlowMoCallback, parse_recipe
from hf_msn.cli.sync import SYNC_METHODS, TOPOLOGIES, SyncArguments, sync_options


def callback_of(output_dir, *arguments):
    """The trainer of a recipe, and its sync callback."""
    trainer = parse_recipe(["--output_dir", str(output_dir), *TINY_RUN, *arguments]).build_trainer()
    classes = tuple(method.callback for method in SYNC_METHODS.values())
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, classes)]
    return trainer, found


def test_the_documented_fields_are_there_with_a_help():
    documented = """
        sync sync_every sync_start_step sync_base_buffers sync_timeout_seconds sync_wire_dtype sync_topology
        sync_peers_per_step sync_base sync_base_every slow_momentum slow_lr slow_average slow_shard_state push_sum
        quasi_global_momentum consensus_target max_extra_rounds consensus_until_step staleness_bound deterministic
        async_method async_rate_correction async_seed codistillation_exchange codistillation_exchange_every
        codistillation_transfer_steps codistillation_alpha codistillation_ramp_steps codistillation_burn_in_steps
        codistillation_distance codistillation_temperature codistillation_top_k codistillation_copies_dtype
        codistillation_copies_device codistillation_falling_weight_decay
        noloco_lr noloco_momentum noloco_pull noloco_seed
        outer_optim outer_optim_args outer_lr num_fragments fragments fragment_delay mixing_alpha
    """.split()
    options = {option.name: option for option in sync_options()}
    assert not set(documented) - set(options)
    assert not [name for name in options if not options[name].help]
    # every parameter of a method for which a command line has a value has a field of its own
    for method in SYNC_METHODS.values():
        names = [option.name for option in method.fields().values()]
        assert len(names) == len(set(names)) and set(names) <= set(options)


def test_a_recipe_makes_the_callback_with_its_settings(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sync: slowmo\nsync_every: 4\nslow_momentum: 0.6\nslow_shard_state: true\n")
    given = ["--config", str(tmp_path / "recipe.yaml"), "--sync_every", "6", "--sync_base_buffers", "average"]
    trainer, (callback,) = callback_of(tmp_path / "run", *given)
    assert isinstance(callback, SlowMoCallback)
    sync = callback.make_sync(trainer.model, trainer.create_optimizer())
    assert (sync.sync_every, sync.slow_momentum, sync.slow_lr) == (6, 0.6, 1.0)
    assert sync.base_buffers == "average" and sync.shard_state is True


def test_slowmo_over_gossip_passes_each_field_to_its_level(tmp_path):
    given = "--sync slowmo --sync_base gossip --push_sum false --sync_every 48 --sync_timeout_seconds 30".split()
    given += "--sync_topology ring".split()
    trainer, (callback,) = callback_of(tmp_path, *given)
    sync = callback.make_sync(trainer.model, trainer.create_optimizer())
    assert sync.sync_every == 48 and sync.base.push_sum is False
    assert type(sync.base.topology) is TOPOLOGIES["ring"] and sync.base.sync_every == 1


@pytest.mark.parametrize(("base", "default"), [("local_sgd", 12), ("gossip", 1)])
def test_slowmo_over_a_base_with_a_period_of_its_own(base, default, tmp_path):
    given = f"--sync slowmo --sync_base {base} --sync_every 48 --sync_timeout_seconds 30 --sync_start_step 5".split()
    for more, base_every in (([], default), (["--sync_base_every", "4"], 4)):
        trainer, (callback,) = callback_of(tmp_path, *given, *more)
        sync = callback.make_sync(trainer.model, trainer.create_optimizer())
        assert type(sync.base) is SYNC_METHODS[base].core
        assert (sync.sync_every, sync.base.sync_every) == (48, base_every)
        assert (sync.sync_start_step, sync.base.sync_start_step) == (5, 0)


def test_without_sync_there_is_no_callback(tmp_path):
    assert callback_of(tmp_path)[1] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sync_every": 4}, "`sync_every` .* but `sync` is not given"),
        ({"sync": "local_sgd", "slow_lr": 1.0}, "`slow_lr` belongs to `sync` slowmo, but `sync` is local_sgd"),
        ({"sync": "slowmo", "push_sum": True}, "`push_sum` belongs to `sync` gossip"),
        ({"sync": "gossip", "sync_base": "gossip"}, "`sync_base` belongs to `sync` slowmo"),
        ({"sync_base": "gossip"}, "`sync_base` belongs to `sync` slowmo, but `sync` is not given"),
        ({"sync": "slowmo", "sync_base_every": 4}, "`sync_base_every` belongs to `sync_base` local_sgd"),
        (
            {"sync": "slowmo", "sync_base": "overlap_gossip", "sync_base_every": 4},
            "`sync_base_every` .*overlap_gossip",
        ),
        ({"sync": "slowmo", "sync_base": "local_sgd", "sync_base_every": 0}, "`sync_base_every` .*0"),
        ({"sync": "slowmo", "sync_base": "local_sgd", "push_sum": True}, "`push_sum` belongs to"),
        ({"sync": "codistillation", "sync_every": 4}, "`sync_every` belongs to `sync` local_sgd.*codistillation"),
        ({"sync": "overlap_gossip", "sync_every": 4}, "`sync_every` belongs .* but `sync` is overlap_gossip"),
        ({"sync": "gossip", "sync_peers_per_step": 2}, "`sync_peers_per_step`"),
        ({"sync": "noloco", "noloco_momentum": 0.9, "noloco_pull": 0.7}, "`noloco_pull`.*< 0.38.*0.7"),
        ({"sync": "slowmo", "sync_base_buffers": "keep"}, "`sync_base_buffers` .*'keep'"),
        ({"sync": "slowmo", "slow_shard_state": True, "slow_average": False}, "`slow_shard_state=True`"),
        ({"sync": "slowmo", "sync_base": "overlap_gossip", "staleness_bound": -1}, "`staleness_bound`.*-1"),
        ({"sync": "local_sgd", "sync_timeout_seconds": 0.0}, "`sync_timeout_seconds` .*0"),
        ({"sync": "diloco", "slow_lr": 1.0}, "`slow_lr` belongs to `sync` slowmo, but `sync` is diloco"),
        ({"sync": "diloco", "outer_optim": "Adam"}, "`outer_lr` must be given"),
        ({"sync": "diloco", "outer_optim": "LBFGS", "outer_lr": 1.0}, "`outer_optim` must not be .*LBFGS"),
        ({"sync": "diloco", "outer_optim_args": "lr=0.5"}, "`outer_optim_args` .*'lr'.*`outer_lr`"),
        ({"sync": "diloco", "outer_optim": "timm:lambda", "outer_lr": 1.0}, "lambda"),
        ({"sync": "diloco", "fragment_delay": 2}, "`fragment_delay` belongs to `sync` streaming_diloco"),
        ({"sync": "streaming_diloco", "fragment_delay": 12, "sync_every": 12}, "`fragment_delay` .*at most 11"),
        ({"sync": "streaming_diloco", "num_fragments": 0}, "`num_fragments` .*0"),
        ({"sync": "async_gossip", "async_seed": -1}, "`async_seed`.*-1"),
        ({"sync": "codistillation", "codistillation_alpha": -1.0}, "`codistillation_alpha` .*-1.0"),
    ],
    ids=str,
)
def test_a_field_that_the_method_lacks_and_a_wrong_value_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        SyncArguments(**fields)


@pytest.mark.parametrize("name", ["sync", "sync_topology", "sync_base"])
def test_an_unknown_method_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` .*'all_reduce'"):
        parse_recipe(["--output_dir", str(tmp_path), f"--{name}", "all_reduce"])


def test_codistillation_has_its_fields(tmp_path):
    given = "--sync codistillation --codistillation_exchange checkpoints --codistillation_exchange_every 20".split()
    given += "--codistillation_alpha 0.5 --codistillation_falling_weight_decay --final_weight_decay none".split()
    _, (callback,) = callback_of(tmp_path, *given)
    assert isinstance(callback, CodistillationCallback) and callback.falling_weight_decay
    assert callback.settings["exchange"] == "checkpoints" and callback.settings["exchange_every"] == 20
    assert callback.settings["alpha"] == 0.5


def test_streaming_diloco_has_its_fields_and_an_outer_optimizer(tmp_path):
    given = "--sync streaming_diloco --num_fragments 2 --fragments size --fragment_delay 2 --mixing_alpha 0.25".split()
    given += "--sync_every 3".split()  # fewer than the default of num_fragments
    given += "--outer_optim timm:lamb --outer_lr 0.1 --outer_optim_args betas=(0.8,0.9)".split()
    trainer, (callback,) = callback_of(tmp_path, *given)
    sync = callback.make_sync(trainer.model, torch.optim.SGD(trainer.model.parameters(), lr=1.0))
    assert (sync.num_fragments, sync.fragments, sync.delay, sync.mixing_alpha) == (2, "size", 2, 0.25)
    outer = callback.settings["outer_optimizer"]([torch.nn.Parameter(torch.ones(2))])
    assert type(outer).__name__ == "Lamb"
    assert outer.param_groups[0]["lr"] == 0.1 and outer.param_groups[0]["betas"] == (0.8, 0.9)
    _, (callback,) = callback_of(tmp_path, "--sync", "diloco", "--outer_lr", "0.3")
    outer = callback.settings["outer_optimizer"]([torch.nn.Parameter(torch.ones(2))])
    settings = outer.param_groups[0]
    assert (settings["lr"], settings["momentum"], settings["nesterov"]) == (0.3, 0.9, True)
