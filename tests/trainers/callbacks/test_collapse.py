"""CollapseCallback: its measures, and runs of every method that collapse on purpose or do not."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from launch import run_ranks
from semi_supervised_runs import make_run
from short_runs import RandomViews, logged, make_trainer
from transformers import TrainerControl, TrainerState
from transformers.utils import ModelOutput

from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.models import modeling_byol
from hf_msn.trainers.callbacks import collapse
from hf_msn.trainers.callbacks.collapse import CollapseCallback, effective_rank, scaled_std
from hf_msn.trainers.callbacks.local_update import PerRankCallback

NO_WEIGHTS = {"weight_decay": 50.0, "final_weight_decay": None}
COLLAPSES = {
    "one prototype": ("msn", {"me_max_weight": 0.0}, {"learning_rate": 2e-2, "ema_momentum": 0.8}, "`targets_in_use`"),
    "flat prototypes": ("msn", {"sharpen_temperature": 4.0}, {}, "`target_information`"),
    "flat classes": ("paws", {"sharpen_temperature": 4.0}, {}, "`target_information`"),
    "constant features of MSN": ("msn", {}, NO_WEIGHTS, "`feature_std`"),
    "constant features of PAWS": ("paws", {}, NO_WEIGHTS, "`feature_std`"),
    "constant features of SuNCEt": ("suncet", {}, NO_WEIGHTS, "`feature_std`"),
    "features of BYOL on a line": ("byol", {}, NO_WEIGHTS, "`feature_rank`"),
}


def run_of(method: str, tmp_path, fields: dict, **arguments):
    arguments = {
        "max_steps": 200,
        "save_strategy": "no",
        "logging_steps": 20,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "on_collapse": "stop",
        **arguments,
    }
    if method == "msn":
        return make_trainer(tmp_path, dataset=RandomViews(64), model_fields=fields, **arguments)
    return make_run(tmp_path, method, model_fields=fields, num_images=64, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_named_and_ends_the_run_within_200_steps(tmp_path, caplog, name):
    method, fields, arguments, symptom = COLLAPSES[name]
    trainer = run_of(method, tmp_path, fields, **arguments)
    trainer.train()
    assert trainer.state.global_step < 200
    assert symptom in caplog.text
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["msn", "paws", "suncet"])
def test_a_healthy_run_goes_on(tmp_path, caplog, method):
    trainer = run_of(method, tmp_path, {}, max_steps=60)  # by then a collapse is named
    trainer.train()
    assert trainer.state.global_step == 60
    assert "collapsed" not in caplog.text
    for name in ("feature_std", "projection_std", "feature_rank"):
        assert set(logged(trainer, name)) == {20, 40, 60}


def without_predictor(trainer, monkeypatch):
    trainer.model.prediction_head = torch.nn.Identity()


def without_stop_gradient(trainer, monkeypatch):
    def loss(predictions, targets):
        return 2 * (F.normalize(predictions, dim=-1) - F.normalize(targets, dim=-1)).square().sum(dim=-1).mean()

    monkeypatch.setattr(modeling_byol, "byol_loss", loss)


@pytest.mark.slow
@pytest.mark.parametrize("change", [without_predictor, without_stop_gradient])
def test_byol_collapses_without_its_predictor_and_without_its_stop_gradient(tmp_path, caplog, monkeypatch, change):
    fields = {"ema": False, "projection_batch_norm": False}
    trainer = run_of("byol", tmp_path, fields, max_steps=400)
    change(trainer, monkeypatch)
    trainer.train()
    assert trainer.state.global_step < 400
    assert "the run has collapsed" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predictor", "ema"), [("mlp", True), ("linear", False), ("direct_pred", True), ("direct_copy", False)]
)
def test_byol_with_any_predictor_goes_on(tmp_path, caplog, predictor, ema):
    trainer = run_of("byol", tmp_path, {"predictor": predictor, "ema": ema}, max_steps=60)
    trainer.train()
    assert trainer.state.global_step == 60
    assert "collapsed" not in caplog.text


def outputs(kind: str = "healthy", num_rows: int = 16, dim: int = 12) -> ModelOutput:
    generator = torch.Generator().manual_seed(0)
    features, projections = torch.randn(2, num_rows, dim, generator=generator)
    targets = torch.softmax(4 * torch.randn(num_rows, 6, generator=generator), dim=-1)
    line = torch.linspace(-1, 1, num_rows)[:, None] * features[:1]
    changes = {
        "healthy": {},
        "feature_std": {"features": features[:1].expand(num_rows, dim)},
        "projection_std": {"projections": projections[:1].expand(num_rows, dim)},
        "feature_rank": {"features": line},
        "nan": {"features": features.fill_(float("nan")) if kind == "nan" else features},
        "targets_in_use": {"target_probabilities": torch.eye(6)[:1].expand(num_rows, 6)},
        "one common class of two": {"target_probabilities": torch.eye(2)[[0] * (num_rows - 2) + [1] * 2]},
        "target_information": {"target_probabilities": torch.full((num_rows, 6), 1 / 6)},
    }
    given = {"features": features, "projections": projections, "target_probabilities": targets, **changes[kind]}
    return ModelOutput(given)


def updates(kinds: list[str], on_collapse: str = "warn", **sizes) -> list[int]:
    """Return the updates after which the training would end, of 20 updates with each kind of outputs."""
    callback, control, state = CollapseCallback(trainer=None), TrainerControl(), TrainerState()
    ends = []
    for kind in kinds:
        for _ in range(20):
            state.global_step += 1
            callback.observe(outputs(kind, **sizes))
            callback.on_step_end(SimpleNamespace(on_collapse=on_collapse, device="cpu"), state, control)
            if control.should_training_stop and control.should_save:
                ends.append(state.global_step)
                control.should_training_stop = False
    return ends


@pytest.mark.parametrize(
    "kind", ["feature_std", "projection_std", "feature_rank", "targets_in_use", "target_information"]
)
def test_each_symptom_is_reported_once_after_60_updates(caplog, kind):
    assert updates(["healthy", *[kind] * 2, "healthy", *[kind] * 3], "stop") == [140]
    caplog.clear()
    assert updates([kind] * 5) == []  # warns only
    assert caplog.text.count(f"`{kind}` was") == 1
    assert caplog.text.count("At step 60") == 1


def test_small_micro_batches_nan_uneven_classes_and_ignored_collapses_give_no_alarm(caplog):
    assert updates(["feature_std"] * 4, "stop", num_rows=7) == []
    assert updates(["feature_std"] * 4, "ignore") == []
    assert updates(["one common class of two"] * 4, "stop") == []
    assert updates(["nan"] * 4, "stop") == []  # another callback's
    assert "collapsed" not in caplog.text


def test_another_training_is_judged_from_its_start():
    callback, control, state = CollapseCallback(trainer=None), TrainerControl(), TrainerState()
    args = SimpleNamespace(on_collapse="stop", device="cpu")
    for _ in range(2):
        callback.on_train_begin(args, state, control)
        for state.global_step in range(1, 61):
            assert not control.should_training_stop
            callback.observe(outputs("feature_std"))
            callback.on_step_end(args, state, control)
        assert control.should_training_stop
        control.should_training_stop = False


class _MissesRank(PerRankCallback):
    def __init__(self):
        pass

    def wait_for_all(self):
        raise PeerError("Rank 2 is missing.", [2])


def test_a_stop_waits_for_the_ranks_with_the_deadline_of_their_method():
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[_MissesRank()]))
    callback, control, state = CollapseCallback(trainer), TrainerControl(), TrainerState(global_step=20)
    callback.on_step_end(SimpleNamespace(on_collapse="warn", device="cpu"), state, control)
    with pytest.raises(PeerError):
        callback.on_step_end(SimpleNamespace(on_collapse="stop", device="cpu"), state, control)


def _stop_of(rank: int) -> list[int]:
    return updates(["feature_std" if rank == 1 else "healthy"] * 3, "stop")


def test_all_ranks_stop_when_one_has_collapsed():
    assert run_ranks(_stop_of, 2) == [[60], [60]]


def _warnings_of(rank: int) -> tuple[list[str], list[int]]:
    messages = []
    module_logger = collapse.logger
    collapse.logger = SimpleNamespace(warning=messages.append)
    callback, args = CollapseCallback(trainer=None), SimpleNamespace(on_collapse="warn", device="cpu")
    numbers = []
    for step in range(1, 121):
        callback.observe(outputs("healthy" if rank == 0 else "feature_std"))
        callback.on_step_end(args, TrainerState(global_step=step), TrainerControl())
        if step % 50 == 0:  # a log
            numbers.append(callback.report(args, step))
    collapse.logger = module_logger
    return messages, numbers


def test_rank_0_alone_warns_once_with_the_number_of_collapsed_ranks():
    (warnings, numbers), *others = run_ranks(_warnings_of, 3)
    assert numbers == [0, 2] and others == [([], [0, 2])] * 2
    (warning,) = warnings
    assert "At step 100" in warning and "2 of 3 ranks" in warning and "`feature_std` was" in warning


def test_measures_equal_loops_in_float64():
    rows = outputs(num_rows=9, dim=5).features.double()
    normalized = [row / row.norm() for row in rows]
    deviations = []
    for column in range(5):
        values = [row[column] for row in normalized]
        mean = sum(values) / 9
        deviations.append((sum((value - mean) ** 2 for value in values) / 9).sqrt())
    assert scaled_std(rows).item() == pytest.approx(float(sum(deviations) / 5 * 5**0.5), rel=1e-6)

    centred = rows - rows.mean(dim=0)
    singular_values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    shares = singular_values / singular_values.sum()
    expected = torch.exp(-sum(share * share.log() for share in shares))
    assert effective_rank(rows).item() == pytest.approx(expected.item(), rel=1e-5)

    targets = outputs(num_rows=9).target_probabilities.double()
    mean = sum(targets) / 9
    information = sum((p * (p / mean).log()).sum() for p in targets) / 9  # mean_i KL(p_i, mean)
    logged_values = CollapseCallback(trainer=None).observe(outputs(num_rows=9))
    assert logged_values["target_information"].item() == pytest.approx(information.item(), rel=1e-5)
