"""`encoder_chunk_size` of the trainers: the plain run to rounding, under every way of training."""

import pytest
import torch
from launch import run_ranks
from semi_supervised_runs import make_run
from short_runs import RandomViews, logged, make_trainer, whole_and_resumed

from hf_msn import CodistillationCallback, GossipCallback, MSNTrainingArguments, SlowMoCallback

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def in_float64(trainer):
    """In float32 Adam makes whole steps out of gradients that are 0 but for rounding, in float64 small ones."""
    trainer.model.double()
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_same_training(trainers, tolerance: float = 1e-5) -> None:
    plain, cached = trainers
    start = weights(plain).clone()
    plain.train()
    cached.train()
    assert list(logged(cached).values()) == pytest.approx(list(logged(plain).values()), rel=1e-6)  # logged in float32
    assert (weights(cached) - weights(plain)).norm() < tolerance * (weights(plain) - start).norm()


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2, "activation_checkpointing": True}, {"critical_gradients": 2}],
    ids=["plain", "accumulation", "critical gradients"],
)
def test_a_run_of_msn_is_the_plain_one(tmp_path, settings):
    settings = {"save_strategy": "no", "max_steps": 4, **settings}
    trainers = [make_trainer(tmp_path / str(size), encoder_chunk_size=size, **settings) for size in (None, 3)]
    assert_same_training([in_float64(trainer) for trainer in trainers])
    assert trainers[1].model.encoder_chunks is None


@pytest.mark.parametrize("method", ["paws", "suncet"])
def test_a_run_with_a_support_is_the_plain_one(tmp_path, method):
    trainers = [make_run(tmp_path / str(size), method, max_steps=4, encoder_chunk_size=size) for size in (None, 5)]
    rows = []
    encoder = trainers[1].model.encoder
    encoder.layernorm.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    assert_same_training([in_float64(trainer) for trainer in trainers])
    assert max(rows) == 5


def test_a_step_in_bf16_is_the_plain_one(tmp_path):
    settings = {"save_strategy": "no", "max_steps": 1, "bf16": True}
    trainers = [make_trainer(tmp_path / str(size), encoder_chunk_size=size, **settings) for size in (None, 3)]
    logs = []
    for trainer in trainers:
        trainer.train()
        logs.append([logged(trainer)[1], float(logged(trainer, "grad_norm")[1])])
    assert logs[1] == pytest.approx(logs[0], rel=0.01)


def test_resume_with_dropout_is_bit_exact(tmp_path):
    whole_and_resumed(make_trainer, tmp_path, 5, encoder_chunk_size=3, model_fields=DROPOUT)


CALLBACKS = {
    "ddp": lambda trainer: None,
    "slowmo": lambda trainer: SlowMoCallback(trainer, sync_every=2),
    "gossip": lambda trainer: GossipCallback(trainer),
    "codistillation": lambda trainer: CodistillationCallback(
        trainer, exchange="checkpoints", exchange_every=2, initialization="same"
    ),
}


def _train_with_callbacks(rank, folder):
    results = {}
    for name, make in CALLBACKS.items():
        for size in (None, 3):
            settings = {"save_strategy": "no", "max_steps": 4, "encoder_chunk_size": size}
            trainer = in_float64(make_trainer(f"{folder}/{name}{size}", **settings))
            if (callback := make(trainer)) is not None:
                trainer.add_callback(callback)
            start = weights(trainer).clone()
            trainer.train()
            results[name, size] = list(logged(trainer).values()), start, weights(trainer)
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_as_without_chunks(tmp_path):
    for result in run_ranks(_train_with_callbacks, 2, str(tmp_path), timeout=120):
        for name in CALLBACKS:
            losses, start, plain = result[name, None]
            cached_losses, _, cached = result[name, 3]
            assert cached_losses == pytest.approx(losses, rel=1e-6), name
            assert (cached - plain).norm() < 1e-5 * (plain - start).norm(), name


@pytest.mark.parametrize("size", [0, -3])
def test_a_chunk_below_one_image_is_an_error(tmp_path, size):
    with pytest.raises(ValueError, match=f"`encoder_chunk_size`.*{size}"):
        MSNTrainingArguments(str(tmp_path), encoder_chunk_size=size)


def test_a_chunk_without_effect_is_an_error_in_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, encoder_chunk_size=8)  # the 2 focal views of 4 images
    with pytest.raises(ValueError, match=r"`chunk_size`.*\b8\b"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_last_batch_below_a_chunk_is_no_error(tmp_path):
    settings = {"dataloader_drop_last": False, "encoder_chunk_size": 6, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, RandomViews(10), eval_dataset=RandomViews(2), **settings)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.evaluate()["eval_loss"] > 0
