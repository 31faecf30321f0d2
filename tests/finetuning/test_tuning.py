import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetuning_runs import (
    PROCESSOR,
    VIEWS,
    classifier_arguments,
    digits,
    images_and_labels,
    paws_config,
    states_are_equal,
    suncet_arguments,
    suncet_config,
    with_labels,
)
from launch import run_ranks
from transformers import TrainerCallback

from hf_msn import (
    BrokenImageError,
    ClassifierFinetuningArguments,
    PAWSForPreTraining,
    SupportDataset,
    finetune_classifier,
    finetune_suncet,
    load_images,
)
from hf_msn.finetuning.batches import suncet_loader
from hf_msn.finetuning.models import linear_head, load_for_classification, load_for_suncet
from hf_msn.finetuning.tuning import suncet_heads
from hf_msn.trainers.callbacks.non_finite import NonFiniteLossError

LINEAR, SUNCET = (finetune_classifier, classifier_arguments), (finetune_suncet, suncet_arguments)


def tune(method, output_dir, start=None, dataset=None, rows=None, callbacks=(), **fields):
    function, arguments = method
    if dataset is None:
        dataset, rows = digits()
    start = suncet_config() if start is None else start
    args = arguments(output_dir, **fields)
    return function(start, dataset, rows, VIEWS, args, image_processor=PROCESSOR, callbacks=callbacks)


class Recorder(TrainerCallback):
    """Keeps the model of each epoch and the logged losses."""

    def __init__(self):
        self.models, self.losses = [], []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.models.append(copy.deepcopy(model).eval())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


@torch.no_grad()
def classifier_score(model, dataset, result) -> float:
    pixels, labels = images_and_labels(dataset, result.held_out_rows)
    right = [int(model(image[None]).logits.argmax()) == label for image, label in zip(pixels, labels)]
    return 100 * sum(right) / len(right)


@torch.no_grad()
def suncet_score(model, dataset, result) -> float:
    """The class with the largest sum of exp(cosine / 0.1) over the trained images, in float64."""
    supports, support_labels = images_and_labels(dataset, result.trained_rows)
    pixels, labels = images_and_labels(dataset, result.held_out_rows)
    z, queries = (F.normalize(model.project(images).double(), dim=1) for images in (supports, pixels))
    votes = (queries @ z.T / 0.1).exp() @ torch.eye(10, dtype=torch.float64)[support_labels]
    return 100 * np.mean(votes.argmax(dim=1).numpy() == labels)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "score"), [(LINEAR, classifier_score), (SUNCET, suncet_score)])
def test_the_best_epoch_is_the_first_argmax_on_the_held_out_labels_and_its_weights_are_kept(method, score, tmp_path):
    recorder = Recorder()
    result = tune(method, tmp_path, num_train_epochs=12, validation_fraction=0.4, callbacks=[recorder])
    dataset, rows = digits()
    assert len(result.held_out_rows) == 20 and len(result.trained_rows) == 30
    assert sorted([*result.trained_rows, *result.held_out_rows]) == rows.tolist()

    recounted = [score(model, dataset, result) for model in recorder.models]
    measured = [next(iter(result.accuracy_by_epoch[epoch].values())) for epoch in range(1, 13)]
    assert measured == pytest.approx(recounted) and len(set(recounted)) > 2
    assert result.best_epoch == 1 + int(np.argmax(recounted)) < 12
    assert result.validation_accuracy == pytest.approx(max(recounted))
    assert states_are_equal(result.model, recorder.models[result.best_epoch - 1])
    assert not states_are_equal(result.model, recorder.models[-1]) and not result.model.training


def test_accuracy_is_measured_every_few_epochs_and_after_the_last(tmp_path):
    result = tune(LINEAR, tmp_path, num_train_epochs=5, eval_every_epochs=2)
    assert list(result.accuracy_by_epoch) == [2, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("method", [LINEAR, SUNCET])
def test_no_label_outside_is_read_and_test_labels_change_no_choice(method, tmp_path):
    dataset, rows = digits()
    labels = np.full(len(dataset), -1)  # -1 is no class: reading it is an error
    labels[rows] = np.array(dataset["label"][:])[rows]
    result = tune(method, tmp_path, num_train_epochs=1)
    blind = tune(method, tmp_path, dataset=with_labels(dataset, labels), rows=rows, num_train_epochs=1)
    assert states_are_equal(result.model, blind.model) and result.accuracy_by_epoch == blind.accuracy_by_epoch

    test = load_images("digits", split="test[:30]")
    poisoned = with_labels(test, (np.array(test["label"][:]) + 1) % 10)
    before = copy.deepcopy(result.model)
    honest, shifted = result.test(test), blind.test(poisoned)
    assert honest.keys() == shifted.keys() and honest != shifted
    assert result.best_epoch == blind.best_epoch and states_are_equal(before, result.model)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LINEAR, SUNCET])
def test_a_seed_repeats_bit_by_bit_and_another_gives_another_model(method, tmp_path):
    first = tune(method, tmp_path, num_train_epochs=1)
    torch.rand(7)  # the global generator has no influence
    assert states_are_equal(first.model, tune(method, tmp_path, num_train_epochs=1).model)
    other = tune(method, tmp_path, num_train_epochs=1, seed=4)
    assert not states_are_equal(first.model, other.model)
    assert first.held_out_rows.tolist() != other.held_out_rows.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("config", [suncet_config(), suncet_config(timm_model="test_resnet")], ids=["vit", "convnet"])
@pytest.mark.parametrize("method", [LINEAR, SUNCET])
def test_a_frozen_encoder_stays_bitwise_and_the_head_learns(method, config, tmp_path):
    result = tune(method, tmp_path, start=config, freeze_encoder=True, num_train_epochs=1)
    if method is LINEAR:
        before = load_for_classification(config, np.arange(10), None, 3, image_size=8)
        head = {id(parameter) for parameter in linear_head(result.model).parameters()}
    else:
        before = load_for_suncet(config, 3, image_size=8)
        head = {id(value) for value in result.model.projection_head.state_dict(keep_vars=True).values()}
    old = before.state_dict()
    new = result.model.state_dict(keep_vars=True)
    moved = {name for name in new if not new[name].equal(old[name])}
    in_head = {name for name in new if id(new[name]) in head}
    assert moved and moved <= in_head and {name for name in in_head if name.endswith("weight")} <= moved


def test_without_freezing_every_weight_learns(tmp_path):
    result = tune(LINEAR, tmp_path, num_train_epochs=2)
    before = load_for_classification(suncet_config(), np.arange(10), None, 3, image_size=8).state_dict()
    # a key's bias adds the same to all logits of a softmax: it has no gradient
    still = [n for n, value in result.model.state_dict().items() if value.equal(before[n])]
    assert all("key.bias" in name or "k_proj.bias" in name for name in still), still


@pytest.mark.slow
def test_refit_is_a_run_of_the_best_length_on_all_labels(tmp_path):
    settings = {"num_train_epochs": 3, "validation_fraction": 0.4}
    chosen, refit = tune(LINEAR, tmp_path, **settings), tune(LINEAR, tmp_path, **settings, refit=True)
    assert (refit.best_epoch, refit.accuracy_by_epoch) == (chosen.best_epoch, chosen.accuracy_by_epoch)
    assert refit.trained_rows.tolist() == digits()[1].tolist()
    alone = tune(LINEAR, tmp_path, num_train_epochs=chosen.best_epoch, validation_fraction=0)
    assert states_are_equal(refit.model, alone.model)
    assert alone.best_epoch == chosen.best_epoch and alone.validation_accuracy is None


def test_classes_need_not_be_counted_from_0(tmp_path):
    dataset, rows = digits()
    rows = rows[np.isin(np.array(dataset["label"][:])[rows], (3, 8))]
    result = tune(LINEAR, tmp_path, dataset=dataset, rows=rows)
    assert result.model.config.id2label == {0: "3", 1: "8"} and result.classes.tolist() == [3, 8]
    pixels, labels = images_and_labels(dataset, result.trained_rows)
    with torch.no_grad():
        loss = F.cross_entropy(result.model(pixels).logits, torch.from_numpy(labels == 8).long())
    assert loss < np.log(2) - 0.01  # of a head at 0; images that were taken for the other class would raise it
    test = load_images("digits", split="test[:100]")
    of_two = test.select(np.flatnonzero(np.isin(np.array(test["label"][:]), (3, 8))))
    pixels, labels = images_and_labels(of_two, range(len(of_two)))
    with torch.no_grad():
        predicted = np.array([3, 8])[result.model(pixels).logits.argmax(dim=1).numpy()]
    assert result.test(of_two) == {"top1": pytest.approx(100 * np.mean(predicted == labels))}
    with pytest.raises(ValueError, match="labelled images, but 8 do not: 0, 1, 2"):
        result.test(test)


def test_paws_is_fine_tuned_from_the_model_itself_which_stays(tmp_path):
    torch.manual_seed(0)
    source = PAWSForPreTraining(paws_config(prediction_head=True))
    before = copy.deepcopy(source)
    for method in (LINEAR, SUNCET):
        tune(method, tmp_path, start=source, num_train_epochs=1)
    assert states_are_equal(source, before)


def test_bad_labels_are_refused(tmp_path):
    dataset, rows = digits()
    labels = np.array(dataset["label"][:])
    labels[rows[4]] = -1
    with pytest.raises(ValueError, match=f"row {rows[4]} has label -1"):
        tune(LINEAR, tmp_path, dataset=with_labels(dataset, labels), rows=rows)
    of_one = rows[np.array(dataset["label"][:])[rows] == 7]
    with pytest.raises(ValueError, match="5 labelled images are of class 7"):
        tune(SUNCET, tmp_path, dataset=dataset, rows=of_one)


def with_broken(dataset, rows):
    examples = dataset.to_list()
    for row in rows:
        examples[row]["image"] = {**examples[row]["image"], "bytes": b"no image"}
    return dataset.from_list(examples, features=dataset.features)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LINEAR, SUNCET])
def test_broken_images_are_in_no_count_and_no_accuracy(method, tmp_path):
    dataset, rows = digits()
    dataset = dataset.select(range(rows.max() + 1))
    whole = tune(method, tmp_path, dataset=dataset, rows=rows, num_train_epochs=1)
    assert (whole.num_trained_images, whole.num_held_out_images) == (40, 10)
    broken = [whole.held_out_rows[0], *whole.trained_rows[:2]]
    settings = {"dataset": with_broken(dataset, broken), "rows": rows, "num_train_epochs": 1, "save_strategy": "epoch"}
    result = tune(method, tmp_path, **settings)
    again = tune(method, tmp_path, **settings, resume_from_checkpoint="true")  # reads no training image
    assert again.num_trained_images == result.num_trained_images
    assert again.num_held_out_images == result.num_held_out_images == 9
    assert result.num_trained_images == 38 or (method is SUNCET and 38 <= result.num_trained_images <= 40)
    right = result.validation_accuracy * 9 / 100
    assert right == pytest.approx(round(right))
    test = with_broken(load_images("digits", split="test[:30]"), (0, 7, 20))
    accuracies = result.test(test)
    assert all(value * 27 / 100 == pytest.approx(round(value * 27 / 100)) for value in accuracies.values())
    recorded = result.to_dict()
    assert recorded["num_test_images"] == 27 and recorded["num_held_out_images"] == 9
    assert (recorded["test_data"]["num_images"], recorded["test_data"]["num_skipped"]) == (27, 3)
    assert "of 27 images" in result.describe()
    with pytest.raises(BrokenImageError, match=f"{broken[0]}|{broken[1]}|{broken[2]}"):
        arguments = method[1](tmp_path, num_train_epochs=1)
        settings = {"image_processor": PROCESSOR, "on_broken_image": "raise"}
        method[0](suncet_config(), with_broken(dataset, broken), rows, VIEWS, arguments, **settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_train_epochs": 2.5}, "`num_train_epochs` .*2.5"),
        ({"max_steps": 5}, "`max_steps` .*5"),
        ({"refit": True, "validation_fraction": 0}, "`refit` .*`validation_fraction` 0"),
        ({"learning_rate": 0.0}, "`learning_rate` .*0"),
        ({"validation_fraction": 1}, "`validation_fraction` .*1"),
        ({"save_strategy": "steps"}, "`save_strategy` .*'steps'"),
        ({"global_batch_size": 9, "gradient_accumulation_steps": 2}, "`global_batch_size` .*9"),
    ],
)
def test_wrong_settings_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        classifier_arguments(tmp_path, **fields)
    with pytest.raises(ValueError, match="`support_views_per_image`"):  # no pairs
        suncet_arguments(tmp_path, global_support_images_per_class=1, support_views_per_image=1)


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteLossError, match="`learning_rate`"):
        tune(LINEAR, tmp_path, learning_rate=1e30)


def test_learning_rate_momentum_and_decay_are_those_asked_for(tmp_path):
    seen = []

    class Rates(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]))

    settings = {"num_train_epochs": 2, "global_batch_size": 10, "final_learning_rate": 0.01, "weight_decay": 0.3}
    tune(LINEAR, tmp_path, callbacks=[Rates()], **settings)
    expected = [0.01 + (0.05 - 0.01) * 0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(8)]
    assert [rate for rate, _ in seen] == pytest.approx(expected)
    assert [seen[0][1][name] for name in ("momentum", "nesterov", "weight_decay")] == [0.9, True, 0.3]


@pytest.mark.slow
@pytest.mark.parametrize("method", [LINEAR, SUNCET])
def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale(method, tmp_path):
    torch.manual_seed(0)
    start = PAWSForPreTraining(paws_config(timm_model="test_resnet"))
    with torch.no_grad():
        start.train().project(torch.randn(8, 3, 8, 8))
    fields = {"start_layer": "fc1"} if method is LINEAR else {}
    for frozen in (True, False):
        result = tune(method, tmp_path, start=start, num_train_epochs=2, freeze_batch_norm=frozen, **fields)
        name = "bn1" if method is LINEAR else "bn2"
        tuned, before = getattr(result.model.projection_head, name), getattr(start.projection_head, name)
        for one, other in ((tuned, before), (result.model.encoder.bn1, start.encoder.bn1)):
            assert torch.equal(one.running_mean, other.running_mean) is frozen
            assert torch.equal(one.running_var, other.running_var) is frozen
            assert not torch.equal(one.weight, other.weight)


@pytest.mark.slow
def test_suncet_is_tuned_after_the_prediction_head_of_a_checkpoint(tmp_path):
    """The first loss is the soft nearest neighbours loss of the predictions, with the statistics of pretraining."""
    torch.manual_seed(0)
    start = PAWSForPreTraining(paws_config(prediction_head=True))
    with torch.no_grad():
        for head in (start.projection_head, start.prediction_head):
            for module in head.modules():
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.running_mean.uniform_(-0.5, 0.5)
                    module.running_var.uniform_(0.5, 2)
    dataset, rows = digits()
    support = SupportDataset(dataset, rows, VIEWS, views_per_image=2, seed=3)
    args = suncet_arguments(tmp_path)
    batch = next(iter(suncet_loader(support, args)))
    with torch.no_grad():
        predictions = F.normalize(start.eval().predict(batch["support_pixel_values"]).double(), dim=1)
    labels, losses = batch["support_labels"], []
    for own in range(len(labels)):
        weights = (predictions @ predictions[own] / 0.1).exp()
        weights[own] = 0
        losses.append(-torch.log(weights[labels == labels[own]].sum() / weights.sum()))
    settings = {"validation_fraction": 0, "num_train_epochs": 1, "logging_steps": 1}
    settings |= {"freeze_batch_norm": True, "freeze_encoder": True}
    recorder = Recorder()
    result = tune(SUNCET, tmp_path, start=start, callbacks=[recorder], **settings)
    assert recorder.losses[0] == pytest.approx(float(sum(losses)) / len(losses), abs=1e-3)
    for tuned, before in zip(suncet_heads(result.model), suncet_heads(start), strict=True):
        assert torch.equal(tuned.bn1.running_mean, before.bn1.running_mean)
        assert not torch.equal(tuned.fc2.weight, before.fc2.weight)
    assert list(result.test(load_images("digits", split="test[:40]"))) == ["prediction", "backbone"]


def test_a_batch_of_each_rank_or_of_all_together(tmp_path, monkeypatch):
    monkeypatch.setattr(ClassifierFinetuningArguments, "world_size", 4)
    batch = {"gradient_accumulation_steps": 2, "global_batch_size": None}
    for given, expected in (({"per_device_train_batch_size": 3}, (24, 3)), ({}, (64, 8))):
        args = classifier_arguments(tmp_path, **batch, **given)
        assert (args.global_batch_size, args.per_device_train_batch_size) == expected
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 3, but `global_batch_size` 16"):
        classifier_arguments(tmp_path, **{**batch, "global_batch_size": 16}, per_device_train_batch_size=3)


@pytest.mark.parametrize("method", [LINEAR, SUNCET])
def test_mixed_precision_gives_a_model_like_any_other(method, tmp_path):
    result = tune(method, tmp_path, bf16=True, num_train_epochs=1)
    assert result.model.dtype == torch.float32 and 0 <= result.validation_accuracy <= 100
    if method is LINEAR:
        pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        twin = copy.deepcopy(result.model)
        twin.forward = type(twin).forward.__get__(twin)  # without anything that accelerate may have left around it
        with torch.no_grad():
            assert result.model(pixels).logits.equal(twin(pixels).logits)


def _tune_on_rank(rank, output_dir):
    runs = []
    for method, timm_model in ((LINEAR, "test_resnet"), (SUNCET, None)):
        result = tune(method, output_dir, start=suncet_config(timm_model=timm_model), num_train_epochs=1)
        runs.append((dict(result.model.state_dict()), result.accuracy_by_epoch))
    return runs


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_the_model_of_one(tmp_path):
    alone = _tune_on_rank(0, tmp_path)
    for of_rank in run_ranks(_tune_on_rank, 2, str(tmp_path), timeout=120):
        for (weights, measured), (expected, accuracies) in zip(of_rank, alone, strict=True):
            assert measured == accuracies
            for name, value in expected.items():
                assert torch.allclose(weights[name].double(), value.double(), rtol=1e-4, atol=1e-5), name
