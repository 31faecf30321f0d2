"""SetPredictorCallback on a plain Trainer and a model of the user's own."""

import pytest
import torch
from short_runs import whole_and_resumed
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_msn import SetPredictorCallback, byol_loss
from hf_msn.models.direct_predictor import direct_copy

DIM = 6


class Siamese(nn.Module):
    """A linear SimSiam: what a user may have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(10, DIM)
        self.predictor = nn.Linear(DIM, DIM, bias=False)
        self.head = nn.Sequential(nn.Linear(DIM, 3, bias=False))

    def forward(self, first, second):
        rows = self.encoder(torch.cat([first, second]))
        return {"loss": byol_loss(self.predictor(rows), torch.cat(rows.chunk(2)[::-1]))}


def data(num_rows: int = 8) -> list[dict]:
    views = torch.randn(num_rows, 2, 10, generator=torch.Generator().manual_seed(1))
    return [{"first": first, "second": second} for first, second in views]


def make_trainer(folder, **arguments) -> Trainer:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return Trainer(Siamese(), TrainingArguments(str(folder), **{**settings, **arguments}), train_dataset=data())


def test_the_predictor_is_set_after_each_step_and_everything_else_is_trained(tmp_path):
    trainer = make_trainer(tmp_path)
    settings = {"rule": "direct_copy", "rho": 0.6, "eps": 0.1}
    trainer.add_callback(SetPredictorCallback(trainer, predictor="model.predictor", **settings))
    trainer.train()

    reference, F = Siamese(), None
    rows = data()
    for step in range(4):
        batch = rows[:4] if step % 2 == 0 else rows[4:]
        first, second = (torch.stack([row[name] for row in batch]) for name in ("first", "second"))
        encoded = reference.encoder(torch.cat([first, second])).detach()
        reference(first, second)["loss"].backward()
        moments = sum(torch.outer(row, row) for row in encoded) / 8
        F = moments if F is None else 0.6 * F + 0.4 * moments
        with torch.no_grad():
            for parameter in reference.encoder.parameters():
                parameter -= 0.1 * parameter.grad
            reference.predictor.weight.copy_(direct_copy(F, 0.1))
        reference.zero_grad()
    state = trainer.model.state_dict()
    torch.testing.assert_close(state["predictor.input_correlation.correlation"], F, rtol=1e-4, atol=1e-5)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
    log = trainer.state.log_history[3]
    assert log["predictor_alignment"] == pytest.approx(1, abs=1e-4) and log["correlation_largest"] > 0


def test_resume_is_bit_exact(tmp_path):
    def make(folder, **arguments):
        trainer = make_trainer(folder, **arguments)
        trainer.add_callback(SetPredictorCallback(trainer, "predictor", update_every=2))
        return trainer

    _, resumed = whole_and_resumed(make, tmp_path, 3)
    assert resumed.model.predictor.input_correlation.num_updates == 4


@pytest.mark.parametrize(
    "settings, offending",
    [
        ({"predictor": "encoder"}, "'encoder'.*predictor, head.0"),
        ({"predictor": "head.0"}, "'head.0'"),
        ({"predictor": "nothing"}, "'nothing'"),
        ({"predictor": "predictor", "rule": "direct"}, "`rule`.*'direct'"),
        ({"predictor": "predictor", "rho": 1.5}, "`rho`.*1.5"),
        ({"predictor": "predictor", "update_every": 0}, "`update_every`.*0"),
    ],
)
def test_misuse_is_refused(tmp_path, settings, offending):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=offending):
        SetPredictorCallback(trainer, **settings)
    assert trainer.model.predictor.weight.requires_grad


def test_a_second_callback_and_another_model_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    callback = SetPredictorCallback(trainer, "predictor")
    with pytest.raises(ValueError, match="'predictor'"):
        SetPredictorCallback(trainer, "predictor")
    other = make_trainer(tmp_path)
    other.add_callback(callback)
    with pytest.raises(ValueError, match="another"):
        other.train()
    with pytest.raises(TypeError, match="Siamese"):
        SetPredictorCallback(trainer.model, "predictor")
