"""When the target encoder moves, and with which momentum."""

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from short_runs import make_trainer
from transformers import TrainerCallback


class TargetDistance(TrainerCallback):
    """Record how far each update moves the target, and whether it then equals the online encoder."""

    def __init__(self):
        self.moved, self.is_online = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.weight(model.target_encoder).clone()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append((self.weight(model.target_encoder) - self.before).norm().item())
        self.is_online.append(torch.equal(self.weight(model.target_encoder), self.weight(model.encoder)))

    @staticmethod
    def weight(encoder):
        return encoder.layers[0].mlp.fc1.weight.detach()


def test_the_target_moves_once_per_update_under_accumulation(tmp_path, monkeypatch):
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "ema_momentum": 0.5, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, **settings)
    momenta, update = [], trainer.model.update_target
    monkeypatch.setattr(trainer.model, "update_target", lambda momentum: (momenta.append(momentum), update(momentum)))
    trainer.train()
    assert momenta == pytest.approx([0.5, 0.5 + 0.5 / 2.5], rel=1e-12)  # two updates, on a horizon of 2.5


def test_the_target_follows_the_weights_of_each_step_that_is_not_skipped(tmp_path, monkeypatch):
    distance = TargetDistance()
    momenta = {"ema_momentum": 0.0, "final_ema_momentum": 0.0}
    trainer = make_trainer(tmp_path, callbacks=[distance], max_steps=4, save_strategy="no", **momenta)
    # As after an overflow in fp16, at the second and third update.
    skipped = property(lambda self: trainer.state.global_step in (1, 2))
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", skipped)
    trainer.train()
    assert [moved > 0 for moved in distance.moved] == [True, False, False, True]
    assert distance.is_online == [True, False, False, True]
