"""Codistillation on trainers and ranks, against loops over the paper's equation."""

import copy
import json
import multiprocessing

import pytest
import semi_supervised_runs
import short_runs
import torch
import torch.nn.functional as F
from launch import run_ranks
from states import same
from sync_runs import KINDS, Snapshots, image_model, image_rows, logged, make_trainer, watch_batches, weights
from sync_runs import make_local_trainer as make
from test_local_update_callbacks import item_losses
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_msn import CodistillationCallback, LowShotCallback, SlowMoCallback
from hf_msn.distributed.collectives import rank, world_size
from hf_msn.evaluation.gathering import gather_objects

EXCHANGES = {
    "predictions": {"exchange": "predictions", "alpha": 2.0, "temperature": 2.0},
    "checkpoints": {"exchange": "checkpoints", "alpha": 2.0, "exchange_every": 3, "transfer_steps": 1},
}
CASES = {
    "image": {"learning_rate": 0.02},
    # transformers computes the loss of a text in float32, and Adam would amplify its rounding.
    "text": {"learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0.0},
}


class First(TrainerCallback):
    """The weights before the first update."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.weights = weights(model)


def run(folder, kind="image", settings=None, **arguments):
    """Train; return the weights at the beginning and after the last update, the batches and the trainer."""
    first, snapshots = First(), Snapshots()
    trainer = make(folder, kind, callbacks=[first, snapshots], **arguments)
    trainer.add_callback(CodistillationCallback(trainer, **(settings or {})))
    batches = watch_batches(trainer)
    trainer.train()
    last = [taken for event, _, taken in snapshots.taken if event == "step"][-1]
    return first.weights, last, batches, trainer


def _train_all(rank, folder):
    results = {}
    for kind, arguments in CASES.items():
        for exchange, settings in EXCHANGES.items():
            arguments = {**arguments, "gradient_accumulation_steps": 2}
            first, last, batches, trainer = run(f"{folder}/{kind}_{exchange}", kind, settings, **arguments)
            distances = logged(trainer, "codistillation_distance")
            results[kind, exchange] = first, batches, last, weights(trainer.model), distances
    return results


def distance(own, peer, batch, temperature) -> torch.Tensor:
    """Return T^2 KL(p || q), the mean over the positions with a label."""
    if "input_ids" in batch:
        counts = batch["labels"][:, 1:] != -100
        own, peer = own[:, :-1][counts], peer[:, :-1][counts]
    log_p, log_q = (F.log_softmax(logits / temperature, dim=-1) for logits in (peer.detach(), own))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def by_hand(kind, exchange, starts, batches):
    """Train two replicas in one process; return their weights after 8 updates and the distances of the first."""
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
                temperature = settings.get("temperature", 1)
                apart = [
                    distance(model(batch[inputs]).logits, peer(batch[inputs]).logits, batch, temperature)
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


@pytest.mark.slow
@pytest.mark.distributed
def test_replicas_train_as_the_equation_says(tmp_path):
    results = run_ranks(_train_all, 2, str(tmp_path), timeout=120.0)
    for (kind, exchange), (_, _, _, _, distances) in results[0].items():
        starts, batches, ends, published, _ = zip(*(result[kind, exchange] for result in results))
        assert not same(*starts) and same(starts[0], KINDS[kind][0]().state_dict())
        assert all(same(first, second) for first, second in zip(*batches)) == (exchange == "predictions")
        assert len(batches[0]) == 16
        expected, expected_distances = by_hand(kind, exchange, starts, batches)
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if kind == "image" else {"rtol": 1e-5, "atol": 1e-7}
        for end, weights_by_hand in zip(ends, expected):
            for name, value in weights_by_hand.items():
                torch.testing.assert_close(end[name], value, **tolerance)
        assert list(distances) == (list(range(1, 9)) if exchange == "predictions" else [5, 6, 7, 8])
        assert distances == pytest.approx(expected_distances, rel=1e-5)
        assert same(published[0], ends[0]) and same(published[1], ends[0])


class Augmented(Dataset):
    """Rows with noise that is drawn where they are read."""

    def __init__(self):
        self.rows = image_rows()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {**row, "pixel_values": row["pixel_values"] + torch.rand(1).double()}


def _replicas_of_two(rank, folder):
    results = {}
    for exchange, settings in EXCHANGES.items():
        first, last, batches, _ = run(f"{folder}/{exchange}", settings={**settings, "inner_size": 2}, max_steps=5)
        results[exchange] = first, batches, last
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replica", "inner"))
    groups = {"group": mesh["replica"].get_group(), "inner_group": mesh["inner"].get_group()}
    snapshots = Snapshots()
    # Workers start by default as this rank did, and import everything again.
    workers = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}
    trainer = make(f"{folder}/mesh", callbacks=[snapshots], max_steps=3, **workers)
    trainer.train_dataset = Augmented()
    trainer.add_callback(CodistillationCallback(trainer, **groups))
    batches = watch_batches(trainer)
    trainer.train()
    last = [taken for event, _, taken in snapshots.taken if event == "step"][-1]
    return results, (batches, last)


@pytest.mark.slow
@pytest.mark.distributed
def test_replicas_of_two_ranks_are_equal_inside_and_workers_augment_alike_in_all_replicas(tmp_path):
    results, on_mesh = zip(*run_ranks(_replicas_of_two, 4, str(tmp_path), timeout=150.0))
    for exchange in EXCHANGES:
        starts, batches, ends = zip(*(result[exchange] for result in results))
        for found in (starts, ends):
            assert same(found[0], found[1]) and same(found[2], found[3]) and not same(found[0], found[2])
        assert not same(batches[0][0], batches[1][0])
        assert same(batches[0][0], batches[2][0]) == (exchange == "predictions")
    batches, ends = zip(*on_mesh)
    for first, second in ((0, 1), (2, 3)):  # the same place in two replicas
        assert all(same(own, other) for own, other in zip(batches[first], batches[second]))
    noises = torch.cat([batch["pixel_values"].mean(dim=(1, 2, 3)) for rank in (0, 2) for batch in batches[rank]])
    assert len(noises.unique()) == 24  # each row of an epoch has its own noise
    assert same(ends[0], ends[2]) and same(ends[1], ends[3]) and not same(ends[0], ends[1])


class Accuracy:
    def __call__(self, prediction):
        return {"rows": float(len(prediction.label_ids)), "mean": float(prediction.predictions.mean())}


class Evaluator:
    """Shares its rows over the ranks and gathers the results, as a low-shot evaluation does."""

    def __init__(self):
        self.seen = []

    def __call__(self, model):
        rows = torch.stack([row["pixel_values"] for row in image_rows()])[rank() :: world_size()]
        with torch.no_grad():
            own = model.eval()(rows).logits.sum()
        self.seen.append((sum(gather_objects(own)).item(), weights(model)))
        return {"low_shot": self.seen[-1][0]}


def _evaluate(rank, folder):
    multiprocessing.current_process()._config["daemon"] = False
    trainer = make(
        folder,
        per_device_train_batch_size=16,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=3,
        metric_for_best_model="mean",
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        dataloader_multiprocessing_context="fork",
    )
    trainer.compute_metrics, held, evaluator = Accuracy(), [], Evaluator()

    class Hold(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            with torch.no_grad():
                rows = torch.stack([row["pixel_values"] for row in trainer.eval_dataset])
                held.append((dict(metrics), model(rows).logits.mean().item(), weights(model)))

    assert trainer.evaluate()["eval_rows"] == 8
    trainer.add_callback(Hold())
    trainer.add_callback(LowShotCallback(trainer, evaluator))
    trainer.add_callback(CodistillationCallback(trainer, publish="best"))
    trainer.train()
    return held, weights(trainer.model), evaluator.seen, trainer.evaluate()


@pytest.mark.slow
@pytest.mark.distributed
def test_each_replica_is_evaluated_on_all_rows_and_the_best_is_published(tmp_path):
    results = run_ranks(_evaluate, 2, str(tmp_path))
    for step in range(3):  # after 3, 6 and the last update
        (first, mean, _), (second, other, _) = (held[step] for held, *_ in results)
        assert first["eval_rows"] == first["eval_rows_replica_1"] == 8
        assert first["eval_mean"] == second["eval_mean"] == pytest.approx(mean, rel=1e-6)
        assert first["eval_mean_replica_1"] == second["eval_mean_replica_1"] == pytest.approx(other, rel=1e-6)
    record = json.loads((tmp_path / "codistillation.json").read_text())
    best = int(results[1][0][2][1] > results[0][0][2][1])
    assert (record["published"], record["metric"], record["replicas"], record["step"]) == (best, "eval_mean", 2, 8)
    model, rows = image_model().eval(), torch.stack([row["pixel_values"] for row in image_rows()])
    for _, ended, seen, after in results:
        assert same(ended, results[best][0][2][2])
        assert after["eval_mean"] == pytest.approx(results[best][0][2][1], rel=1e-6)
        assert after["eval_rows"] == 8 and "eval_mean_replica_1" not in after
        for value, own in seen:  # the low-shot evaluations are of one replica each
            model.load_state_dict(own)
            with torch.no_grad():
                assert value == pytest.approx(model(rows).logits.sum().item(), rel=1e-9)
    assert results[0][2][0][0] != results[1][2][0][0]


class Own(nn.Module):
    """A model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 3).double()

    def forward(self, pixel_values, labels=None):
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _begin(rank, folder):
    if rank == 0:
        image_model().save_pretrained(f"{folder}/saved")
    torch.distributed.barrier()
    pretrained = type(image_model()).from_pretrained
    found = {}
    for name, model, settings in (
        ("same", image_model(), {"initialization": "same"}),
        ("pretrained", pretrained(f"{folder}/saved", dtype=torch.float64), {}),
        (
            "head",
            pretrained(f"{folder}/saved", dtype=torch.float64),
            {"reinitialize": lambda model: model.classifier.weight.normal_()},
        ),
        ("own", Own(), {"reinitialize": lambda model: model.linear.reset_parameters()}),
        ("other_batches", image_model(), {"same_batch": False}),
        ("unknown", Own(), {}),
    ):
        try:
            found[name] = run(f"{folder}/{name}", model=model, settings=settings, max_steps=1)[0]
        except ValueError as error:
            found[name] = str(error)
        torch.distributed.barrier()
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_initial_parameters_are_own_or_same_and_pretrained_ones_are_kept(tmp_path):
    first, second = run_ranks(_begin, 2, str(tmp_path))
    assert same(first["same"], second["same"]) and same(first["pretrained"], second["pretrained"])
    assert not same(first["own"], second["own"])
    differing = [name for name in first["head"] if not torch.equal(first["head"][name], second["head"][name])]
    assert differing == ["classifier.weight"]
    for found in (first, second):
        assert "rank 0" in found["other_batches"] and "rank 1" in found["other_batches"]
        assert "`reinitialize`" in found["unknown"]


@pytest.mark.parametrize(
    ("settings", "words"), [({"alpha": -1.0}, "`alpha`.*-1.0"), ({"inner_size": 2}, "`inner_size`.*2")]
)
def test_settings_outside_of_their_rule_are_refused_before_the_training(tmp_path, settings, words):
    trainer = make(tmp_path)
    with pytest.raises(ValueError, match=words):
        CodistillationCallback(trainer, **settings)
    trainer.add_callback(CodistillationCallback(trainer))


def test_trainers_that_codistillation_cannot_use_are_refused(tmp_path):
    for trainer in (None, make_trainer(tmp_path)):
        with pytest.raises(TypeError, match="LocalUpdateTrainerMixin"):
            CodistillationCallback(trainer)
    hidden = make(tmp_path)
    hidden.compute_loss_func = lambda *_, **__: None
    two = make(tmp_path)
    two.add_callback(SlowMoCallback(two))
    best = make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    msn = short_runs.make_trainer(tmp_path)
    for trainer, settings, words in (
        (make(tmp_path, label_smoothing_factor=0.1), {}, "`label_smoothing_factor`.*0.1"),
        (hidden, {}, "`compute_loss_func`"),
        (two, {}, "SlowMoCallback and CodistillationCallback"),
        (best, {"publish": "best"}, "`load_best_model_at_end`.*True"),
        (msn, {"falling_weight_decay": True}, "`final_weight_decay`.*0.4"),
        (msn, {"publish": "best"}, "`eval_dataset`"),
        (make(tmp_path, metric_for_best_model="accuracy"), {"publish": "best"}, "'eval_accuracy'"),
        (semi_supervised_runs.make_run(tmp_path, "suncet"), {}, "`predictions`"),
    ):
        with pytest.raises(ValueError, match=words):
            CodistillationCallback(trainer, **settings)


@pytest.mark.filterwarnings("ignore:.*one replica only")
def test_one_process_trains_as_without_and_an_error_stops_it(tmp_path):
    plain, trainer = make(tmp_path / "plain"), make(tmp_path / "one")
    plain.train()
    callback = CodistillationCallback(trainer)
    trainer.add_callback(callback)

    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Fail())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.sync is None
    trainer.remove_callback(Fail)
    trainer.train()
    assert same(weights(trainer.model), weights(plain.model))
