"""Codistillation of MSN through its assignments to prototypes, and of PAWS through its predictions of classes."""

import pytest
import semi_supervised_runs
import short_runs
import torch
from launch import run_ranks
from sync_runs import logged, same, weights
from transformers import TrainerCallback

from hf_msn import CodistillationCallback

CHECKPOINTS = {"exchange": "checkpoints", "exchange_every": 2, "transfer_steps": 0}


class Own(TrainerCallback):
    """This rank's weights before an update, and the gradients that it is made of."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.before = weights(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _make(method, folder, own):
    arguments = {"max_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "save_strategy": "no"}
    if method == "paws":
        return semi_supervised_runs.make_run(folder, callbacks_added=None, **arguments) if False else None
    return short_runs.make_trainer(
        folder, short_runs.RandomViews(64), callbacks=[own], model_fields={"mask_ratio": 0.5}, **arguments
    )


def _train(rank, folder, method):
    """Update 3 of a run, and what each forward pass of it was given."""
    results = {}
    for name, settings in {"predictions": {"alpha": 3.0}, "checkpoints": {"alpha": 3.0, **CHECKPOINTS}}.items():
        own, calls = Own(2), []
        if method == "msn":
            trainer = _make(method, f"{folder}/{name}", own)
        else:
            trainer = semi_supervised_runs.make_run(
                f"{folder}/{name}", max_steps=4, gradient_accumulation_steps=2, max_grad_norm=0.0, num_images=40
            )
            trainer.add_callback(own)
        trainer.model.double()
        trainer.add_callback(CodistillationCallback(trainer, **settings))
        compute_loss = trainer.compute_loss

        def watched(model, inputs, *args, trainer=trainer, calls=calls, compute_loss=compute_loss, **kwargs):
            if trainer.state.global_step == 2:
                calls.append({key: value.clone() for key, value in inputs.items()})
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = watched
        for row_name in ("train_dataset",):
            setattr(trainer, row_name, InDouble(getattr(trainer, row_name)))
        if method == "paws":
            trainer.support_dataset = InDouble(trainer.support_dataset)
        trainer.train()
        results[name] = own.before, own.gradients, calls, logged(trainer, "codistillation_distance")
    return results


class InDouble(torch.utils.data.Dataset):
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, row):
        item = self.inner[row]
        return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in item.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["msn", "paws"])
def test_the_gradient_is_that_of_the_loss_and_the_divergence_of_assignments(tmp_path, method):
    results = run_ranks(_train, 2, str(tmp_path), method, timeout=120.0)
    for exchange in ("predictions", "checkpoints"):
        before, gradients, calls, distances = zip(*(result[exchange] for result in results))
        assert not same(before[0], before[1])
        assert same(calls[0][0], calls[1][0]) == (exchange == "predictions")
        trainer = short_runs.make_trainer(tmp_path / "hand") if method == "msn" else None
        models = []
        for own in before:
            if method == "msn":
                model = short_runs.make_trainer(tmp_path / "hand", model_fields={"mask_ratio": 0.5}).model
            else:
                model = semi_supervised_runs.make_run(tmp_path / "hand").model
            model.double().load_state_dict(own)
            models.append(model.train())
        del trainer
        for place, model in enumerate(models):
            peer = models[1 - place]
            held = {name: value.clone() for name, value in peer.state_dict().items()}
            loss, apart = 0.0, []
            if exchange == "checkpoints":
                peer = peer.eval()
            for batch in calls[place]:
                draw = getattr(model, "_mask_draw", None) or tuple(model.mask_state.tolist()) if method == "msn" else None
                output = model(**batch)
                with torch.no_grad():
                    if draw:
                        peer._mask_draw = draw  # the same patches
                    p = peer(**batch).anchor_probabilities
                q = output.anchor_probabilities
                apart.append((p * (p.log() - q.log())).sum(dim=-1).mean())
                loss = loss + (output.loss + 3.0 * apart[-1]) / 2
            model.zero_grad()
            loss.backward()
            assert distances[place][3] == pytest.approx(sum(apart).item() / 2, rel=1e-6)
            for name, parameter in model.named_parameters():
                if name in gradients[place]:
                    torch.testing.assert_close(parameter.grad, gradients[place][name], rtol=1e-7, atol=1e-9)
            for each, own in zip(models, before):
                each.load_state_dict(own)
                each.train()
            del held
