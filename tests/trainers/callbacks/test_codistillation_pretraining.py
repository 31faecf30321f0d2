"""Codistillation of MSN through its assignments to prototypes, and of PAWS through its predictions of classes."""

import pytest
import semi_supervised_runs
import short_runs
import torch
from launch import run_ranks
from states import same
from sync_runs import logged, weights
from transformers import TrainerCallback

from hf_msn import CodistillationCallback

EXCHANGES = {
    "predictions": {"alpha": 3.0},
    "checkpoints": {"alpha": 3.0, "exchange": "checkpoints", "exchange_every": 2, "transfer_steps": 0},
}
ARGUMENTS = {"max_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "save_strategy": "no"}


def make(method, folder):
    """Return a trainer in float64. With checkpoints, update 3 is the first one with copies in use."""
    if method == "msn":
        dataset = short_runs.RandomViews(64)
        trainer = short_runs.make_trainer(folder, dataset, model_fields={"mask_ratio": 0.5}, **ARGUMENTS)
    else:
        trainer = semi_supervised_runs.make_run(folder, num_images=64, support_shard="images", **ARGUMENTS)
    trainer.model.double()
    return trainer


class Third(TrainerCallback):
    """The weights of this rank before the third update, and the gradients of that update."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.weights = weights(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_double(batch: dict) -> dict:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def _train(rank, folder, method):
    results = {}
    for exchange, settings in EXCHANGES.items():
        third = Third()
        trainer = make(method, f"{folder}/{exchange}")
        trainer.add_callback(third)
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, *it, own=compute_loss, **named: own(
            model, in_double(inputs), *it, **named
        )
        trainer.add_callback(CodistillationCallback(trainer, **settings))
        seen = semi_supervised_runs.watch(trainer)
        trainer.train()
        results[exchange] = third.weights, third.gradients, seen[4:6], logged(trainer, "codistillation_distance")
    return results


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["msn", "paws"])
def test_the_gradient_is_that_of_the_loss_and_of_the_divergence_of_assignments(tmp_path, method):
    results = run_ranks(_train, 2, str(tmp_path), method, timeout=120.0)
    for exchange in EXCHANGES:
        starts, gradients, batches, distances = zip(*(result[exchange] for result in results))
        assert not same(*starts)
        assert same(batches[0][0], batches[1][0]) == (exchange == "predictions")
        for place in range(2):
            model, peer = (make(method, tmp_path / "hand").model for _ in range(2))
            model.load_state_dict(starts[place])
            peer.load_state_dict(starts[1 - place])
            model.train()
            peer.train(exchange == "predictions")
            apart = []
            for batch in map(in_double, batches[place]):
                if method == "msn":
                    peer._mask_draw = model._mask_draw or tuple(model.mask_state.tolist())  # the same patches
                output = model(**batch)
                p, q = peer(**batch).anchor_probabilities.detach(), output.anchor_probabilities
                apart.append((p * (p.log() - q.log())).sum(dim=-1).mean())
                ((output.loss + 3.0 * apart[-1]) / 2).backward()
            assert distances[place][3] == pytest.approx(sum(apart).item() / 2, rel=1e-6)
            assert sum(apart) > 1e-4
            for name, parameter in model.named_parameters():
                if name in gradients[place]:
                    torch.testing.assert_close(parameter.grad, gradients[place][name], rtol=1e-7, atol=1e-9)
