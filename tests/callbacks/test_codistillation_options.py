"""Codistillation with what else a Trainer can be asked for: workers, meshes, low precision, and one more number."""

import math
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from launch import run_ranks
from sync_runs import Snapshots, image_model, image_rows, logged, same, watch_batches
from sync_runs import make_local_trainer as make_trainer
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Dataset

from hf_msn import CodistillationCallback


class Augmented(Dataset):
    """Rows with noise that is drawn where they are read."""

    def __init__(self):
        self.rows = image_rows()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {**row, "pixel_values": row["pixel_values"] + torch.rand(1).double()}


def _last(snapshots, step):
    return next(taken for event, at, taken in snapshots.taken if (event, at) == ("step", step))


def _on_a_mesh(rank, folder):
    """Replicas of ranks 0 and 2, and of 1 and 3."""
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replica", "inner"))
    # By default they start as this rank did, and import everything once more.
    workers = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}
    groups = {"group": mesh["replica"].get_group(), "inner_group": mesh["inner"].get_group()}
    snapshots = Snapshots()
    trainer = make_trainer(folder, callbacks=[snapshots], max_steps=3, **workers)
    trainer.train_dataset = Augmented()
    trainer.add_callback(CodistillationCallback(trainer, log_parameter_distance=True, **groups))
    batches = watch_batches(trainer)
    trainer.train()
    return batches, _last(snapshots, 3), logged(trainer, "codistillation_parameter_distance")


@pytest.mark.distributed
def test_on_a_mesh_workers_augment_alike_in_all_replicas_and_their_distance_is_logged(tmp_path):
    results = run_ranks(_on_a_mesh, 4, str(tmp_path), timeout=120.0)
    batches, ends, distances = zip(*results)
    for first, second in ((0, 1), (2, 3)):  # the same places in two replicas
        assert all(same(own, other) for own, other in zip(batches[first], batches[second]))
    assert not same(batches[0][0], batches[2][0])
    noises = torch.cat([batch["pixel_values"].mean(dim=(1, 2, 3)) for rank in (0, 2) for batch in batches[rank]])
    assert len(noises.unique()) == 24  # no two rows of an epoch, and no two workers, have the same noise
    assert same(ends[0], ends[2]) and same(ends[1], ends[3]) and not same(ends[0], ends[1])
    squares = 0.0
    for name in ends[0]:
        mean = (ends[0][name] + ends[1][name]) / 2
        squares += sum((ends[place][name] - mean).square().sum().item() / 2 for place in (0, 1))
    for own in distances:
        assert own[3] == pytest.approx(math.sqrt(squares), rel=1e-9)


def _in_low_precision(rank, folder):
    results = {}
    for exchange, settings in {
        "predictions": {},
        "checkpoints": {"exchange_every": 2, "transfer_steps": 0},
        "half_copies": {"exchange_every": 2, "transfer_steps": 0, "copies_dtype": "bfloat16"},
    }.items():
        snapshots = Snapshots()
        trainer = make_trainer(
            f"{folder}/{exchange}",
            model=image_model().float(),
            callbacks=[snapshots],
            max_steps=3,
            bf16=True,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=3,
        )
        rows = [{**row, "pixel_values": row["pixel_values"].float()} for row in image_rows()]
        trainer.train_dataset, trainer.eval_dataset = rows, rows[:4]
        exchange_as = "predictions" if exchange == "predictions" else "checkpoints"
        trainer.add_callback(CodistillationCallback(trainer, exchange=exchange_as, alpha=0.5, **settings))
        batches = watch_batches(trainer)
        trainer.train()
        distances = logged(trainer, "codistillation_distance")
        results[exchange] = batches[4:], _last(snapshots, 2), distances, logged(trainer, "eval_loss")
    return results


@pytest.mark.distributed
def test_in_bfloat16_the_distance_is_that_from_the_other_replica(tmp_path):
    results = run_ranks(_in_low_precision, 2, str(tmp_path), timeout=120.0)
    for exchange in results[0]:
        batches, weights, distances, losses = zip(*(result[exchange] for result in results))
        models = [image_model().float() for _ in weights]
        for model, own in zip(models, weights):
            model.load_state_dict(own)
        for place, (own, peer) in enumerate((models, reversed(models))):
            apart = []
            for batch in batches[place]:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    log_q, log_p = (
                        F.log_softmax(model(batch["pixel_values"]).logits.float(), dim=-1) for model in (own, peer)
                    )
                apart.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item())
            assert sum(apart) > 1e-3
            assert distances[place][3] == pytest.approx(sum(apart) / 2, rel=0.1 if exchange == "half_copies" else 0.02)
            assert math.isfinite(losses[place][3])


def _with_workers_that_stay(rank, folder):
    multiprocessing.current_process()._config["daemon"] = False
    trainer = make_trainer(
        folder,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        dataloader_multiprocessing_context="fork",
    )
    trainer.compute_metrics = lambda prediction: {"rows": float(len(prediction.label_ids))}
    found = [trainer.evaluate()["eval_rows"]]
    trainer.add_callback(CodistillationCallback(trainer))
    trainer.train()
    found += [entry["eval_rows"] for entry in trainer.state.log_history if "eval_rows_replica_1" in entry]
    return [*found, trainer.evaluate()["eval_rows"]]


@pytest.mark.distributed
def test_loaders_whose_workers_stay_give_replicas_all_rows_and_equal_ranks_their_part(tmp_path):
    assert run_ranks(_with_workers_that_stay, 2, str(tmp_path)) == [[8.0] * 4] * 2
