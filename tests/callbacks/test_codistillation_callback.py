"""Codistillation on real trainers and ranks, against loops over the paper's equation."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from launch import run_ranks
from sync_runs import KINDS, Snapshots, image_model, image_rows, logged, same, watch_batches, weights
from sync_runs import make_local_trainer as make_trainer
from test_sync_callbacks import item_losses
from tiny import tiny_model
from torch import nn
from transformers import TrainerCallback

from hf_msn import CodistillationCallback, LowShotCallback
from hf_msn.distributed.collectives import rank, world_size
from hf_msn.evaluation.gathering import gather_objects
from hf_msn.trainers.callbacks.replica_predictions import origin_of

EXCHANGES = {
    "predictions": {"exchange": "predictions", "alpha": 2.0, "temperature": 2.0},
    "checkpoints": {"exchange": "checkpoints", "alpha": 2.0, "exchange_every": 3, "transfer_steps": 1},
}
CASES = {
    "image": {"learning_rate": 0.02},
    # transformers takes the loss of a text in float32, of whose noise Adam would make whole steps.
    "text": {"learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0.0},
}


class First(TrainerCallback):
    """The weights before the first update."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.weights = weights(model)


def _train_all(rank, folder):
    results = {}
    for kind, arguments in CASES.items():
        for exchange, settings in EXCHANGES.items():
            first, snapshots = First(), Snapshots()
            trainer = make_trainer(
                f"{folder}/{kind}_{exchange}",
                kind,
                callbacks=[first, snapshots],
                gradient_accumulation_steps=2,
                **arguments,
            )
            trainer.add_callback(CodistillationCallback(trainer, **settings))
            batches = watch_batches(trainer)
            trainer.train()
            last = next(taken for event, step, taken in snapshots.taken if (event, step) == ("step", 8))
            distances = logged(trainer, "codistillation_distance")
            results[kind, exchange] = first.weights, batches, last, weights(trainer.model), distances
    return results


def distance(own, peer, batch, temperature) -> torch.Tensor:
    """T^2 KL(p || q), the mean over what has a label."""
    if "input_ids" in batch:
        counts = batch["labels"][:, 1:] != -100
        own, peer = own[:, :-1][counts], peer[:, :-1][counts]
    log_p, log_q = (F.log_softmax(logits / temperature, dim=-1) for logits in (peer.detach(), own))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def by_hand(kind, exchange, starts, batches):
    """Two replicas in one process; their weights after 8 updates and the first one's distances."""
    arguments, settings = CASES[kind], EXCHANGES[exchange]
    models = [KINDS[kind][0]() for _ in starts]
    for model, start in zip(models, starts):
        model.load_state_dict(start)
    make_optimizer = torch.optim.SGD if "optim" in arguments else torch.optim.AdamW
    optimizers = [make_optimizer(model.parameters(), lr=1.0, weight_decay=0.0) for model in models]
    copies, sent, found = [None, None], None, {}
    inputs = "pixel_values" if kind == "image" else "input_ids"
    for step in range(8):
        before = [copy.deepcopy(model) for model in models]
        for place, (model, optimizer) in enumerate(zip(models, optimizers)):
            seen = batches[place][2 * step : 2 * step + 2]
            peer = before[1 - place] if exchange == "predictions" else copies[1 - place]
            loss = torch.cat([item_losses(model, batch) for batch in seen]).mean()
            if peer is not None:
                apart = [
                    distance(
                        model(batch[inputs]).logits, peer(batch[inputs]).logits, batch, settings.get("temperature", 1)
                    )
                    for batch in seen
                ]
                loss = loss + settings["alpha"] * sum(apart) / 2
                if place == 0:
                    found[step + 1] = (sum(apart) / 2).item()
            optimizer.param_groups[0]["lr"] = arguments["learning_rate"] * (1 - step / 8)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), arguments.get("max_grad_norm", 1.0) or float("inf"))
            optimizer.step()
        if sent is not None:  # one update after it was sent
            copies, sent = sent, None
        if (step + 1) % 3 == 0:
            sent = [copy.deepcopy(model) for model in models]
    return [model.state_dict() for model in models], found


@pytest.mark.distributed
def test_on_a_trainer_replicas_train_as_the_equation_says(tmp_path):
    results = run_ranks(_train_all, 2, str(tmp_path), timeout=120.0)
    for (kind, exchange), (_, _, _, _, distances) in results[0].items():
        starts, batches, ends, published, _ = zip(*(result[kind, exchange] for result in results))
        assert not same(*starts) and same(starts[0], KINDS[kind][0]().state_dict())
        equal = all(same(first, second) for first, second in zip(*batches))
        assert equal == (exchange == "predictions")
        # each replica goes over all rows, or they share them
        assert len(batches[0]) == 16
        expected, expected_distances = by_hand(kind, exchange, starts, batches)
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if kind == "image" else {"rtol": 1e-5, "atol": 1e-7}
        for end, weights_by_hand in zip(ends, expected):
            for name, value in weights_by_hand.items():
                torch.testing.assert_close(end[name], value, **tolerance)
        assert list(distances) == (list(range(1, 9)) if exchange == "predictions" else [5, 6, 7, 8])
        assert distances == pytest.approx(expected_distances, rel=1e-5)
        # the first replica is what the run ends with, on both ranks
        assert same(published[0], ends[0]) and same(published[1], ends[0])


def _replicas_of_two(rank, folder):
    results = {}
    for exchange, settings in EXCHANGES.items():
        first, snapshots = First(), Snapshots()
        trainer = make_trainer(f"{folder}/{exchange}", callbacks=[first, snapshots], max_steps=5)
        trainer.add_callback(CodistillationCallback(trainer, inner_size=2, **settings))
        batches = watch_batches(trainer)
        trainer.train()
        last = next(taken for event, step, taken in snapshots.taken if (event, step) == ("step", 5))
        results[exchange] = first.weights, batches, last
    return results


@pytest.mark.distributed
def test_two_replicas_of_two_ranks_are_equal_inside_and_differ_between(tmp_path):
    results = run_ranks(_replicas_of_two, 4, str(tmp_path), timeout=120.0)
    for exchange in EXCHANGES:
        starts, batches, ends = zip(*(result[exchange] for result in results))
        for found in (starts, ends):
            assert same(found[0], found[1]) and same(found[2], found[3]) and not same(found[0], found[2])
        assert not same(batches[0][0], batches[1][0])
        assert same(batches[0][0], batches[2][0]) == (exchange == "predictions")


class Accuracy:
    def __call__(self, prediction):
        return {"rows": float(len(prediction.label_ids)), "mean": float(prediction.predictions.mean())}


def _evaluate(rank, folder):
    trainer = make_trainer(
        folder, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=3, metric_for_best_model="mean"
    )
    trainer.compute_metrics = Accuracy()
    held = []

    class Hold(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            with torch.no_grad():
                rows = torch.stack([row["pixel_values"] for row in trainer.eval_dataset])
                held.append((dict(metrics), model(rows).logits.mean().item(), weights(model)))

    trainer.add_callback(Hold())
    trainer.add_callback(CodistillationCallback(trainer, publish="best"))
    trainer.train()
    after = trainer.evaluate()
    return held, weights(trainer.model), after


@pytest.mark.distributed
def test_each_replica_is_evaluated_on_all_rows_and_the_best_is_published(tmp_path):
    results = run_ranks(_evaluate, 2, str(tmp_path))
    for step in range(3):  # after 3, 6 and the last update
        (first, mean, _), (second, other, _) = (held[step] for held, _, _ in results)
        assert first["eval_rows"] == first["eval_rows_replica_1"] == 8
        assert first["eval_mean"] == second["eval_mean"] == pytest.approx(mean, rel=1e-6)
        assert first["eval_mean_replica_1"] == second["eval_mean_replica_1"] == pytest.approx(other, rel=1e-6)
    said = json.loads((tmp_path / "codistillation.json").read_text())
    best = int(results[1][0][2][1] > results[0][0][2][1])
    assert (said["published"], said["metric"], said["replicas"]) == (best, "eval_mean", 2)
    for _, ended, after in results:
        assert same(ended, results[best][0][2][2])
        assert after["eval_mean"] == pytest.approx(results[best][0][2][1], rel=1e-6)
        assert "eval_mean_replica_1" not in after


def test_one_process_trains_as_without_it(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    trainer = make_trainer(tmp_path / "one")
    trainer.add_callback(CodistillationCallback(trainer))
    with pytest.warns(UserWarning, match="one replica only"):
        trainer.train()
    assert same(weights(plain.model), weights(trainer.model))


def _start(rank, folder):
    """Whether the replicas begin equal, for several ways to begin."""
    image_model().save_pretrained(f"{folder}/saved") if rank == 0 else None
    torch.distributed.barrier()

    def draw_head(model):
        model.classifier.weight.normal_()

    found = {}
    for name, settings in {
        "same": {"initialization": "same"},
        "pretrained": {},
        "head": {"reinitialize": draw_head},
    }.items():
        model = image_model()
        if name != "same":
            model = type(model).from_pretrained(f"{folder}/saved", dtype=torch.float64)
        first = First()
        trainer = make_trainer(f"{folder}/{name}", model=model, callbacks=[first], max_steps=1)
        trainer.add_callback(CodistillationCallback(trainer, **settings))
        trainer.train()
        found[name] = first.weights
    return found


@pytest.mark.distributed
def test_replicas_begin_alike_where_asked_and_pretrained_weights_are_kept(tmp_path):
    first, second = run_ranks(_start, 2, str(tmp_path))
    assert same(first["same"], second["same"]) and same(first["pretrained"], second["pretrained"])
    differing = [name for name in first["head"] if not torch.equal(first["head"][name], second["head"][name])]
    assert differing == ["classifier.weight"]


class Evaluator:
    """As a low-shot evaluation: shares its rows out over the ranks and gathers what they find."""

    def __init__(self):
        self.seen = []

    def __call__(self, model):
        rows = torch.stack([row["pixel_values"] for row in image_rows()])[rank() :: world_size()]
        with torch.no_grad():
            own = model.eval()(rows).logits.sum()
        self.seen.append((sum(gather_objects(own)).item(), weights(model)))
        return {"low_shot": self.seen[-1][0]}


def _low_shot(rank, folder):
    trainer, evaluator = make_trainer(folder, per_device_train_batch_size=16), Evaluator()
    trainer.add_callback(LowShotCallback(trainer, evaluator))
    trainer.add_callback(CodistillationCallback(trainer))
    trainer.train()
    return evaluator.seen


@pytest.mark.distributed
def test_a_low_shot_evaluation_is_of_one_replica(tmp_path):
    results = run_ranks(_low_shot, 2, str(tmp_path))
    model, rows = image_model().eval(), torch.stack([row["pixel_values"] for row in image_rows()])
    for seen in results:
        assert len(seen) == 4
        for value, own in seen:
            model.load_state_dict(own)
            with torch.no_grad():
                assert value == pytest.approx(model(rows).logits.sum().item(), rel=1e-9)
    assert results[0][0][0] != results[1][0][0]


def test_a_model_from_a_backbone_counts_as_pretrained(tmp_path):
    scratch = tiny_model()
    scratch.save_pretrained(tmp_path / "saved")
    assert origin_of(scratch) == ""
    assert origin_of(type(scratch).from_backbone(tmp_path / "saved")) == str(tmp_path / "saved")
