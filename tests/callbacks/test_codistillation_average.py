"""publish="average": what is measured, what is saved, and the model that loads it, against the mean in float64."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import run_ranks
from sync_runs import KINDS, Snapshots, image_rows, same, text_rows, weights
from sync_runs import make_local_trainer as make_trainer

from hf_msn import CodistillationCallback, PredictionAverage
from hf_msn.trainers.callbacks.replica_evaluation import names_of_metrics


def accuracy_and_rows(prediction):
    logits, labels = prediction
    counts = labels != -100
    return {"right": float((np.argmax(logits, axis=-1) == labels)[counts].mean()), "top": float(logits.max(-1).mean())}


def mean_log_probabilities(models, batch) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model.eval()(**batch).logits.softmax(-1) for model in models]).mean(0).log()


def in_one_batch(rows) -> dict:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def _publish(rank, folder, inner_size, kinds):
    results = {}
    for kind in kinds:
        snapshots = Snapshots()
        trainer = make_trainer(
            f"{folder}/{kind}", kind, callbacks=[snapshots], max_steps=4, per_device_eval_batch_size=3
        )
        trainer.compute_metrics = accuracy_and_rows
        trainer.add_callback(CodistillationCallback(trainer, alpha=0.1, publish="average", inner_size=inner_size))
        trainer.train()
        last = next(taken for event, step, taken in snapshots.taken if (event, step) == ("step", 4))
        logs = {n: v for entry in trainer.state.log_history for n, v in entry.items() if n.startswith("eval_")}
        trainer.save_model()
        results[kind] = last, weights(trainer.model), logs
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "inner_size", "kinds"), [(2, 1, ("image", "text")), (4, 2, ("image",))])
def test_the_average_is_measured_saved_and_loaded(tmp_path, num_ranks, inner_size, kinds):
    results = run_ranks(_publish, num_ranks, str(tmp_path), inner_size, kinds, timeout=120.0)
    for kind in kinds:
        folder = tmp_path / kind
        ends, trained, logs = zip(*(result[kind] for result in results))
        ends = ends[::inner_size]
        models = [KINDS[kind][0]() for _ in ends]
        for model, end in zip(models, ends):
            model.load_state_dict(end)
        assert not same(*ends) and all(same(own, ends[0]) for own in trained)
        batch = in_one_batch((image_rows() if kind == "image" else text_rows())[:8])
        expected = mean_log_probabilities(models, batch)

        average = PredictionAverage.from_pretrained(folder, dtype=torch.float64)
        output = average(**batch)
        torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-9)
        logits, labels = expected, batch["labels"]
        if kind == "text":
            logits, labels = expected[:, :-1], labels[:, 1:]
        loss = F.nll_loss(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-9)

        said = json.loads((folder / "codistillation.json").read_text())
        assert (said["published"], said["replicas"], said["step"]) == ("average", 2, 4)
        assert said["folders"] == ["replica_0", "replica_1"]
        for name, value in accuracy_and_rows((expected.numpy(), batch["labels"].numpy())).items():
            own = [
                accuracy_and_rows((model(**batch).logits.detach().numpy(), batch["labels"].numpy()))[name]
                for model in models
            ]
            assert said["metrics"][f"eval_{name}"]["average"] == pytest.approx(value, rel=1e-6)
            assert said["metrics"][f"eval_{name}"]["replicas"] == pytest.approx(own, rel=1e-6)
            assert logs[0][f"eval_{name}_average"] == said["metrics"][f"eval_{name}"]["average"]
            assert [logs[0][f"eval_{name}"], logs[0][f"eval_{name}_replica_1"]] == pytest.approx(own, rel=1e-6)
        # `save_model` writes the first replica as ever
        saved = type(models[0]).from_pretrained(folder, dtype=torch.float64)
        assert same(weights(saved), ends[0])
        assert not list(folder.glob("*.partial"))


def _publish_otherwise(rank, folder):
    said = {}

    def run(name, sets=None, resume=None, **settings):
        metric = settings.pop("metric", None)
        trainer = make_trainer(
            f"{folder}/{name}", max_steps=4, save_strategy="steps", save_steps=2, metric_for_best_model=metric
        )
        trainer.compute_metrics = accuracy_and_rows
        trainer.eval_dataset = sets or trainer.eval_dataset
        trainer.add_callback(CodistillationCallback(trainer, **settings))
        try:
            trainer.train(resume_from_checkpoint=resume)
            said[name, resume is None] = json.loads((Path(folder) / name / "codistillation.json").read_text())
        except ValueError as error:
            said[name, resume is None] = str(error), trainer.state.global_step

    run("missing", publish="best", metric="accuracy")
    noisy = [{**row, "pixel_values": row["pixel_values"] + rank} for row in image_rows()[:4]]
    run("noisy", noisy, publish="average")
    sets = {"near": image_rows()[:4], "far": image_rows()[4:8]}
    run("sets", sets, publish="average")
    run("sets", sets, f"{folder}/sets/checkpoint-2", publish="best", metric="near_top")
    return said


@pytest.mark.distributed
def test_several_sets_a_metric_that_is_missing_and_a_resumed_run_that_publishes_otherwise(tmp_path):
    first, second = run_ranks(_publish_otherwise, 2, str(tmp_path))
    assert first == second
    message, step = first["missing", True]
    assert step == 0  # before anything is trained
    assert "here 'eval_accuracy', but an evaluation gives eval_loss, eval_right, eval_top. Set" in message
    assert "the replicas' evaluation batches differ. Give an `eval_dataset`" in first["noisy", True][0]
    assert len(PredictionAverage.from_pretrained([tmp_path / "noisy" / f"replica_{r}" for r in (0, 1)]).replicas) == 2
    names = {f"eval_{name}_{metric}" for name in ("near", "far") for metric in ("loss", "right", "top")}
    average = first["sets", True]
    assert set(average["metrics"]) == names
    best = first["sets", False]
    assert best["values"] == average["metrics"]["eval_near_top"]["replicas"]
    assert (best["publish"], best["published"]) == ("best", best["values"].index(max(best["values"])))
    assert "folders" not in best


def test_learning_the_names_of_metrics_leaves_random_generators_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.compute_metrics = lambda _: {"drawn": float(torch.rand(1)) + np.random.rand() + random.random()}
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert names_of_metrics(trainer) == {"eval_loss", "eval_drawn"}
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
