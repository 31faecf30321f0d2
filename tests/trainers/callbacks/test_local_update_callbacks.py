"""Callbacks for local training on real trainers and ranks, against float64 loops over the equations."""

import pytest
import semi_supervised_runs
import short_runs
import torch
import torch.nn.functional as F
from launch import run_ranks
from states import same
from sync_runs import KINDS, Snapshots, logged, make_local_trainer, make_trainer, watch_batches, weights
from transformers import TrainerCallback

from hf_msn import DiLoCoCallback, LocalSGDCallback, LowShotCallback, SlowMoCallback

METHODS = {
    "local": (LocalSGDCallback, {"sync_every": 3}),
    "slow": (SlowMoCallback, {"sync_every": 3, "slow_momentum": 0.6, "slow_lr": 0.9}),
    "diloco": (DiLoCoCallback, {"sync_every": 3}),
}
CASES = {
    "image": ("image", {"max_grad_norm": 0.5, "learning_rate": 0.02}),
    # SGD, because transformers computes the loss of a text in float32, and Adam turns its noise into whole steps.
    # No clipping, which would hide the number of tokens by which the loss of a rank is divided.
    "text": ("text", {"max_grad_norm": 0.0, "learning_rate": 0.5, "gradient_accumulation_steps": 2, "optim": "sgd"}),
}
TOLERANCES = {"image": {"rtol": 1e-9, "atol": 1e-11}, "text": {"rtol": 1e-5, "atol": 1e-7}}


def _train_all(rank, folder):
    results = {}
    for case, (kind, arguments) in CASES.items():
        for method, (callback, settings) in METHODS.items():
            trainer = make_trainer(f"{folder}/{case}_{method}", kind, eval_strategy="steps", eval_steps=4, **arguments)
            trainer.add_callback(callback(trainer, **settings))
            batches = watch_batches(trainer)
            trainer.train()
            results[case, method] = batches, weights(trainer.model), logged(trainer, "learning_rate")
    return results


def item_losses(model, batch) -> torch.Tensor:
    """Return the cross-entropy of each label that is not -100."""
    if "pixel_values" in batch:
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], reduction="none")
    logits, labels = model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")


def by_hand(case: str, method: str, batches: list[list[dict]]) -> dict[str, torch.Tensor]:
    """Return the final state: local steps, a mean before the evaluation at 4, outer steps at 3, 6 and the end."""
    kind, arguments = CASES[case]
    _, settings = METHODS[method]
    accumulated, num_steps, rate = arguments.get("gradient_accumulation_steps", 1), 8, arguments["learning_rate"]
    models = [KINDS[kind][0]() for _ in batches]
    parameters = [list(model.parameters()) for model in models]
    make_optimizer = torch.optim.SGD if "optim" in arguments else torch.optim.AdamW
    optimizers = [make_optimizer(own, lr=rate, weight_decay=0.0) for own in parameters]
    anchors = [p.detach().clone() for p in parameters[0]]
    momenta = [torch.zeros_like(p) for p in anchors]
    previous = None

    def means():
        return [sum(p.detach() for p in place) / len(models) for place in zip(*parameters)]

    @torch.no_grad()
    def assign(values):
        for own in parameters:
            for p, value in zip(own, values):
                p.copy_(value)

    for step in range(num_steps):
        now = rate * (1 - step / num_steps)
        for model, own, optimizer, seen in zip(models, parameters, optimizers, batches):
            losses = torch.cat([item_losses(model, b) for b in seen[step * accumulated : (step + 1) * accumulated]])
            optimizer.param_groups[0]["lr"] = now
            optimizer.zero_grad()
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(own, arguments["max_grad_norm"] or float("inf"))
            optimizer.step()
        if step + 1 in (3, 6, 8):
            if step + 1 == num_steps:
                assign(means())  # the evaluation of the last update comes before the end
            if method == "local":
                assign(means())
            elif method == "diloco":
                change = [x0 - x for x0, x in zip(anchors, means())]
                momenta = [0.9 * v + delta for v, delta in zip(momenta, change)]
                anchors = [x0 - 0.7 * (delta + 0.9 * v) for x0, delta, v in zip(anchors, change, momenta)]
                assign(anchors)
            else:
                factor = settings["slow_momentum"] * (now / previous if previous else 1.0)
                momenta = [factor * v + x0 - x for v, x0, x in zip(momenta, anchors, means())]
                anchors = [x0 - settings["slow_lr"] * v for x0, v in zip(anchors, momenta)]
                previous = now
                assign(anchors)
        elif step + 1 == 4:
            assign(means())
    return models[0].state_dict()


@pytest.mark.slow
@pytest.mark.distributed
def test_local_training_on_a_trainer_follows_the_equations(tmp_path):
    results = run_ranks(_train_all, 2, str(tmp_path))
    for key in results[0]:
        batches = [result[key][0] for result in results]
        assert not torch.equal(batches[0][0]["labels"], batches[1][0]["labels"])
        expected = by_hand(*key, batches)
        for _, found, _ in (result[key] for result in results):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, **TOLERANCES[key[0]])
        rates = results[0][key][2]
        assert rates[8] == pytest.approx(CASES[key[0]][1]["learning_rate"] / 8)


class SaveLate(TrainerCallback):
    """Asks for a checkpoint after all other callbacks have seen the step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            control.should_save = True


class EvaluateAtEpochEnd(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()


def _consensus(rank, folder):
    results = {}
    for strategy in ("steps", "epoch"):
        own = {"eval_steps": 3, "save_steps": 3} if strategy == "steps" else {}
        trainer = make_trainer(
            f"{folder}/{strategy}", eval_strategy=strategy, save_strategy=strategy, **own, load_best_model_at_end=True
        )
        snapshots, low_shot = Snapshots(), []

        def evaluator(model, low_shot=low_shot):
            low_shot.append(weights(model))
            return {"low_shot": 0.0}

        callback = SlowMoCallback(trainer, sync_every=5, slow_momentum=0.5)
        trainer.add_callback(callback)
        trainer.add_callback(snapshots)
        trainer.add_callback(LowShotCallback(trainer, evaluator))
        trainer.add_callback(EvaluateAtEpochEnd(trainer))
        trainer.add_callback(SaveLate())
        synced, start = [], callback.on_train_begin

        def begin(args, state, control, trainer=trainer, callback=callback, synced=synced, start=start, **kwargs):
            start(args, state, control, **kwargs)
            sync = callback.sync.sync
            callback.sync.sync = lambda: (synced.append(trainer.state.global_step), sync())

        callback.on_train_begin = begin
        trainer.train()
        best = trainer.state.best_global_step
        results[strategy] = snapshots.taken, low_shot, synced, callback.sync is None, weights(trainer.model), best
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_are_equal_at_evaluations_and_checkpoints_after_one_consensus_per_update(tmp_path):
    results = run_ranks(_consensus, 2, str(tmp_path))
    # 32 rows, 2 ranks, 4 rows per batch: 4 updates per epoch. The last consensus follows the outer step of `stop`.
    for strategy, synced in (("steps", [3, 4, 5, 6, 8, 8]), ("epoch", [4, 5, 8, 8])):
        first, second = (result[strategy] for result in results)
        assert first[2] == second[2] == synced, strategy
        events = [(event, step) for event, step, _ in first[0]]
        assert ("save", 5) in events and ("evaluate", 4) in events and ("end", 8) in events
        for (event, step, own), (_, _, other) in zip(first[0], second[0]):
            if event == "step":
                assert same(own, other) == (step == 5), (strategy, step)
            else:
                assert same(own, other), (strategy, event, step)
        assert len(first[1]) == 2 and all(same(*pair) for pair in zip(first[1], second[1]))
        assert first[3] and second[3] and same(first[4], second[4])
        if strategy == "steps":
            (best,) = [own for event, step, own in first[0] if (event, step) == ("save", first[5])]
            assert same(first[4], best)  # stopped before the best model was loaded


class TargetIsOnline(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(same(model.target_encoder.state_dict(), model.encoder.state_dict()))


def test_a_target_encoder_follows_the_model_after_the_outer_step(tmp_path):
    # With momentum 0 the target is the online encoder, if it is updated after all that changes that one.
    trainer = short_runs.make_trainer(tmp_path, ema_momentum=0.0, final_ema_momentum=0.0, save_strategy="no")
    online = TargetIsOnline()
    trainer.add_callback(online)
    trainer.add_callback(SlowMoCallback(trainer, sync_every=2, slow_momentum=0.5))
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert online.found == [True] * 8
    assert isinstance(before[-1], SlowMoCallback)  # it was added after the update of the target


def _other_trainers(rank, folder):
    """MSNTrainer and PAWSTrainer, bf16, frozen parameters, a step that a scaler skips on one rank only."""
    results = {}
    msn = short_runs.make_trainer(f"{folder}/msn", gradient_accumulation_steps=2, save_strategy="no")
    msn.add_callback(SlowMoCallback(msn, sync_every=3, slow_momentum=0.5))
    paws = semi_supervised_runs.make_run(f"{folder}/paws", support_shard="images", global_support_images_per_class=4)
    paws.add_callback(LocalSGDCallback(paws, sync_every=3))
    model = KINDS["image"][0]().float()
    for parameter in model.vit.embeddings.parameters():
        parameter.requires_grad = False
    frozen = make_trainer(f"{folder}/frozen", model=model, bf16=True)
    for row in frozen.train_dataset:
        row["pixel_values"] = row["pixel_values"].float()
    frozen.add_callback(LocalSGDCallback(frozen, sync_every=3))
    skipping = make_trainer(f"{folder}/skipping", "text")
    callback = LocalSGDCallback(skipping, sync_every=2)
    skipping.add_callback(callback)
    start = callback.on_train_begin

    def begin(*args, **kwargs):
        start(*args, **kwargs)
        step = skipping.optimizer.step
        skipping.optimizer.step = lambda: None if rank == 1 and skipping.state.global_step == 3 else step()

    callback.on_train_begin = begin
    for name, trainer in {"msn": msn, "paws": paws, "frozen": frozen, "skipping": skipping}.items():
        before, snapshots = weights(trainer.model), Snapshots()
        trainer.add_callback(snapshots)
        trainer.train()
        trained = [key for key, p in trainer.model.named_parameters() if p.requires_grad]
        taken = [{key: own[key] for key in trained} for event, _, own in snapshots.taken if event == "step"]
        results[name] = before, taken, weights(trainer.model), list(logged(trainer, "loss").values())
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_any_trainer_trains_locally_and_ends_in_consensus(tmp_path):
    first, second = run_ranks(_other_trainers, 2, str(tmp_path))
    for name, (before, taken, after, losses) in first.items():
        assert same(after, second[name][2]), name
        assert not same(before, after) and torch.isfinite(torch.tensor(losses)).all() and len(losses) == 8, name
        apart = [not same(own, other) for own, other in zip(taken, second[name][1])]
        every = 2 if name == "skipping" else 3
        assert apart == [step % every != 0 for step in range(1, 9)], name
    before, _, after, _ = first["frozen"]
    assert all(torch.equal(after[name], value) == ("embeddings" in name) for name, value in before.items())


def _log(rank, folder, num_numbers):
    logs = {}
    for always in (False, True):
        trainer = make_trainer(f"{folder}/{always}", eval_strategy="steps", eval_steps=4)
        trainer.add_callback(LocalSGDCallback(trainer, sync_every=3, log_consensus_distance=always))
        trainer.train()
        names = ("sync_megabytes_sent", "sync_seconds_waiting", "sync_consensus_distance")
        logs[always] = [logged(trainer, name) for name in names]
        assert sum(p.numel() for p in trainer.model.parameters()) == num_numbers
    return logs


@pytest.mark.distributed
@pytest.mark.slow
def test_communication_is_logged_with_the_loss(tmp_path):
    num_numbers = sum(p.numel() for p in KINDS["image"][0]().parameters())
    for logs in run_ranks(_log, 2, str(tmp_path), num_numbers):
        sent, waited, distance = logs[False]
        mean = 8 * num_numbers / 1e6  # on two ranks a mean sends each byte once
        wanted = dict.fromkeys(range(1, 9), 0.0)
        wanted[3] = wanted[6] = mean  # the first log also has what `start` sent
        wanted[4] = wanted[8] = 2 * mean  # the consensus distance and the mean before an evaluation
        assert [round(sent[step] - wanted[step], 3) for step in range(2, 9)] == [0.0] * 7
        assert all(value >= 0 for value in waited.values()) and waited[3] > 0
        assert sorted(distance) == [4, 8] and min(distance.values()) > 0
        _, _, distance = logs[True]
        assert sorted(distance) == list(range(1, 9))
        assert [step for step, value in distance.items() if value < 1e-12] == [3, 6]


class EvaluateDirectly(TrainerCallback):
    """Calls methods of the trainer in the middle of a period, which no event announces."""

    def __init__(self, trainer):
        self.trainer, self.models = trainer, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in (2, 4):
            self.trainer.evaluate() if state.global_step == 2 else self.trainer.predict(self.trainer.eval_dataset)
            self.models.append(weights(model))


def _evaluate_directly(rank, folder):
    found = []
    for make in (make_local_trainer, make_trainer):
        trainer = make(folder)
        trainer.add_callback(SlowMoCallback(trainer, sync_every=5))
        trainer.add_callback(watch := EvaluateDirectly(trainer))
        trainer.train()
        found.append(watch.models)
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_with_the_mixin_a_direct_evaluation_is_at_consensus(tmp_path):
    (with_mixin, plain), (with_mixin_there, plain_there) = run_ranks(_evaluate_directly, 2, str(tmp_path))
    assert all(map(same, with_mixin, with_mixin_there))
    assert not any(map(same, plain, plain_there))
